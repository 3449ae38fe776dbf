"""Both norms on ATen's batch-norm kernels: the path without Triton, which trains on a CPU.

ATen's batch-norm kernels keep channels_last and make one pass per step, unlike `F.instance_norm`, which goes through
the contiguous format and back. They take a block of samples that share their statistics: all samples for batch norm,
one at a time for instance norm, which then stays in cache. The tests compare them with the `*_reference` formulas.

The kernels round the mean, and map as x·α + β, which leaves about 10⁻⁷·|μ|/√(σ² + ε) of a group whose values are all
the same. Such groups are looked for, at the price of a few operations on the statistics, and get σ² = 0 and x̂ = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime

_MEAN_ERROR = 2.0**-16
"""More than cascade summation misses the mean of equal values by, in parts of it."""
# Positions of an image above which its moments are those of blocks, merged; and of a block, which is summed naively.
_LARGE_IMAGE = 2**20
_BLOCK_POSITIONS = 2**18


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Sequence[Tensor],
    residual: Tensor | None,
    *,
    per_sample: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(y, mean, rstd, var)` without upsampling and padding; given `statistics` (mean, rstd) are used.

    mean, rstd and var are `[N, C]` (`per_sample`) or `[C]`; var is empty if statistics are given.
    """
    values = x.to(runtime.statistics_dtype(x))
    weight, bias = weight.to(values.dtype), bias.to(values.dtype)
    y = runtime.allocate_like(values)
    shape = x.shape[:2] if per_sample else x.shape[1:2]
    mean, rstd = statistics or (runtime.allocate(shape, values), runtime.allocate(shape, values))
    var = runtime.allocate((0,) if statistics else shape, values)
    for samples, group in _blocks(x, per_sample):
        if not statistics:
            mean[group], var[group] = _moments_in_blocks(values[samples])
            torch.rsqrt(var[group] + eps, out=rstd[group])
        out, unused = y[samples], mean.new_empty(0)
        affine = (weight, bias, mean[group], rstd[group].pow(-2))
        torch.ops.aten.native_batch_norm.out(
            values[samples], *affine, False, 0.0, 0.0, out=out, save_mean=unused, save_invstd=unused
        )
        if residual is not None:
            out.add_(residual[samples])
        if relu:
            out.relu_()
    constant = _constant(values, mean, exact=bool(statistics))
    if constant is not None:
        z = bias.view(1, -1, 1, 1) if residual is None else bias.view(1, -1, 1, 1) + residual
        y.copy_(torch.where(constant, z.relu() if relu else z, y))
        if not statistics:
            of_group = constant.view(shape)
            mean = torch.where(of_group, values[: len(constant), :, 0, 0].view(shape), mean)
            var = var.masked_fill(of_group, 0)
            rstd = (var + eps).rsqrt()
    return y.to(x.dtype), mean, rstd, var


def _constant(values: Tensor, mean: Tensor, *, exact: bool) -> Tensor | None:
    """Which groups hold a single number, and that one the mean, up to rounding unless `exact`; None if none does.

    Bool, `[N, C, 1, 1]` for a mean `[N, C]`, `[1, C, 1, 1]` for `[C]`. All values are read only if a group's first one
    is like its mean, or on another device than a CPU, which would have to be waited for.
    """
    first = values[: len(mean) if mean.dim() == 2 else 1, :, :1, :1]
    center = mean.view(first.shape)
    near = first == center if exact else (first - center).abs_() <= _MEAN_ERROR * center.abs()
    if values.device.type == "cpu" and not near.any():
        return None
    return near & (values == first).all((2, 3) if mean.dim() == 2 else (0, 2, 3), keepdim=True)


def backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, *, fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dx, d_weight, d_bias)` for the gradient g of the affine map's result.

    `fixed` says that mean and rstd are constants; only for statistics per channel `[C]`.
    """
    values, grad, scale = (t.to(mean.dtype) for t in (x, g, weight))
    if mean.dim() == 1:
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            grad, values, scale, mean, rstd.pow(-2), mean, rstd, not fixed, 0.0, [True, True, True]
        )
        return dx.to(x.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype)
    dx = runtime.allocate_like(values)
    sum_g, sum_gx = runtime.allocate(mean.shape, mean), runtime.allocate(mean.shape, mean)
    for samples, n in _blocks(x, per_sample=True):
        block, own = (grad[samples], values[samples]), (mean[n], rstd[n])
        _, sum_gx[n], sum_g[n] = torch.ops.aten.native_batch_norm_backward(
            *block, None, None, None, *own, True, 0.0, [False, True, True]
        )
        # w·r·(g − Σg/M − x̂·Σ(g·x̂)/M) as x·β + γ + g·α, in two passes.
        count = block[1].numel() // x.shape[1]
        alpha = scale * rstd[n]
        beta = -alpha * rstd[n] * sum_gx[n] / count
        gamma = -alpha * sum_g[n] / count - beta * mean[n]
        alpha, beta, gamma = (vector[:, None, None] for vector in (alpha, beta, gamma))
        torch.addcmul(gamma, block[1], beta, out=dx[samples]).addcmul_(block[0], alpha)
    return dx.to(x.dtype), sum_gx.sum(0).to(weight.dtype), sum_g.sum(0).to(bias.dtype)


def _blocks(x: Tensor, per_sample: bool) -> Iterator[tuple[slice, Any]]:
    """The samples that share statistics, and the index of these."""
    if per_sample:
        yield from ((slice(n, n + 1), n) for n in range(x.shape[0]))
    else:
        yield slice(None), ...


def _moments_in_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """`_moments`; of a large image by blocks, since naive sums over millions of values lose digits."""
    samples, _, height, width = values.shape
    if samples > 1 or height * width <= _LARGE_IMAGE:
        return _moments(values)
    blocks = values.split(max(1, _BLOCK_POSITIONS // width), dim=2)
    weights = values.new_tensor([block.shape[2] / height for block in blocks], dtype=torch.float64)[:, None]
    means, variances = (torch.stack(parts).double() for parts in zip(*map(_moments, blocks), strict=True))
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean).square())).sum(0)
    return mean.to(values.dtype), variance.to(values.dtype)


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance `[C]` over samples and positions of `values [N, C, H, W]`, fp32 or fp64.

    The kernel adds up its mean naively, which costs digits if the mean is large beside the deviation. So the mean comes
    from `mean` (cascade summation), and the kernel's sum of squares about its own mean is moved to this one, by a
    finite amount, so that squares that overflow stay infinite.
    """
    mean = values.mean((0, 2, 3))
    rough_mean, rough_variance = torch.batch_norm_update_stats(values, None, None, 0.0)
    moved = (rough_mean - mean).square_().clamp_max_(torch.finfo(mean.dtype).max)
    return mean, (rough_variance - moved).clamp_min_(0)
