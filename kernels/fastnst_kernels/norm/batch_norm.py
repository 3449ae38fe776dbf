"""Batch normalisation with affine, residual, ReLU, enlargement and border in one op.

Source: Ioffe, Szegedy 2015, "Batch Normalization", algorithm 1; running statistics as in PyTorch.

Legend: N samples, C channels, M = N·H·W positions; sums run over all positions of one channel, m = momentum.

    training:   μ = Σx / M,  σ² = Σ(x − μ)² / M
                running_mean ← (1 − m)·running_mean + m·μ
                running_var  ← (1 − m)·running_var  + m·σ²·M / (M − 1)
    inference:  μ, σ² = running_mean, running_var
    x̂ = (x − μ) / √(σ² + ε)        z = x̂·w + b + residual        a = max(z, 0) with ReLU, else z
    y = place(a): nearest ×2 enlargement and a border, see `placement.py`; a itself by default

Backward, with g = placeᵀ(dy)·[z > 0] (without the mask if there is no ReLU):

    d_bias = Σg      d_weight = Σ g·x̂      d_residual = g
    training:   dx = w / √(σ² + ε) · (g − Σg / M − x̂·Σ(g·x̂) / M)
    inference:  dx = w / √(σ² + ε) · g

What is kept for the backward is what `instance_norm.py` keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.norm import aten, dispatch, op, upsample_pad
from fastnst_kernels.norm.upsample_pad import Placement


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
    upsample: int = 1,
    padding: int | Sequence[int] = 0,
    padding_mode: str = "reflect",
) -> Tensor:
    """The formula in differentiable PyTorch, statistics in fp32 (fp64 for fp64); same arguments as `batch_norm`."""
    values = x.to(runtime.statistics_dtype(x))
    if training:
        mean = values.mean((0, 2, 3))
        variance = (values - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        update_running(running_mean, running_var, mean.detach(), variance.detach(), x, momentum)
    else:
        mean, variance = running_mean.to(values.dtype), running_var.to(values.dtype)
    rstd = (variance + eps).rsqrt()
    z = (values - mean.view(1, -1, 1, 1)) * (rstd * weight).view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    if residual is not None:
        z = z + upsample_pad.inside(residual, x.shape[2:])
    y = (z.relu() if relu else z).to(x.dtype)
    return upsample_pad.place_reference(y, Placement(*upsample_pad.parse(x, upsample, padding, padding_mode)))


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, x: Tensor, momentum: float
) -> None:
    """Moves the running statistics by `momentum` towards this batch's, the variance made unbiased first."""
    count = x.numel() // x.shape[1]
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)


def _backward_on_aten(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, constant: bool
) -> tuple[Tensor, Tensor, Tensor]:
    values, grad, scale = (t.to(mean.dtype) for t in (x, g, weight))
    dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
        grad, values, scale, mean, rstd.pow(-2), mean, rstd, not constant, 0.0, [True, True, True]
    )
    return dx.to(x.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype)


