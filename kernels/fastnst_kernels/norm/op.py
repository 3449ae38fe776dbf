"""The registered op pair behind both norms: `fastnst::norm` and `fastnst::norm_backward`.

`per_sample` tells instance norm (statistics `[N, C]`) from batch norm (`[C]`); the formulas are in `instance_norm.py`
and `batch_norm.py`. `pad` is the six numbers of `UpsamplePad.as_ints`.

Saved for the backward: x, μ, 1/√(σ² + ε) and, with both a residual and a ReLU, the residual. The ReLU's mask is
recomputed, except on the CPU, where a further pass costs more: there y is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.norm import aten, dispatch
from fastnst_kernels.norm.upsample_pad import (
    UpsamplePad,
    center_crop,
    margin,
    unpadded,
    upsample_pad,
    upsample_pad_adjoint,
    upsample_pad_reference,
)

Gradients = dispatch.Gradients


class NormOptions(TypedDict, total=False):
    """The keyword arguments that both norms share; see `instance_norm`."""

    eps: float
    residual: Tensor | None
    relu: bool
    upsample: int
    padding: int | Sequence[int]
    padding_mode: str


_OPTION_NAMES = tuple(NormOptions.__annotations__)


def pad_of(x: Tensor, options: NormOptions) -> UpsamplePad:
    """The upsampling and padding of a norm of x, checked; TypeError for an argument that the norms do not have."""
    for name in options:
        if name not in _OPTION_NAMES:
            raise TypeError(f"a norm got an unexpected keyword argument {name!r}; it takes {', '.join(_OPTION_NAMES)}")
    padding, mode = options.get("padding", 0), options.get("padding_mode", "reflect")
    return UpsamplePad.checked(x, options.get("upsample", 1), padding, mode)


def epilogue_reference(z: Tensor, x: Tensor, options: NormOptions) -> Tensor:
    """Residual, ReLU, upsampling and padding of z in differentiable PyTorch, in x's dtype."""
    residual = options.get("residual")
    if residual is not None:
        z = z + center_crop(residual, x.shape[2:])
    y = (z.relu() if options.get("relu") else z).to(x.dtype)
    return upsample_pad_reference(y, pad_of(x, options))


