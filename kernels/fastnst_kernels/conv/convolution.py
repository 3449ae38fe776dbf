"""`conv2d` and `conv_transpose2d` that do not save an input that `norm.recompute` can recompute.

On a CPU they also take the faster of PyTorch's ways to a gradient, and Winograd's algorithm where `cpu.winograd` is
faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnst_kernels.cpu import winograd
from fastnst_kernels.norm.recompute import is_plain, node_of, recomputed_output


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
) -> Tensor:
    """`conv2d` or `conv_transpose2d`; saves x for the backward unless a norm of `norm.recompute` made it.

    Args:
        x: `[N, in, H, W]`.
        weight: `[out, in, k, k]`; `[in, out, k, k]` if `transposed`.
        bias: `[out]`.
        stride: in both directions.
        padding: zeros around x; if `transposed` what is cropped from the result.
        transposed: which of the two.

    Returns:
        `[N, out, H', W']`.
    """
    node = None if is_plain() else node_of(x)
    if node is not None:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and weight.dtype == torch.float32:
            dtype = torch.get_autocast_dtype(kind)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        # Else autocast converts x, and the convolution would save the copy.
        if x.dtype == weight.dtype:
            result: Tensor = _Convolution.apply(x, weight, bias, node, stride, padding, transposed)  # type: ignore[no-untyped-call]
            return result
    elif not is_plain() and _prefers_nchw(x, transposed=transposed) and x.dtype == weight.dtype and not _casts(x):
        own: Tensor = _Convolution.apply(x, weight, bias, None, stride, padding, transposed)  # type: ignore[no-untyped-call]
        return own
    if transposed:
        return F.conv_transpose2d(x, weight, bias, stride, padding)
    tracked = torch.compiler.is_compiling() or torch.is_grad_enabled()
    if not tracked and winograd.is_faster(x, weight, stride, padding) and not _casts(x):
        return winograd.convolve(x, weight, bias, padding=padding)
    return F.conv2d(x, weight, bias, stride, padding)


def _casts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


class _Convolution(torch.autograd.Function):
    """A convolution that does not save its input y if `node` recomputes it."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        node: Any,
        stride: int,
        padding: int,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, *(() if node is not None else (y,)))
        ctx.node, ctx.bias_shape = node, None if bias is None else list(bias.shape)
        ctx.options = ([stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], 1)
        if not transposed and winograd.is_faster(y, weight, stride, padding):
            return winograd.convolve(y, weight, bias, padding=padding)
        z: Tensor = torch.ops.aten.convolution(y, weight, bias, *ctx.options)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        y = saved[0] if saved else recomputed_output(ctx.node)
        gradients = _convolution_backward(dz, y, weight, ctx.bias_shape, ctx.options, list(ctx.needs_input_grad[:3]))
        return *gradients, None, None, None, None


def _convolution_backward(
    dz: Tensor, y: Tensor, weight: Tensor, bias_shape: list[int] | None, options: tuple[Any, ...], needed: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of y, weight and bias; None for those that are not needed."""
    (stride, _), (padding, _), _, transposed = options[:4]
    if not transposed and winograd.is_faster(y, weight, stride, padding):
        return (
            winograd.input_gradient(dz, weight, padding=padding) if needed[0] else None,
            winograd.weight_gradient(y, dz, padding=padding) if needed[1] else None,
            dz.sum((0, 2, 3)) if needed[2] else None,
        )
    backward = torch.ops.aten.convolution_backward
    if not needed[1] or not _prefers_nchw(y, transposed=transposed):
        return tuple(backward(dz, y, weight, bias_shape, *options, needed))
    dy = backward(dz, y, weight, None, *options, [True, False, False])[0] if needed[0] else None
    # A single operand in NHWC would have all converted back.
    operands = _as_nchw(dz), _as_nchw(y), weight.contiguous()
    _, d_weight, d_bias = backward(*operands, bias_shape, *options, [False, True, needed[2]])
    return dy, torch.empty_like(weight).copy_(d_weight), d_bias


def _prefers_nchw(y: Tensor, *, transposed: bool) -> bool:
    """Whether the weight's gradient of a convolution of y is computed in NCHW.

    oneDNN computes it faster so than from NHWC, both copies included, and y's own gradient slower; only in fp32, and
    not that of a transposed convolution.
    """
    return y.device.type == "cpu" and y.dtype == torch.float32 and not transposed and not y.is_contiguous()


def _as_nchw(x: Tensor) -> Tensor:
    """x as NCHW, copied sample by sample: PyTorch transposes a matrix faster than four dimensions."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    planes = x.new_empty(x.shape)
    for pixels, plane in zip(x.permute(0, 2, 3, 1), planes, strict=True):
        plane.flatten(1).copy_(pixels.flatten(0, 1).t())
    return planes
