"""Seeded generators and random images."""

import torch
from torch import Tensor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [0, 1), in channels_last."""
    made = torch.rand(*shape, generator=seeded(seed), dtype=dtype)
    return made.contiguous(memory_format=torch.channels_last)
