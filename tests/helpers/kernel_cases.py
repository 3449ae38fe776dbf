"""Inputs that the kernel tests share: dtypes, memory layouts, seeded random tensors, and gradients by autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _sliced(x: torch.Tensor) -> torch.Tensor:
    """Same values in a window of a larger contiguous tensor, every second row of it."""
    n, c, h, w = x.shape
    larger = x.new_full((n, c + 1, 2 * h, w + 2), float("nan"))
    larger[:, 1:, ::2, 1:-1] = x
    return larger[:, 1:, ::2, 1:-1]


def _channels_of_channels_last(x: torch.Tensor) -> torch.Tensor:
    """Same values in some of the channels of a wider channels_last tensor."""
    n, c, h, w = x.shape
    larger = _channels_last(x.new_full((n, c + 3, h, w), float("nan")))
    larger[:, 2:-1] = x
    return larger[:, 2:-1]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "sliced_channels_last": _channels_of_channels_last,
}


def randn(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> torch.Tensor:
    """Normal values, the same on every device, rounded to `dtype`."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def parameters(channels: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 weight (some negative) and bias `[C]`, exact in bfloat16, so that PyTorch can use them in any dtype."""
    weight, bias = (randn((channels,), torch.bfloat16, device, seed=seed).float() for seed in (11, 12))
    return weight, bias


def gradients(
    fn: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], dy: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`fn(*inputs)` and the gradients of `Σ fn·dy` for every input, all cast to `dtype` first if one is given."""
    leaves = [t.detach() if dtype is None else t.detach().to(dtype) for t in inputs]
    y = fn(*[leaf.requires_grad_() for leaf in leaves])
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(y.dtype))


def spread_like(x: torch.Tensor) -> torch.Tensor:
    """A gradient as `sum` hands it back, but not constant: one value per sample and column, stride 0 elsewhere."""
    n, _, _, w = x.shape
    return randn((n, 1, 1, w), x.dtype, x.device, seed=21).expand(x.shape)


def same_format(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dense `a` follows the order of `b`'s strides, channels first or last."""
    if 1 in (*a.shape[1:], *b.shape[1:]):
        return True  # with a side or the channels of 1, one memory can have both formats
    last = b.stride(1) == 1
    return a.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def check_bad_input(fn: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fn(**arguments)
