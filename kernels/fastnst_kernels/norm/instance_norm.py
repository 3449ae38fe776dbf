"""Instance normalisation with affine, residual, ReLU, enlargement and border in one op.

Source: Ulyanov, Vedaldi, Lempitsky 2016, "Instance Normalization: The Missing Ingredient for Fast Stylization".

Legend: N samples, C channels, M = H·W positions; sums run over the positions of one (sample, channel).

    μ = Σx / M        σ² = Σ(x − μ)² / M        x̂ = (x − μ) / √(σ² + ε)
    z = x̂·w + b + residual                      a = max(z, 0) with ReLU, else z
    y = place(a): nearest ×2 enlargement and a border, see `placement.py`; a itself by default

Backward, with g = placeᵀ(dy)·[z > 0] (without the mask if there is no ReLU):

    d_bias = Σ_n Σ g      d_weight = Σ_n Σ g·x̂      d_residual = g
    dx = w / √(σ² + ε) · (g − Σg / M − x̂·Σ(g·x̂) / M)

What is kept for the backward: x, μ, 1/√(σ² + ε) and, with both a residual and a ReLU, the residual. The ReLU's mask is
recomputed, except on the CPU, whose passes are dear: there y is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.norm import aten, dispatch, op, upsample_pad
from fastnst_kernels.norm.upsample_pad import Placement


def instance_norm_reference(
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
    """The formula in differentiable PyTorch, statistics in fp32 (fp64 for fp64); same arguments as `instance_norm`."""
    values = x.to(runtime.statistics_dtype(x))
    centred = values - values.mean((2, 3), keepdim=True)
    rstd = (centred.square().mean((2, 3), keepdim=True) + eps).rsqrt()
    z = centred * rstd * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    if residual is not None:
        z = z + upsample_pad.inside(residual, x.shape[2:])
    y = (z.relu() if relu else z).to(x.dtype)
    return upsample_pad.place_reference(y, Placement(*upsample_pad.parse(x, upsample, padding, padding_mode)))


def _forward_on_aten(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.to(runtime.statistics_dtype(x))
    weight, bias = weight.to(values.dtype), bias.to(values.dtype)
    y = runtime.allocate_like(values)
    mean, rstd = runtime.allocate(x.shape[:2], values), runtime.allocate(x.shape[:2], values)
    for i in range(x.shape[0]):
        one = slice(i, i + 1)
        mean[i], variance = aten.moments(values[one])
        torch.rsqrt(variance + eps, out=rstd[i])
        addend = None if residual is None else residual[one]
        aten.apply(values[one], weight, bias, mean[i], rstd[i], addend, relu, out=y[one])
    return y.to(x.dtype), mean, rstd


def _backward_on_aten(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    values, grad, weight, bias = (t.to(mean.dtype) for t in (x, g, weight, bias))
    dx = runtime.allocate_like(values)
    sum_g, sum_gx = runtime.allocate(mean.shape, mean), runtime.allocate(mean.shape, mean)
    for i in range(x.shape[0]):
        one = slice(i, i + 1)
        statistics = mean[i], rstd[i]
        sum_g[i], sum_gx[i] = aten.sums(grad[one], values[one], *statistics)
        aten.input_gradient(grad[one], values[one], weight, *statistics, sum_g[i], sum_gx[i], out=dx[one])
    return dx.to(x.dtype), sum_gx.sum(0).to(weight.dtype), sum_g.sum(0).to(bias.dtype)


@torch.library.custom_op("fastnst::instance_norm", mutates_args=())
def _instance_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, mean [N, C], rstd [N, C])`."""
    x = runtime.dense(x)
    place = Placement(upsample, tuple(padding), padding_mode)
    if runtime.implementation(x) == "triton":
        residual = None if residual is None else runtime.dense(residual, like=x)
        return dispatch.forward(x, weight, bias, residual, place, per_sample=True, eps=eps, relu=relu)[:3]
    residual = None if residual is None else upsample_pad.inside(residual, x.shape[2:])
    y, mean, rstd = _forward_on_aten(x, weight, bias, residual, eps, relu)
    return upsample_pad.place(y, place), mean, rstd


@_instance_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=runtime.statistics_dtype(x))
    y = runtime.allocate_like(x, Placement(upsample, tuple(padding), padding_mode).shape(x))
    return y, mean, torch.empty_like(mean)


