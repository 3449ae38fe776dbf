"""Batch normalisation with affine, residual and ReLU in one op.

Source: Ioffe, Szegedy 2015, "Batch Normalization", algorithm 1; running statistics as in PyTorch.

Legend: N samples, C channels, M = N·H·W positions; sums run over all positions of one channel, m = momentum.

    training:   μ = Σx / M,  σ² = Σ(x − μ)² / M
                running_mean ← (1 − m)·running_mean + m·μ
                running_var  ← (1 − m)·running_var  + m·σ²·M / (M − 1)
    inference:  μ, σ² = running_mean, running_var
    x̂ = (x − μ) / √(σ² + ε)        z = x̂·w + b + residual        y = max(z, 0) with ReLU, else z

Backward, with g = dy·[z > 0] (g = dy without ReLU):

    d_bias = Σg      d_weight = Σ g·x̂      d_residual = g
    training:   dx = w / √(σ² + ε) · (g − Σg / M − x̂·Σ(g·x̂) / M)
    inference:  dx = w / √(σ² + ε) · g
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import normalization, normalization_aten, runtime


def batch_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The formula in differentiable PyTorch, statistics in fp32 (fp64 for fp64); same arguments as `batch_norm`."""
    values = x.to(runtime.statistics_dtype(x))
    if training:
        mean = values.mean((0, 2, 3))
        variance = (values - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    else:
        mean, variance = running_mean.to(values.dtype), running_var.to(values.dtype)
    rstd = (variance + eps).rsqrt()
    z = (values - mean.view(1, -1, 1, 1)) * (rstd * weight).view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    if residual is not None:
        z = z + residual
    return (z.relu() if relu else z).to(x.dtype)


def _backward_on_aten(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, batch_statistics: bool, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    values, g, weight, bias = (t.to(mean.dtype) for t in (x, dy, weight, bias))
    if relu:
        g = normalization_aten.masked(g, values, weight, bias, mean, rstd)
    dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
        g, values, weight, mean, rstd.pow(-2), mean, rstd, batch_statistics, 0.0, [True, True, True]
    )
    return dx.to(x.dtype), d_weight, d_bias


@torch.library.custom_op("fastnst::batch_norm_moments", mutates_args=("running_mean", "running_var"))
def _batch_norm_moments(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """μ and 1/√(σ² + ε) of this batch, `[C]`; moves the running statistics.

    An op of its own, because an op that changes its arguments cannot have a gradient: `fastnst::batch_norm`, which
    takes the result, has the whole one.
    """
    x = runtime.dense(x)
    if runtime.implementation(x) == "triton":
        running = (running_mean, running_var)
        return normalization.moments(x, per_sample=False, eps=eps, running=running, momentum=momentum)
    mean, variance = normalization_aten.moments(x.to(runtime.statistics_dtype(x)))
    count = x.numel() // x.shape[1]
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    return mean, variance.add_(eps).rsqrt_()


@_batch_norm_moments.register_fake
def _(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1:2], dtype=runtime.statistics_dtype(x))
    return mean, torch.empty_like(mean)


@torch.library.custom_op("fastnst::batch_norm", mutates_args=())
def _batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    batch_statistics: bool,
    relu: bool,
) -> Tensor:
    """y; `batch_statistics` says that mean and rstd are x's own, which the gradient must take into account."""
    x = runtime.dense(x)
    residual = None if residual is None else runtime.dense(residual, like=x)
    if runtime.implementation(x) == "triton":
        return normalization.apply(x, weight, bias, mean, rstd, residual, relu)
    values, weight, bias = (t.to(mean.dtype) for t in (x, weight, bias))
    y = runtime.allocate_like(values)
    normalization_aten.apply(values, weight, bias, mean, rstd, residual, relu, out=y)
    return y.to(x.dtype)


@_batch_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    batch_statistics: bool,
    relu: bool,
) -> Tensor:
    return runtime.allocate_like(x)


@torch.library.custom_op("fastnst::batch_norm_backward", mutates_args=())
def _batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, batch_statistics: bool, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dx, d_weight, d_bias)`; with `relu`, `dy` is masked where the recomputed z is not positive."""
    x = runtime.dense(x)
    dy = runtime.dense(dy, like=x)
    if runtime.implementation(x) == "reference":
        dx, d_weight, d_bias = _backward_on_aten(dy, x, weight, bias, mean, rstd, batch_statistics, relu)
    else:
        dx, sums = normalization.backward(dy, x, weight, bias, mean, rstd, relu, batch_statistics)
        d_bias, d_weight = sums
    return dx, d_weight.to(weight.dtype, copy=True), d_bias.to(bias.dtype, copy=True)


@_batch_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, batch_statistics: bool, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return runtime.allocate_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mean, rstd, residual, ctx.batch_statistics, relu = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    keep_y = relu and (residual is not None or runtime.implementation(x) == "reference")
    ctx.recompute = relu and not keep_y
    ctx.save_for_backward(x, weight, bias, mean, rstd, output if keep_y else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd, y = ctx.saved_tensors
    if y is not None:
        dy = torch.ops.aten.threshold_backward(dy, y, 0)
    dx, d_weight, d_bias = torch.ops.fastnst.batch_norm_backward(
        dy, x, weight, bias, mean, rstd, ctx.batch_statistics, ctx.recompute
    )
    d_residual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return dx, d_weight, d_bias, None, None, d_residual, None, None


torch.library.register_autograd("fastnst::batch_norm", _backward, setup_context=_setup_context)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`relu?((x − μ) / √(σ² + eps) · weight + bias + residual)`, μ and σ² per channel (Ioffe, Szegedy 2015).

    Args:
        x: `[N, C, H, W]`, float32, float16, bfloat16 (float64 on the reference path); any memory format.
        weight: `[C]`, float32 or x's dtype.
        bias: `[C]`, likewise.
        running_mean: `[C]`; in training it moves by `momentum` towards this batch's mean, in place.
        running_var: `[C]`; likewise, towards the unbiased variance.
        training: whether μ and σ² are this batch's (else the running ones).
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        residual: `[N, C, H, W]`, added after the affine map, before the ReLU.
        relu: whether negative values become 0.

    Returns:
        `[N, C, H, W]` in x's dtype and memory format.

    Raises:
        ValueError: shapes, dtypes or devices do not go together, or training on a single value per channel.
    """
    runtime.check_images("x", x)
    per_channel = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, value in per_channel.items():
        runtime.check_per_channel(name, value, x)
    runtime.check_residual(residual, x)
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: training needs more than one value per channel")
    if training:
        mean, rstd = torch.ops.fastnst.batch_norm_moments(x.detach(), running_mean, running_var, momentum, eps)
    else:
        dtype = runtime.statistics_dtype(x)
        mean, rstd = running_mean.to(dtype, copy=True), (running_var.to(dtype) + eps).rsqrt()
    y: Tensor = torch.ops.fastnst.batch_norm(x, weight, bias, mean, rstd, residual, training, relu)
    return y
