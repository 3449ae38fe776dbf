"""The calls of the public ops for the kernel report, on uninitialised memory; x is the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastnst_kernels as fk

# Each creates the op's other arguments and returns the result and the tensors that need gradients.
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


def _loss_relu_backward(x: Tensor, style: bool = False, content: bool = False) -> Outcome:
    """Without gradients: it computes one itself."""
    n, c = x.shape[:2]
    vector = torch.empty(n)
    y = fk.loss_relu_backward(
        x.detach(),
        incoming=torch.empty_like(x),
        style_matrix=fk.StyleMatrix(torch.empty(n, c, c, dtype=x.dtype), vector) if style else None,
        style_factor=vector if style else None,
        content_target=torch.empty_like(x) if content else None,
        content_factor=vector if content else None,
    )
    return y, []


def _uint8_to_input(x: Tensor, padding: int = 0) -> Outcome:
    """x gives the shape and the result's dtype."""
    n, c, h, w = x.shape
    images = torch.empty((n, h, w, c), dtype=torch.uint8).permute(0, 3, 1, 2)
    vector = torch.empty(c)
    return fk.uint8_to_input(images, 1 / 255, vector, vector.clone(), padding=padding, dtype=x.dtype), []


def _output_to_vgg_input(x: Tensor) -> Outcome:
    z, mean, gain = x.detach(), torch.empty(3), torch.empty(3)
    window = (0, 0, *x.shape[2:])
    u, _ = fk.output_to_vgg_input(z, mean, gain, window=window, tanh=True, factor=0.5, offset=0.5, dtype=x.dtype)
    return u, []


def _output_to_vgg_input_backward(x: Tensor) -> Outcome:
    """Without gradients: it computes one itself."""
    z, du, gain, watch = x.detach(), torch.empty_like(x.detach()), torch.empty(3), torch.empty(())
    window, weights = (0, 0, *x.shape[2:]), (1.0, 1.0)
    options = {"window": window, "tanh": True, "factor": 0.5, "variation": weights, "watch": watch}
    return fk.output_to_vgg_input_backward(z, du, gain, **options), []


OPS: dict[str, Callable[..., Outcome]] = {
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "gram_matrix": _gram_matrix,
    "style_loss": _style_loss,
    "loss_relu_backward": _loss_relu_backward,
    "max_pool2d_switches": _max_pool,
    "max_unpool2d_switches": _max_unpool,
    "uint8_to_input": _uint8_to_input,
    "output_to_vgg_input": _output_to_vgg_input,
    "output_to_vgg_input_backward": _output_to_vgg_input_backward,
}
