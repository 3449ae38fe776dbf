"""Batch normalisation with affine, residual, ReLU, upsampling and padding in one op.

Source: Ioffe, Szegedy 2015, "Batch Normalization", algorithm 1; running statistics as in PyTorch.

Legend: N samples, C channels, M = N·H·W positions; sums run over all positions of one channel, m = momentum.

    training:   μ = Σx / M,  σ² = Σ(x − μ)² / M
                running_mean ← (1 − m)·running_mean + m·μ
                running_var  ← (1 − m)·running_var  + m·σ²·M / (M − 1)
    inference:  μ, σ² = running_mean, running_var
    x̂ = (x − μ) / √(σ² + ε)        z = x̂·w + b + residual        a = max(z, 0) with ReLU, else z
    y = pad(upsample(a)), see `upsample_pad.py`; a itself by default

Backward, with g = upsample_padᵀ(dy)·[z > 0] (without the mask if there is no ReLU):

    d_bias = Σg      d_weight = Σ g·x̂      d_residual = g
    training:   dx = w / √(σ² + ε) · (g − Σg / M − x̂·Σ(g·x̂) / M)
    inference:  dx = w / √(σ² + ε) · g
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.norm.op import NormOptions, check_inputs, epilogue_reference
from fastnst_kernels.norm.upsample_pad import UpsamplePad


def batch_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    **options: Unpack[NormOptions],
) -> Tensor:
    """The formula in differentiable PyTorch, in fp32 (fp64 for fp64); arguments of `batch_norm`."""
    values = x.to(runtime.statistics_dtype(x))
    if training:
        first = values[:1, :, :1, :1].detach()  # changes nothing but rounding: a constant's mean is exact
        mean = (values - first).mean((0, 2, 3)) + first.flatten()
        variance = (values - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        update_running(running_mean, running_var, mean.detach(), variance.detach(), x, momentum)
    else:
        mean, variance = running_mean.to(values.dtype), running_var.to(values.dtype)
    rstd = (variance + options.get("eps", 1e-5)).rsqrt()
    z = (values - mean.view(1, -1, 1, 1)) * (rstd * weight).view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    return epilogue_reference(z, x, options)


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, x: Tensor, momentum: float
) -> None:
    """Move the running statistics by `momentum` towards those of batch x, the variance made unbiased.

    Statistics of a narrower type than the batch's are mixed in the batch's and rounded once.
    """
    count = x.numel() // x.shape[1]
    for running, batch in ((running_mean, mean), (running_var, variance * (count / (count - 1)))):
        wide = torch.promote_types(running.dtype, batch.dtype)
        if running.dtype == wide:
            running.lerp_(batch.to(wide), momentum)
        else:
            running.copy_(running.to(wide).lerp_(batch, momentum))


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
    """`upsample_pad(relu?((x − μ) / √(σ² + eps) · weight + bias + residual))`, μ and σ² per channel.

    Ioffe, Szegedy 2015.

    Args:
        x: `[N, C, H, W]`, as for `instance_norm`; so are all arguments that are not listed here.
        running_mean: `[C]`; training moves it by `momentum` towards this batch's mean, in place, computed in fp32 (fp64
            for fp64) and rounded once.
        running_var: `[C]`; likewise, towards the unbiased variance.
        training: whether μ and σ² are this batch's (else the running ones).
        momentum: weight of this batch in the running statistics, 0 to 1.

    Returns:
        `[N, C, upsample·H + top + bottom, upsample·W + left + right]` in x's dtype and memory format.

    Raises:
        ValueError: shapes, dtypes or devices do not match, the padding is wider than what it mirrors, eps or momentum
            is out of range, or training has a single value per channel.
    """
    check_batch_inputs(x, weight, bias, running_mean, running_var, residual, eps, momentum, training=training)
    pad = UpsamplePad.checked(x, upsample, padding, padding_mode).as_ints()
    statistics = []
    if not training:
        dtype = runtime.statistics_dtype(x)
        statistics = [running_mean.to(dtype, copy=True), (running_var.to(dtype) + eps).rsqrt()]
    y: Tensor
    y, mean, _, var = torch.ops.fastnst.norm(x, weight, bias, statistics, residual, False, eps, relu, pad)
    if training:
        with torch.no_grad():
            update_running(running_mean, running_var, mean, var, x, momentum)
    return y


def check_batch_inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    eps: float,
    momentum: float,
    *,
    training: bool,
) -> None:
    """Raise ValueError unless the inputs match and training has more than one value per channel."""
    runtime.check_number("momentum", momentum, 0.0, 1.0)
    check_inputs(x, residual, eps, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: training needs more than one value per channel")