@torch.library.custom_op("fastnst::batch_norm", mutates_args=())
def _batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    constants: Sequence[Tensor],
    residual: Tensor | None,
    eps: float,
    relu: bool,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(y, mean, rstd, var)`, all but y `[C]`; with `constants` (mean, rstd), of which y is made, they are empty.

    The running statistics move outside: an op that changes its arguments cannot have a gradient.
    """
    x = runtime.dense(x)
    place = Placement(upsample, tuple(padding), padding_mode)
    if runtime.implementation(x) == "triton":
        residual = None if residual is None else runtime.dense(residual, like=x)
        if constants:
            y = dispatch.apply(x, weight, bias, *constants, residual, place, relu)
            return y, *_nothing(constants[0])
        y, mean, rstd, var = dispatch.forward(x, weight, bias, residual, place, per_sample=False, eps=eps, relu=relu)
        assert var is not None
        return y, mean, rstd, var
    values = x.to(runtime.statistics_dtype(x))
    if constants:
        mean, rstd = constants
        saved = _nothing(mean)
    else:
        mean, var = aten.moments(values)
        rstd = (var + eps).rsqrt_()
        saved = (mean, rstd, var)
    weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    residual = None if residual is None else upsample_pad.inside(residual, x.shape[2:])
    y = runtime.allocate_like(values)
    aten.apply(values, weight, bias, mean, rstd, residual, relu, out=y)
    return upsample_pad.place(y.to(x.dtype), place), *saved


@_batch_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    constants: Sequence[Tensor],
    residual: Tensor | None,
    eps: float,
    relu: bool,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = runtime.allocate_like(x, Placement(upsample, tuple(padding), padding_mode).shape(x))
    mean = x.new_empty(0 if constants else x.shape[1], dtype=runtime.statistics_dtype(x))
    return y, mean, torch.empty_like(mean), torch.empty_like(mean)


def _nothing(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What stands for the statistics where none are computed: three tensors, since an op's results may not be one."""
    return like.new_empty(0), like.new_empty(0), like.new_empty(0)


@torch.library.custom_op("fastnst::batch_norm_backward", mutates_args=())
def _batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    constant: bool,
    relu: bool,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
    residual_border: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(dx, d_weight, d_bias, d_residual)`; `constant` says that mean and rstd do not depend on x.

    With `relu`, dy counts where y is positive, if that is given, else where the recomputed z is. `residual_border` is
    -1 if no gradient of the residual is asked for; then d_residual is empty.
    """
    x = runtime.dense(x)
    dy = runtime.dense(dy, like=x)
    place = Placement(upsample, tuple(padding), padding_mode)
    if runtime.implementation(x) == "triton":
        residual = None if residual is None else runtime.dense(residual, like=x)
        return dispatch.backward(
            dy, x, weight, bias, mean, rstd, residual, place, relu, constant=constant, residual_border=residual_border
        )
    g = upsample_pad.place_adjoint(dy, place)
    if relu:
        assert y is not None
        g = torch.ops.aten.threshold_backward(g, upsample_pad.own_places(y, place, x.shape[2:]), 0)
    d_residual = aten.residual_gradient(g, dy, residual_border)
    return *_backward_on_aten(g, x, weight, bias, mean, rstd, constant), d_residual


@_batch_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    constant: bool,
    relu: bool,
    upsample: int,
    padding: Sequence[int],
    padding_mode: str,
    residual_border: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return op.fake_gradients(x, weight, bias, residual_border)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, constants, residual, _, ctx.relu, *ctx.place = inputs
    y, mean, rstd, _ = output
    ctx.constant = bool(constants)
    if constants:
        mean, rstd = constants
    ctx.mark_non_differentiable(*output[1:])
    ctx.residual_like = None if residual is None else (residual.dtype, upsample_pad.border_around(residual, x))
    on_aten = runtime.implementation(x) == "reference"
    ctx.save_for_backward(
        x, weight, bias, mean, rstd, residual if ctx.relu and not on_aten else None, y if ctx.relu and on_aten else None
    )


def _backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, mean, rstd, residual, y = ctx.saved_tensors
    border = op.residual_border(ctx, ctx.needs_input_grad[4])
    dx, d_weight, d_bias, d_residual = torch.ops.fastnst.batch_norm_backward(
        dy, x, weight, bias, mean, rstd, residual, y, ctx.constant, ctx.relu, *ctx.place, border
    )
    d_residual = op.finish_residual_gradient(ctx, dy, d_residual, border, ctx.needs_input_grad[4])
    return dx, d_weight, d_bias, [None, None] if ctx.constant else [], d_residual, None, None, None, None, None


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
    upsample: int = 1,
    padding: int | Sequence[int] = 0,
    padding_mode: str = "reflect",
) -> Tensor:
    """`place(relu?((x − μ) / √(σ² + eps) · weight + bias + residual))`, μ and σ² per channel (Ioffe, Szegedy 2015).

    Args:
        x: `[N, C, H, W]`, float32, float16, bfloat16 (float64 on the reference path); any memory format.
        weight: `[C]`, float32 or x's dtype.
        bias: `[C]`, likewise.
        running_mean: `[C]`; in training it moves by `momentum` towards this batch's mean, in place.
        running_var: `[C]`; likewise, towards the unbiased variance.
        training: whether μ and σ² are this batch's (else the running ones).
        momentum: weight of this batch in the running statistics.
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
        `[N, C, upsample·H + top + bottom, upsample·W + left + right]` in x's dtype and memory format.

    Raises:
        ValueError: shapes, dtypes or devices do not go together, the border is wider than what it mirrors, or training
            on a single value per channel.
    """
    place = check_batch_norm(
        x, weight, bias, running_mean, running_var, residual, training, upsample, padding, padding_mode
    )
    constants = []
    if not training:
        dtype = runtime.statistics_dtype(x)
        constants = [running_mean.to(dtype, copy=True), (running_var.to(dtype) + eps).rsqrt()]
    y: Tensor
    y, mean, _, var = torch.ops.fastnst.batch_norm(x, weight, bias, constants, residual, eps, relu, *place)
    if training:
        with torch.no_grad():
            update_running(running_mean, running_var, mean, var, x, momentum)
    return y


def check_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    training: bool,
    upsample: int,
    padding: int | Sequence[int],
    padding_mode: str,
) -> tuple[int, tuple[int, ...], str]:
    """The arguments of the result's `Placement`, once all of `batch_norm`'s are found to go together.

    Raises:
        ValueError: they do not.
    """
    runtime.check_images("x", x)
    per_channel = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, value in per_channel.items():
        runtime.check_per_channel(name, value, x)
    runtime.check_residual(residual, x)
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: training needs more than one value per channel")
    return upsample_pad.parse(x, upsample, padding, padding_mode)
