"""Time the ops of fastnst_kernels beside PyTorch; a provider with wrong results is not timed.

| module | holds |
|---|---|
| `ops.py` | an op: inputs, the library's call, the plain PyTorch formulation, the minimum cost |
| `providers.py` | implementations: the library, eager PyTorch, torch.compile, a plain copy |
| `correctness.py` | the comparison with fp64 that every provider must pass first |
| `timing.py` | seconds on the device, with cold caches and without launch overhead |
| `session.py` | one case, from inputs to measurements |
| `environment.py` | GPU, driver, versions, revision |
| `results.py`, `plot.py` | the JSON as a table, targets and a plot |
"""
