"""Instance normalisation with affine, residual and ReLU in one op.

Source: Ulyanov, Vedaldi, Lempitsky 2016, "Instance Normalization: The Missing Ingredient for Fast Stylization".

Legend: N samples, C channels, M = H·W positions; sums run over the positions of one (sample, channel).

    μ = Σx / M        σ² = Σ(x − μ)² / M        x̂ = (x − μ) / √(σ² + ε)
    z = x̂·w + b + residual                      y = max(z, 0) with ReLU, else z

Backward, with g = dy·[z > 0] (g = dy without ReLU):

    d_bias = Σ_n Σ g      d_weight = Σ_n Σ g·x̂      d_residual = g
    dx = w / √(σ² + ε) · (g − Σg / M − x̂·Σ(g·x̂) / M)

What is kept for the backward: x, μ and 1/√(σ² + ε). The ReLU's mask is recomputed from x, except where that costs more
than keeping y: on the CPU, whose passes are dear, and with a residual, which is not at hand any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import normalization, normalization_aten, runtime


def instance_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """The formula in differentiable PyTorch, statistics in fp32 (fp64 for fp64); same arguments as `instance_norm`."""
    values = x.to(runtime.statistics_dtype(x))
    centred = values - values.mean((2, 3), keepdim=True)
    rstd = (centred.square().mean((2, 3), keepdim=True) + eps).rsqrt()
    z = centred * rstd * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    if residual is not None:
        z = z + residual
    return (z.relu() if relu else z).to(x.dtype)


def _forward_on_aten(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.to(runtime.statistics_dtype(x))
    weight, bias = weight.to(values.dtype), bias.to(values.dtype)
    y = runtime.allocate_like(values)
    mean, rstd = runtime.allocate(x.shape[:2], values), runtime.allocate(x.shape[:2], values)
    for i in range(x.shape[0]):
        one = slice(i, i + 1)
        mean[i], variance = normalization_aten.moments(values[one])
        torch.rsqrt(variance + eps, out=rstd[i])
        addend = None if residual is None else residual[one]
        normalization_aten.apply(values[one], weight, bias, mean[i], rstd[i], addend, relu, out=y[one])
    return y.to(x.dtype), mean, rstd


def _backward_on_aten(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, y: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    values, grad, weight, bias = (t.to(mean.dtype) for t in (x, dy, weight, bias))
    dx = runtime.allocate_like(values)
    sum_g, sum_gx = runtime.allocate(mean.shape, mean), runtime.allocate(mean.shape, mean)
    for i in range(x.shape[0]):
        one = slice(i, i + 1)
        g = grad[one]
        if y is not None:
            g = torch.ops.aten.threshold_backward(g, y[one], 0)
        elif relu:
            g = normalization_aten.masked(g, values[one], weight, bias, mean[i], rstd[i])
        statistics = mean[i], rstd[i]
        sum_g[i], sum_gx[i] = normalization_aten.sums(g, values[one], *statistics)
        normalization_aten.input_gradient(g, values[one], weight, *statistics, sum_g[i], sum_gx[i], out=dx[one])
    return dx.to(x.dtype), sum_gx.sum(0), sum_g.sum(0)


@torch.library.custom_op("fastnst::instance_norm", mutates_args=())
def _instance_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, mean [N, C], rstd [N, C])`."""
    x = runtime.dense(x)
    residual = None if residual is None else runtime.dense(residual, like=x)
    if runtime.implementation(x) == "reference":
        return _forward_on_aten(x, weight, bias, residual, eps, relu)
    mean, rstd = normalization.moments(x, per_sample=True, eps=eps)
    return normalization.apply(x, weight, bias, mean, rstd, residual, relu), mean, rstd


@_instance_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=runtime.statistics_dtype(x))
    return runtime.allocate_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("fastnst::instance_norm_backward", mutates_args=())
def _instance_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, y: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dx, d_weight, d_bias)`; with `relu`, `dy` counts where y is positive; without y that is recomputed."""
    x = runtime.dense(x)
    dy = runtime.dense(dy, like=x)
    if runtime.implementation(x) == "reference":
        dx, d_weight, d_bias = _backward_on_aten(dy, x, weight, bias, mean, rstd, y, relu)
    else:
        dx, sums = normalization.backward(dy, x, weight, bias, mean, rstd, relu, True)
        d_bias, d_weight = sums.sum(1)
    return dx, d_weight.to(weight.dtype, copy=True), d_bias.to(bias.dtype, copy=True)


@_instance_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, y: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return runtime.allocate_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, _, ctx.relu = inputs
    y, mean, rstd = output
    ctx.residual_dtype = None if residual is None else residual.dtype
    keep_y = ctx.relu and (residual is not None or runtime.implementation(x) == "reference")
    ctx.save_for_backward(x, weight, bias, mean, rstd, y if keep_y else None)


def _backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd, y = ctx.saved_tensors
    relu, d_residual = ctx.relu, None
    if ctx.residual_dtype is not None:
        if relu:
            dy, y, relu = torch.ops.aten.threshold_backward(dy, y, 0), None, False
        d_residual = dy.to(ctx.residual_dtype)
    dx, d_weight, d_bias = torch.ops.fastnst.instance_norm_backward(dy, x, weight, bias, mean, rstd, y, relu)
    return dx, d_weight, d_bias, d_residual, None, None


torch.library.register_autograd("fastnst::instance_norm", _backward, setup_context=_setup_context)


def instance_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """`relu?((x − μ) / √(σ² + eps) · weight + bias + residual)`, μ and σ² per sample and channel (Ulyanov et al. 2016).

    Args:
        x: `[N, C, H, W]`, float32, float16, bfloat16 (float64 on the reference path); any memory format.
        weight: `[C]`, float32 or x's dtype.
        bias: `[C]`, likewise.
        eps: added to the variance.
        residual: `[N, C, H, W]`, added after the affine map, before the ReLU.
        relu: whether negative values become 0.

    Returns:
        `[N, C, H, W]` in x's dtype and memory format. With H·W = 1 it is `relu?(bias + residual)`.

    Raises:
        ValueError: shapes, dtypes or devices do not go together.
    """
    runtime.check_images("x", x)
    runtime.check_per_channel("weight", weight, x)
    runtime.check_per_channel("bias", bias, x)
    runtime.check_residual(residual, x)
    y: Tensor = torch.ops.fastnst.instance_norm(x, weight, bias, residual, eps, relu)[0]
    return y
