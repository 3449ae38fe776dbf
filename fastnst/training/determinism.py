"""`train.deterministic`: the same bits from each run of a configuration."""

import contextlib
import os
from collections.abc import Iterator

import torch

from fastnst.config import TrainConfig


@contextlib.contextmanager
def algorithms(config: TrainConfig) -> Iterator[None]:
    """Within this block use the fastest algorithms, or with `train.deterministic` deterministic ones only."""
    deterministic = config.deterministic
    if deterministic:
        # cuBLAS sums in one order only if its workspace has a fixed size, which it reads when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
