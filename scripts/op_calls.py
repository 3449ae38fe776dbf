"""How each public op is called for the kernel report: what it needs beside the picture x, on uninitialised memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastnst_kernels as fk

# Each makes what its op needs beside x and returns the result with the tensors whose gradients are wanted.
Outcome = tuple[Tensor, list[Tensor]]


def _leaf(*shape: int) -> Tensor:
    return torch.empty(shape, requires_grad=True)


def _instance_norm(x: Tensor, residual: bool = False, **options: Any) -> Outcome:
    leaves = [x, _leaf(x.shape[1]), _leaf(x.shape[1])]
    added = torch.empty_like(x, requires_grad=True) if residual else None
    y = fk.instance_norm(*leaves, residual=added, **options)
    return y, leaves if added is None else [*leaves, added]


def _batch_norm(x: Tensor, residual: bool = False, **options: Any) -> Outcome:
    leaves = [x, _leaf(x.shape[1]), _leaf(x.shape[1])]
    running = torch.empty(x.shape[1]), torch.empty(x.shape[1])
    added = torch.empty_like(x, requires_grad=True) if residual else None
    y = fk.batch_norm(*leaves, *running, residual=added, **options)
    return y, leaves if added is None else [*leaves, added]


def _gram_matrix(x: Tensor) -> Outcome:
    return fk.gram_matrix(x), [x]


def _style_loss(x: Tensor) -> Outcome:
    return fk.style_loss(x, torch.empty(x.shape[1], x.shape[1])), [x]


def _max_pool(x: Tensor, kernel_size: int = 2, stride: int = 2) -> Outcome:
    return fk.max_pool2d_switches(x, kernel_size, stride)[0], [x]


def _max_unpool(x: Tensor, kernel_size: int = 2, stride: int = 2) -> Outcome:
    """`x` gives the shape of the result, as in `cost`."""
    n, c, *sides = x.shape
    pooled = (n, c, *((side - kernel_size) // stride + 1 for side in sides))
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(pooled, dtype=x.dtype, memory_format=layout, requires_grad=True)
    switches = torch.empty(pooled, dtype=torch.uint8, memory_format=layout).zero_()
    return fk.max_unpool2d_switches(y, switches, sides, kernel_size, stride), [y]


def _tap_backward(x: Tensor, style: bool = False, content: bool = False) -> Outcome:
    """A gradient itself, it has none."""
    n, c = x.shape[:2]
    vector = torch.empty(n)
    y = fk.tap_backward(
        x.detach(),
        incoming=torch.empty_like(x),
        style_matrix=fk.StyleMatrix(torch.empty(n, c, c, dtype=x.dtype), vector) if style else None,
        style_factor=vector if style else None,
        content_target=torch.empty_like(x) if content else None,
        content_factor=vector if content else None,
    )
    return y, []


def _picture_input(x: Tensor, padding: int = 0) -> Outcome:
    """x gives the shape and the result's type."""
    n, c, h, w = x.shape
    pictures = torch.empty((n, h, w, c), dtype=torch.uint8).permute(0, 3, 1, 2)
    vector = torch.empty(c)
    return fk.picture_input(pictures, 1 / 255, vector, vector.clone(), padding=padding, dtype=x.dtype), []


def _network_boundary(x: Tensor) -> Outcome:
    z, mean, gain = x.detach(), torch.empty(3), torch.empty(3)
    window = (0, 0, *x.shape[2:])
    u, _ = fk.network_boundary(z, mean, gain, window=window, tanh=True, factor=0.5, offset=0.5, dtype=x.dtype)
    return u, []


def _network_boundary_backward(x: Tensor) -> Outcome:
    """A gradient itself, it has none."""
    z, du, gain, watch = x.detach(), torch.empty_like(x.detach()), torch.empty(3), torch.empty(())
    window, weights = (0, 0, *x.shape[2:]), (1.0, 1.0)
    options = {"window": window, "tanh": True, "factor": 0.5, "variation": weights, "watch": watch}
    return fk.network_boundary_backward(z, du, gain, **options), []


OPS: dict[str, Callable[..., Outcome]] = {
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "gram_matrix": _gram_matrix,
    "style_loss": _style_loss,
    "tap_backward": _tap_backward,
    "max_pool2d_switches": _max_pool,
    "max_unpool2d_switches": _max_unpool,
    "picture_input": _picture_input,
    "network_boundary": _network_boundary,
    "network_boundary_backward": _network_boundary_backward,
}
