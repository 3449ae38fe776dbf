"""Times the ops of fastnst_kernels beside what PyTorch offers, and refuses to time what computes something else.

| module | holds |
|---|---|
| `ops.py` | what is timed: inputs, the library's call, the plain PyTorch formulation, and what it costs at least |
| `providers.py` | who computes it: the library, eager PyTorch, torch.compile, a plain copy |
| `correctness.py` | the comparison with fp64 that every provider must pass first |
| `timing.py` | seconds on the device, with cold caches and without launch overhead |
| `session.py` | a case from inputs to figures |
| `environment.py` | what a figure depends on: GPU, driver, versions, revision |
| `results.py`, `plot.py` | the JSON as a table, targets and a picture |
"""
