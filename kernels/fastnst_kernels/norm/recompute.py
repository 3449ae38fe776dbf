"""Norms whose results are not kept for the backward of the convolution after them, but made once more.

Source: Chen, Xu, Zhang, Guestrin 2016, "Training Deep Nets with Sublinear Memory Cost", on one pair of layers.

A norm keeps its input x, a convolution its input y = place(relu?(norm(x) + residual)): y is needed for the weight's
gradient, and on the CPU for the ReLU's mask. But y follows from x and what is small beside it, μ and 1/√(σ² + ε):

    forward     y, μ, r = norm(x)                  z = conv(y)       kept: x, μ, r, the weights
    backward    y = place(relu?((x − μ)·r·w + b + residual))         the same operations on the same numbers
                dy, d_weight = conv's backward(dz, y)
                dx, dw, db, d_residual = norm's backward(dy, x, μ, r), and y is let go

Where the residual is such a y itself it is not kept either: the first that is needed makes those below it, down to one
without a residual, and each stays until its own norm's backward. So a chain of residual blocks is run through once.

Bytes: per norm x in and y out once more, with a residual that too, and y less in memory from the forward on. The
results are the same bits wherever the norm runs in the same two steps, statistics and then this; in one pass on a GPU
they may differ in rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnst_kernels import runtime
from fastnst_kernels.cpu import winograd
from fastnst_kernels.norm import aten, dispatch, op, upsample_pad
from fastnst_kernels.norm.batch_norm import batch_norm, check_batch_norm, update_running
from fastnst_kernels.norm.instance_norm import check_instance_norm, instance_norm
from fastnst_kernels.norm.upsample_pad import Placement

_Place = tuple[int, tuple[int, ...], str]


@torch.library.custom_op("fastnst::normalize", mutates_args=())
def _normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    relu: bool,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
) -> Tensor:
    """The norms' result with given statistics, `[N, C]` or `[C]`; it has no gradient."""
    x = runtime.dense(x)
    place = Placement(upsample, tuple(padding), padding_mode)
    if runtime.implementation(x) == "triton":
        residual = None if residual is None else runtime.dense(residual, like=x)
        return dispatch.apply(x, weight, bias, mean, rstd, residual, place, relu)
    values = x.to(mean.dtype)
    weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    residual = None if residual is None else upsample_pad.inside(residual, x.shape[2:])
    y = runtime.allocate_like(values)
    # A block for each set of statistics, as in the forward, whose bits are wanted.
    per_sample = mean.dim() == 2
    for i in range(x.shape[0] if per_sample else 1):
        block = slice(i, i + 1) if per_sample else slice(None)
        statistics = (mean[i], rstd[i]) if per_sample else (mean, rstd)
        addend = None if residual is None else residual[block]
        aten.apply(values[block], weight, bias, *statistics, addend, relu, out=y[block])
    return upsample_pad.place(y.to(x.dtype), place)


@_normalize.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    relu: bool,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
) -> Tensor:
    return runtime.allocate_like(x, Placement(upsample, tuple(padding), padding_mode).shape(x))