@torch.library.custom_op("fastnst::instance_norm_backward", mutates_args=())
def _instance_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    relu: bool,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
    residual_border: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(dx, d_weight, d_bias, d_residual)`.

    With `relu`, dy counts where y is positive, if that is given, else where the recomputed z is. `residual_border` is
    -1 if no gradient of the residual is asked for; then d_residual is empty.
    """
    x = runtime.dense(x)
    dy = runtime.dense(dy, like=x)
    place = Placement(upsample, tuple(padding), padding_mode)
    if runtime.implementation(x) == "triton":
        residual = None if residual is None else runtime.dense(residual, like=x)
        return dispatch.backward(
            dy, x, weight, bias, mean, rstd, residual, place, relu, constant=False, residual_border=residual_border
        )
    g = upsample_pad.place_adjoint(dy, place)
    if relu:
        assert y is not None
        g = torch.ops.aten.threshold_backward(g, upsample_pad.own_places(y, place, x.shape[2:]), 0)
    d_residual = aten.residual_gradient(g, dy, residual_border)
    return *_backward_on_aten(g, x, weight, bias, mean, rstd), d_residual


@_instance_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    relu: bool,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
    residual_border: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return op.fake_gradients(x, weight, bias, residual_border)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, _, ctx.relu, *ctx.place = inputs
    y, mean, rstd = output
    ctx.residual_like = None if residual is None else (residual.dtype, upsample_pad.border_around(residual, x))
    on_aten = runtime.implementation(x) == "reference"
    ctx.save_for_backward(
        x, weight, bias, mean, rstd, residual if ctx.relu and not on_aten else None, y if ctx.relu and on_aten else None
    )


def _backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd, residual, y = ctx.saved_tensors
    border = op.residual_border(ctx, ctx.needs_input_grad[3])
    dx, d_weight, d_bias, d_residual = torch.ops.fastnst.instance_norm_backward(
        dy, x, weight, bias, mean, rstd, residual, y, ctx.relu, *ctx.place, border
    )
    d_residual = op.finish_residual_gradient(ctx, dy, d_residual, border, ctx.needs_input_grad[3])
    return dx, d_weight, d_bias, d_residual, None, None, None, None, None


torch.library.register_autograd("fastnst::instance_norm", _backward, setup_context=_setup_context)


def instance_norm(
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
    """`place(relu?((x − μ) / √(σ² + eps) · weight + bias + residual))`, μ, σ² per sample and channel (Ulyanov 2016).

    Args:
        x: `[N, C, H, W]`, float32, float16, bfloat16 (float64 on the reference path); any memory format.
        weight: `[C]`, float32 or x's dtype.
        bias: `[C]`, likewise.
        eps: added to the variance.
        residual: `[N, C, H, W]`, added after the affine map, before the ReLU; or larger by the same border at all four
            sides, of which it counts what lies inside: a picture that was padded for a convolution, say.
        relu: whether negative values become 0.
        upsample: 2 repeats each pixel of the result twice in both directions (nearest neighbour).
        padding: border in pixels around the (enlarged) result, one number or (left, right, top, bottom), so that the
            next convolution can run unpadded.
        padding_mode: "reflect" mirrors about the border pixel, "symmetric" repeats that, too (for one pixel PyTorch's
            "replicate"), "zeros".

    Returns:
        `[N, C, upsample·H + top + bottom, upsample·W + left + right]` in x's dtype and memory format. With H·W = 1 it
        is `relu?(bias + residual)`, placed.

    Raises:
        ValueError: shapes, dtypes or devices do not go together, or the border is wider than what it mirrors.
    """
    place = check_instance_norm(x, weight, bias, residual, upsample, padding, padding_mode)
    y: Tensor = torch.ops.fastnst.instance_norm(x, weight, bias, residual, eps, relu, *place)[0]
    return y


def check_instance_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    upsample: int,
    padding: int | Sequence[int],
    padding_mode: str,
) -> tuple[int, tuple[int, ...], str]:
    """The arguments of the result's `Placement`, once all of `instance_norm`'s are found to go together.

    Raises:
        ValueError: they do not.
    """
    runtime.check_images("x", x)
    runtime.check_per_channel("weight", weight, x)
    runtime.check_per_channel("bias", bias, x)
    runtime.check_residual(residual, x)
    return upsample_pad.parse(x, upsample, padding, padding_mode)
