"""The two norms on ATen's batch-norm kernels: what runs where Triton does not, above all in training on a CPU.

ATen's batch-norm kernels keep channels_last and make one pass per step, unlike `F.instance_norm`, which goes through
the contiguous format and back. They take a block of samples that share their statistics: all of them for batch norm,
one at a time for instance norm, which then stays in cache. The tests compare them with the `*_reference` formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnst_kernels.norm.upsample_pad import Placement, place


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance `[C]` over the samples and positions of `values [N, C, H, W]`, fp32 or fp64.

    The kernel adds up its mean naively, which costs digits where the mean is large beside the deviation. So the mean
    comes from `mean` (cascade summation), and the kernel's sum of squares about its own mean is moved to this one.
    """
    mean = values.mean((0, 2, 3))
    rough_mean, rough_variance = torch.batch_norm_update_stats(values, None, None, 0.0)
    return mean, (rough_variance - (rough_mean - mean).square_()).clamp_min_(0)


def apply(
    values: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    relu: bool,
    out: Tensor,
) -> None:
    """Writes `relu?((values − mean)·rstd·weight + bias + residual)` into `out`; all of one dtype, statistics `[C]`."""
    none = mean.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        values, weight, bias, mean, rstd.pow(-2), False, 0.0, 0.0, out=out, save_mean=none, save_invstd=none
    )
    if residual is not None:
        out.add_(residual)
    if relu:
        out.relu_()


def sums(g: Tensor, values: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """`Σg` and `Σ g·x̂`, both `[C]`, over the samples and positions of `values [N, C, H, W]`."""
    _, sum_gx, sum_g = torch.ops.aten.native_batch_norm_backward(
        g, values, None, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return sum_g, sum_gx


def input_gradient(
    g: Tensor, values: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, sum_g: Tensor, sum_gx: Tensor, out: Tensor
) -> None:
    """Writes `weight·rstd·(g − sum_g/M − x̂·sum_gx/M)` into `out`, as `values·β + γ + g·α` in two passes."""
    count = values.numel() // values.shape[1]
    alpha = weight * rstd
    beta = -alpha * rstd * sum_gx / count
    gamma = -alpha * sum_g / count - beta * mean
    torch.addcmul(_planes(gamma), values, _planes(beta), out=out).addcmul_(g, _planes(alpha))


def residual_gradient(g: Tensor, dy: Tensor, border: int) -> Tensor:
    """`g` with `border` zeros around it, never `g` itself, which may be the caller's dy; empty for a border of -1."""
    if border < 0:
        return g.new_empty(0)
    d_residual = place(g, Placement(1, (border,) * 4, "zeros"))
    shared = d_residual.untyped_storage().data_ptr() == dy.untyped_storage().data_ptr()
    return d_residual.clone() if shared else d_residual


def _planes(statistics: Tensor) -> Tensor:
    """`[C]` so that it broadcasts against `[N, C, H, W]`."""
    return statistics[:, None, None]