class _Norm(torch.autograd.Function):
    """A norm that keeps no result. Its node of the graph is what gives that back: `_value`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        residual_node: Any,
        running: tuple[Tensor, Tensor] | None,
        momentum: float,
        eps: float,
        relu: bool,
        place: _Place,
    ) -> Tensor:
        y: Tensor
        if running is None:
            y, mean, rstd = torch.ops.fastnst.instance_norm(x, weight, bias, residual, eps, relu, *place)
        else:
            y, mean, rstd, var = torch.ops.fastnst.batch_norm(x, weight, bias, [], residual, eps, relu, *place)
            update_running(*running, mean, var, x, momentum)
        ctx.relu, ctx.place = relu, place
        ctx.residual_like = None if residual is None else (residual.dtype, upsample_pad.border_around(residual, x))
        ctx.residual_node, ctx.value = residual_node, None
        ctx.save_for_backward(x, weight, bias, mean, rstd, residual if residual_node is None else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, residual = ctx.saved_tensors
        y = None
        if ctx.relu and runtime.implementation(x) == "reference":
            y = _value(ctx)
        elif ctx.relu and ctx.residual_node is not None:
            residual = _value(ctx.residual_node)
        ctx.value = None
        border = op.residual_border(ctx, ctx.needs_input_grad[3])
        arguments = (ctx.relu, *ctx.place, border)
        saved = (x, weight, bias, mean, rstd, residual if ctx.relu else None, y)
        if mean.dim() == 2:
            gradients = torch.ops.fastnst.instance_norm_backward(dy, *saved, *arguments)
        else:
            gradients = torch.ops.fastnst.batch_norm_backward(dy, *saved, False, *arguments)
        dx, d_weight, d_bias, d_residual = gradients
        d_residual = op.finish_residual_gradient(ctx, dy, d_residual, border, ctx.needs_input_grad[3])
        return dx, d_weight, d_bias, d_residual, None, None, None, None, None, None


def _value(node: Any) -> Tensor:
    """The result of the norm whose node of the graph this is, made again unless it is there."""
    if node.value is None:
        *saved, residual = node.saved_tensors
        if node.residual_node is not None:
            residual = _value(node.residual_node)
        node.value = torch.ops.fastnst.normalize(*saved, residual, node.relu, *node.place)
    value: Tensor = node.value
    return value


def _node(y: Tensor | None) -> Any:
    """The node that gives `y` back; None where y is anything but an untouched result of a norm of this module."""
    node: Any = None if y is None else y.grad_fn
    if y is None or getattr(node, "_forward_cls", None) is not _Norm:
        return None
    return node if node.version == y._version else None


class _Convolution(torch.autograd.Function):
    """A convolution that does not keep its input y, of which `node` is the node; None: of an y that it keeps."""

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
        if not transposed and winograd.pays(y, weight, stride, padding):
            return winograd.convolve(y, weight, bias, padding=padding)
        z: Tensor = torch.ops.aten.convolution(y, weight, bias, *ctx.options)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        y = kept[0] if kept else _value(ctx.node)
        gradients = _convolution_backward(dz, y, weight, ctx.bias_shape, ctx.options, list(ctx.needs_input_grad[:3]))
        return *gradients, None, None, None, None


def _convolution_backward(
    dz: Tensor, y: Tensor, weight: Tensor, bias_shape: list[int] | None, options: tuple[Any, ...], wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of y, weight and bias, as far as they are wanted."""
    (stride, _), (padding, _), _, transposed = options[:4]
    if not transposed and winograd.pays(y, weight, stride, padding):
        return (
            winograd.input_gradient(dz, weight, padding=padding) if wanted[0] else None,
            winograd.weight_gradient(y, dz, padding=padding) if wanted[1] else None,
            dz.sum((0, 2, 3)) if wanted[2] else None,
        )
    backward = torch.ops.aten.convolution_backward
    if not wanted[1] or not _prefers_planes(y, transposed=transposed):
        return tuple(backward(dz, y, weight, bias_shape, *options, wanted))
    dy = backward(dz, y, weight, None, *options, [True, False, False])[0] if wanted[0] else None
    # Any one of the three in NHWC would have all converted back.
    planes = _planes(dz), _planes(y), weight.contiguous()
    _, d_weight, d_bias = backward(*planes, bias_shape, *options, [False, True, wanted[2]])
    return dy, torch.empty_like(weight).copy_(d_weight), d_bias


def _prefers_planes(y: Tensor, *, transposed: bool) -> bool:
    """Whether the weight's gradient of a convolution of y is taken in NCHW.

    oneDNN takes it faster so than from NHWC, both copies included, and y's own gradient slower; in fp32 alone, and not
    that of a transposed convolution.
    """
    return y.device.type == "cpu" and y.dtype == torch.float32 and not transposed and not y.is_contiguous()


