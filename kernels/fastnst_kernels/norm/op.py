"""What the gradients of both norms share: their fake results, and what becomes of the residual's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.norm.upsample_pad import Placement

# dx, d_weight, d_bias, d_residual
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def fake_gradients(x: Tensor, weight: Tensor, bias: Tensor, residual_border: int) -> Gradients:
    """The fake results of a norm's backward."""
    d_residual = x.new_empty(0)
    if residual_border >= 0:
        d_residual = runtime.allocate_like(x, Placement(1, (residual_border,) * 4, "zeros").shape(x))
    return runtime.allocate_like(x), torch.empty_like(weight), torch.empty_like(bias), d_residual


def residual_border(ctx: Any, needed: bool) -> int:
    """The border of the residual's gradient, or -1 if the backward need not write it, since it is dy itself."""
    if not needed:
        return -1
    border: int = ctx.residual_like[1]
    upsample, padding, mode = ctx.place
    placement = Placement(upsample, tuple(padding), mode)
    return border if border or ctx.relu or not placement.trivial else -1


def finish_residual_gradient(ctx: Any, dy: Tensor, d_residual: Tensor, border: int, needed: bool) -> Tensor | None:
    """The residual's gradient in its dtype."""
    if not needed:
        return None
    return (dy if border < 0 else d_residual).to(ctx.residual_like[0])
