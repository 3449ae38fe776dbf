"""Instance normalisation with affine, residual, ReLU, upsampling and padding in one op.

Source: Ulyanov, Vedaldi, Lempitsky 2016, "Instance Normalization: The Missing Ingredient for Fast Stylization".

Legend: N samples, C channels, M = H·W positions; sums run over the positions of one (sample, channel).

    μ = Σx / M        σ² = Σ(x − μ)² / M        x̂ = (x − μ) / √(σ² + ε)
    z = x̂·w + b + residual                      a = max(z, 0) with ReLU, else z
    y = pad(upsample(a)), see `upsample_pad.py`; a itself by default

Backward, with g = upsample_padᵀ(dy)·[z > 0] (without the mask if there is no ReLU):

    d_bias = Σ_n Σ g      d_weight = Σ_n Σ g·x̂      d_residual = g
    dx = w / √(σ² + ε) · (g − Σg / M − x̂·Σ(g·x̂) / M)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.norm.op import NormOptions, check_inputs, epilogue_reference
from fastnst_kernels.norm.upsample_pad import UpsamplePad


def instance_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, **options: Unpack[NormOptions]) -> Tensor:
    """The formula in differentiable PyTorch, in fp32 (fp64 for fp64); arguments of `instance_norm`."""
    values = x.to(runtime.statistics_dtype(x))
    values = values - values[:, :, :1, :1].detach()  # changes nothing but rounding: a constant's mean is exact
    centred = values - values.mean((2, 3), keepdim=True)
    rstd = (centred.square().mean((2, 3), keepdim=True) + options.get("eps", 1e-5)).rsqrt()
    z = centred * rstd * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    return epilogue_reference(z, x, options)


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
    """`upsample_pad(relu?((x − μ) / √(σ² + eps) · weight + bias + residual))` (Ulyanov et al. 2016).

    μ and σ² are per sample and channel.

    Args:
        x: `[N, C, H, W]`, float32, float16, bfloat16 (float64 on the reference path); any memory format.
        weight: `[C]`, float32 or x's dtype.
        bias: `[C]`, likewise.
        eps: added to the variance, 0 or more.
        residual: `[N, C, H, W]`, added after the affine map, before the ReLU; or larger by the same margin at all four
            sides, which is cropped: an image that was padded for a convolution, for example.
        relu: whether negative values become 0.
        upsample: 2 repeats each pixel of the result twice in both directions (nearest neighbour).
        padding: pixels around the (upsampled) result, one number or (left, right, top, bottom), so that the next
            convolution can run unpadded.
        padding_mode: "reflect" mirrors about the border pixel, "symmetric" repeats it, too (for one pixel PyTorch's
            "replicate"), "zeros".

    Returns:
        `[N, C, upsample·H + top + bottom, upsample·W + left + right]` in x's dtype and memory format. With H·W = 1 it
        is `relu?(bias + residual)`, upsampled and padded.

    Raises:
        ValueError: shapes, dtypes or devices do not match, the padding is wider than what it mirrors, or eps is
            negative or not finite.
    """
    check_inputs(x, residual, eps, weight=weight, bias=bias)
    pad = UpsamplePad.checked(x, upsample, padding, padding_mode).as_ints()
    y: Tensor = torch.ops.fastnst.norm(x, weight, bias, [], residual, True, eps, relu, pad)[0]
    return y