def _planes(x: Tensor) -> Tensor:
    """`[N, C, H, W]` in NCHW; matrix by matrix, which PyTorch transposes faster than a tensor of four dimensions."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    planes = x.new_empty(x.shape)
    for pixels, plane in zip(x.permute(0, 2, 3, 1), planes, strict=True):
        plane.flatten(1).copy_(pixels.flatten(0, 1).t())
    return planes


def recomputed_instance_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    upsample: int = 1,
    padding: int | Sequence[int] = 0,
    padding_mode: str = "reflect",
) -> Tensor:
    """`instance_norm`, with the same arguments, whose result `convolution` does not keep.

    Another op that takes the result keeps it as always. Without gradients, and under torch.compile, which decides
    itself what to compute twice, it is `instance_norm`.

    Raises:
        ValueError: as `instance_norm`.
    """
    if _is_plain():
        place: dict[str, Any] = {"upsample": upsample, "padding": padding, "padding_mode": padding_mode}
        return instance_norm(x, weight, bias, eps=eps, residual=residual, relu=relu, **place)
    checked = check_instance_norm(x, weight, bias, residual, upsample, padding, padding_mode)
    return _recomputed(x, weight, bias, residual, None, 0.0, eps, relu, checked)


def recomputed_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    upsample: int = 1,
    padding: int | Sequence[int] = 0,
    padding_mode: str = "reflect",
) -> Tensor:
    """`batch_norm` in training, as `recomputed_instance_norm` is `instance_norm`; the statistics move once.

    Raises:
        ValueError: as `batch_norm`.
    """
    running = (running_mean, running_var)
    if _is_plain():
        options: dict[str, Any] = {"upsample": upsample, "padding": padding, "padding_mode": padding_mode}
        options |= {"momentum": momentum, "eps": eps, "residual": residual, "relu": relu}
        return batch_norm(x, weight, bias, running_mean, running_var, training=True, **options)
    checked = check_batch_norm(x, weight, bias, *running, residual, True, upsample, padding, padding_mode)
    return _recomputed(x, weight, bias, residual, running, momentum, eps, relu, checked)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
) -> Tensor:
    """`conv2d` or `conv_transpose2d`, which keeps x for its backward unless a norm of this module made it.

    Args:
        x: `[N, in, H, W]`.
        weight: `[out, in, k, k]`; `[in, out, k, k]` where `transposed`.
        bias: `[out]`.
        stride: in both directions.
        padding: zeros around x; where `transposed` what is cut from the result.
        transposed: which of the two.

    Returns:
        `[N, out, H', W']`.
    """
    node = None if _is_plain() else _node(x)
    if node is not None:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and weight.dtype == torch.float32:
            dtype = torch.get_autocast_dtype(kind)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        # Else autocast converts x, and the copy is what the convolution would keep.
        if x.dtype == weight.dtype:
            result: Tensor = _Convolution.apply(x, weight, bias, node, stride, padding, transposed)
            return result
    elif not _is_plain() and _prefers_planes(x, transposed=transposed) and x.dtype == weight.dtype and not _casts(x):
        own: Tensor = _Convolution.apply(x, weight, bias, None, stride, padding, transposed)
        return own
    if transposed:
        return F.conv_transpose2d(x, weight, bias, stride, padding)
    tracked = torch.compiler.is_compiling() or torch.is_grad_enabled()
    if not tracked and winograd.pays(x, weight, stride, padding) and not _casts(x):
        return winograd.convolve(x, weight, bias, padding=padding)
    return F.conv2d(x, weight, bias, stride, padding)


def _casts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _is_plain() -> bool:
    return torch.compiler.is_compiling() or not torch.is_grad_enabled()


def _recomputed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    y: Tensor = _Norm.apply(x, weight, bias, residual, _node(residual), *arguments)
    node: Any = y.grad_fn
    if node is not None:
        node.version = y._version
    return y
