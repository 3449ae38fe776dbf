"""Both norms on ATen's batch-norm kernels: the path without Triton, which trains on a CPU.

ATen's batch-norm kernels keep channels_last and make one pass per step, unlike `F.instance_norm`, which goes through
the contiguous format and back. They take a block of samples that share their statistics: all samples for batch norm,
one at a time for instance norm, which then stays in cache. The tests compare them with the `*_reference` formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime


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
            mean[group], var[group] = _moments(values[samples])
            torch.rsqrt(var[group] + eps, out=rstd[group])
        addend = None if residual is None else residual[samples]
        _apply(values[samples], weight, bias, mean[group], rstd[group], addend, relu, out=y[samples])
    return y.to(x.dtype), mean, rstd, var


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
        sum_g[n], sum_gx[n] = _sums(grad[samples], values[samples], mean[n], rstd[n])
        _input_gradient(grad[samples], values[samples], scale, mean[n], rstd[n], sum_g[n], sum_gx[n], out=dx[samples])
    return dx.to(x.dtype), sum_gx.sum(0).to(weight.dtype), sum_g.sum(0).to(bias.dtype)


def _blocks(x: Tensor, per_sample: bool) -> Iterator[tuple[slice, Any]]:
    """The samples that share statistics, and the index of these."""
    if per_sample:
        yield from ((slice(n, n + 1), n) for n in range(x.shape[0]))
    else:
        yield slice(None), ...


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance `[C]` over samples and positions of `values [N, C, H, W]`, fp32 or fp64.

    The kernel adds up its mean naively, which costs digits if the mean is large beside the deviation. So the mean comes
    from `mean` (cascade summation), and the kernel's sum of squares about its own mean is moved to this one.
    """
    mean = values.mean((0, 2, 3))
    rough_mean, rough_variance = torch.batch_norm_update_stats(values, None, None, 0.0)
    return mean, (rough_variance - (rough_mean - mean).square_()).clamp_min_(0)


def _apply(
    values: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    relu: bool,
    out: Tensor,
) -> None:
    """Write `relu?((values − mean)·rstd·weight + bias + residual)` into `out`; statistics are `[C]`."""
    none = mean.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        values, weight, bias, mean, rstd.pow(-2), False, 0.0, 0.0, out=out, save_mean=none, save_invstd=none
    )
    if residual is not None:
        out.add_(residual)
    if relu:
        out.relu_()


def _sums(g: Tensor, values: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """`Σg` and `Σ g·x̂`, both `[C]`, over the samples and positions of `values [N, C, H, W]`."""
    _, sum_gx, sum_g = torch.ops.aten.native_batch_norm_backward(
        g, values, None, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return sum_g, sum_gx


def _input_gradient(
    g: Tensor,
    values: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor,
    out: Tensor,
) -> None:
    """Write `weight·rstd·(g − sum_g/M − x̂·sum_gx/M)` into `out`, as `values·β + γ + g·α` in two passes."""
    count = values.numel() // values.shape[1]
    alpha = weight * rstd
    beta = -alpha * rstd * sum_gx / count
    gamma = -alpha * sum_g / count - beta * mean
    alpha, beta, gamma = (statistics[:, None, None] for statistics in (alpha, beta, gamma))
    torch.addcmul(gamma, values, beta, out=out).addcmul_(g, alpha)