@torch.library.custom_op("fastnst::norm", mutates_args=())
def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Sequence[Tensor],
    residual: Tensor | None,
    per_sample: bool,
    eps: float,
    relu: bool,
    pad: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(y, mean, rstd, var)`; given `statistics` (mean, rstd) are used, and the last three are empty.

    var is empty for instance norm: only running statistics need it. They are updated outside, because an op that
    mutates its arguments cannot have a gradient.
    """
    x = runtime.dense(x)
    layout = UpsamplePad.from_ints(pad)
    var: Tensor | None
    if runtime.implementation(x) == "reference":
        residual = None if residual is None else center_crop(residual, x.shape[2:])
        options: dict[str, Any] = {"per_sample": per_sample, "eps": eps, "relu": relu}
        y, mean, rstd, var = aten.forward(x, weight, bias, statistics, residual, **options)
        y = upsample_pad(y, layout)
    else:
        residual = None if residual is None else runtime.dense(residual, like=x)
        arguments = dispatch.Arguments(weight, bias, residual, relu, layout)
        if statistics:
            y = dispatch.apply(x, arguments, *statistics)
        else:
            y, mean, rstd, var = dispatch.forward(x, arguments, per_sample=per_sample, eps=eps)
    if statistics:  # empty tensors, since the results of an op must not alias its arguments
        mean, rstd, var = (statistics[0].new_empty(0) for _ in range(3))
    return y, mean, rstd, mean.new_empty(0) if per_sample or var is None else var


@norm.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, statistics, _, per_sample, _, _, pad = rest
    y = runtime.allocate_like(x, UpsamplePad.from_ints(pad).shape(x))
    shape = (0,) if statistics else x.shape[:2] if per_sample else x.shape[1:2]
    mean, rstd = (x.new_empty(shape, dtype=runtime.statistics_dtype(x)) for _ in range(2))
    return y, mean, rstd, mean.new_empty(0 if per_sample else shape)


@torch.library.custom_op("fastnst::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    fixed: bool,
    relu: bool,
    pad: Sequence[int],
    residual_padding: int,
) -> Gradients:
    """`(dx, d_weight, d_bias, d_residual)`; `fixed` says that mean and rstd do not depend on x.

    With `relu`, dy counts where y is positive, if that is given, else where the recomputed z is. `residual_padding` is
    the residual's margin around x, or -1 if its gradient is not needed; then d_residual is empty.
    """
    assert not fixed or mean.dim() == 1, "per-sample statistics that are given have no gradient"
    x = runtime.dense(x)
    dy = runtime.dense(dy, like=x)
    layout = UpsamplePad.from_ints(pad)
    if runtime.implementation(x) == "triton":
        residual = None if residual is None else runtime.dense(residual, like=x)
        arguments = dispatch.Arguments(weight, bias, residual, relu, layout)
        return dispatch.backward(dy, x, arguments, mean, rstd, fixed=fixed, residual_padding=residual_padding)
    g = upsample_pad_adjoint(dy, layout)
    if relu:
        assert y is not None
        g = torch.ops.aten.threshold_backward(g, unpadded(y, layout, x.shape[2:]), 0)
    d_residual = g.new_empty(0)
    if residual_padding >= 0:
        d_residual = upsample_pad(g, UpsamplePad.zeros(residual_padding))
        if d_residual.untyped_storage().data_ptr() == dy.untyped_storage().data_ptr():
            d_residual = d_residual.clone()  # the results of an op must not alias its arguments
    dx, d_weight, d_bias = aten.backward(g, x, weight, bias, mean, rstd, fixed=fixed)
    return runtime.laid_out_like(dx, x), d_weight, d_bias, d_residual


@norm_backward.register_fake
def _(_dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Gradients:
    *_, residual_padding = rest
    d_residual = x.new_empty(0)
    if residual_padding >= 0:
        d_residual = runtime.allocate_like(x, UpsamplePad.zeros(residual_padding).shape(x))
    return runtime.allocate_like(x), torch.empty_like(weight), torch.empty_like(bias), d_residual


def save_options(ctx: Any, x: Tensor, residual: Tensor | None, relu: bool, pad: Sequence[int]) -> None:
    """What `gradients` reads from `ctx` beside the saved tensors."""
    ctx.relu, ctx.pad = relu, list(pad)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.residual_padding = 0 if residual is None else margin(residual, x)


def gradients(
    ctx: Any, dy: Tensor, saved: tuple[Tensor | None, ...], *, fixed: bool, needs_residual: bool
) -> tuple[Tensor | None, ...]:
    """`(dx, d_weight, d_bias, d_residual)` from (x, weight, bias, mean, rstd, residual, y)."""
    runtime.check_tensor("the gradient", dy)
    padding = ctx.residual_padding
    is_dy = padding == 0 and not ctx.relu and UpsamplePad.from_ints(ctx.pad).is_identity
    dx, d_weight, d_bias, d_residual = torch.ops.fastnst.norm_backward(
        dy, *saved, fixed, ctx.relu, ctx.pad, padding if needs_residual and not is_dy else -1
    )
    if not needs_residual:
        return dx, d_weight, d_bias, None
    return dx, d_weight, d_bias, (dy if is_dy else d_residual).to(ctx.residual_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, statistics, residual, _, _, relu, pad = inputs
    y, mean, rstd, _ = output
    save_options(ctx, x, residual, relu, pad)
    ctx.fixed = bool(statistics)
    if statistics:
        mean, rstd = statistics
    ctx.mark_non_differentiable(*output[1:])
    on_aten = runtime.implementation(x) == "reference"
    ctx.save_for_backward(
        x, weight, bias, mean, rstd, residual if relu and not on_aten else None, y if relu and on_aten else None
    )


def _backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    dx, d_weight, d_bias, d_residual = gradients(
        ctx, dy, ctx.saved_tensors, fixed=ctx.fixed, needs_residual=ctx.needs_input_grad[4]
    )
    return dx, d_weight, d_bias, [None, None] if ctx.fixed else [], d_residual, None, None, None, None


norm.register_autograd(_backward, setup_context=_setup_context)


def check_inputs(x: Tensor, residual: Tensor | None, eps: float, **per_channel: Tensor) -> None:
    """Raise ValueError unless x is a batch of images, `residual` and the `[C]` vectors fit it, and 0 ≤ eps < ∞."""
    runtime.check_images("x", x)
    runtime.check_number("eps", eps, 0.0)
    for name, value in per_channel.items():
        runtime.check_per_channel(name, value, x)
    runtime.check_residual(residual, x)
