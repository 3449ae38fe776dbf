"""Gram matrices of feature maps, and the style loss built on them.

Source: Johnson, Alahi, Fei-Fei 2016, "Perceptual Losses for Real-Time Style Transfer", equations 3 and 4.

Legend: N samples, C channels, K = H·W positions; F [K, C] the features of one sample, T [C, C] its target.

    G = FᵀF / (C·K)                loss = ‖D‖²_F,  D = G − T

Backward: dG enters through both factors of FᵀF, so

    dF = F (dG + dGᵀ) / (C·K)      and for the loss, with its gradient l: dG = 2·l·D, dT = −2·l·D

Both multiply F with a symmetric matrix: S = dG + dGᵀ, or D + Dᵀ, which the forward writes beside the loss as an operand
in the features' dtype. fp16 cannot hold every D, so S comes with a power of two per sample: D + Dᵀ = scale[n]·S[n]. For
the other dtypes the scale is 1.

Higher derivatives: dF is bilinear in F and dG, so for its own gradient V, V (dG + dGᵀ) / (C·K) goes to F and
(FᵀV + VᵀF) / (C·K) to dG, to any order; the loss then takes its gradient from that of G. Forward mode runs the formulas
in PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.gram.kernels import gram_on_triton
from fastnst_kernels.gram.product import product_on_triton, symmetrize_on_triton


class StyleMatrix(NamedTuple):
    """D + Dᵀ = scale[n]·values[n], the operand of a style loss's backward.

    Attributes:
        values: `[N, C, C]` in the features' dtype, symmetric.
        scale: `[N]` float32 (float64 for float64), a power of two.
    """

    values: Tensor
    scale: Tensor


def gram_matrix_reference(features: Tensor) -> Tensor:
    """The formula in differentiable PyTorch, in fp32 (fp64 for fp64); same argument as `gram_matrix`."""
    f = positions_by_channels(features.to(runtime.statistics_dtype(features)))
    return bmm(f.mT, f) / (f.shape[1] * f.shape[2])


def style_loss_reference(features: Tensor, target_gram: Tensor) -> Tensor:
    """The formula in differentiable PyTorch, in fp32 (fp64 for fp64); same arguments as `style_loss`."""
    return (gram_matrix_reference(features) - target_gram).square().sum((1, 2))


def style_matrix_reference(difference: Tensor, dtype: torch.dtype) -> StyleMatrix:
    """`StyleMatrix` of D = `difference [N, C, C]`, float32 (float64), for features of `dtype`."""
    matrix = difference + difference.mT
    exponent = torch.zeros(matrix.shape[0], dtype=torch.int32, device=matrix.device)
    if dtype == torch.float16:
        # Scale the largest element into [2¹⁴, 2¹⁵), far from both of fp16's ends; 2ᵉ and 2⁻ᵉ stay normal numbers.
        largest = torch.linalg.vector_norm(matrix, float("inf"), dim=(1, 2))
        exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent.sub_(15).clamp_(min=-126), exponent)
    scale = torch.ldexp(matrix.new_ones(matrix.shape[0]), exponent)
    return StyleMatrix((matrix / scale.view(-1, 1, 1)).to(dtype), scale)


def gram_product_reference(features: Tensor, matrix: StyleMatrix, factor: Tensor | None = None) -> Tensor:
    """`factor[n]·F (D + Dᵀ) / (C·H·W)` in fp32 (fp64 for fp64), `[N, C, H, W]`."""
    f = positions_by_channels(features.to(runtime.statistics_dtype(features)))
    scale = matrix.scale if factor is None else matrix.scale * factor
    product = bmm(f, matrix.values.to(f.dtype) * (scale / (f.shape[1] * f.shape[2])).view(-1, 1, 1))
    return product.mT.reshape(features.shape)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """The batched product in the operands' own type: autocast would use 16 bits, and fp16 would overflow."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def positions_by_channels(features: Tensor) -> Tensor:
    """`[N, C, H, W]` as `[N, H·W, C]`, a view for both memory formats."""
    if runtime.memory_format_of(features) == torch.channels_last:
        return features.permute(0, 2, 3, 1).flatten(1, 2)
    return features.flatten(2).mT


@torch.library.custom_op("fastnst::gram_matrix", mutates_args=())
def _gram_matrix(features: Tensor) -> Tensor:
    features = runtime.dense(features)
    if runtime.implementation(features) == "reference":
        return gram_matrix_reference(features)
    return gram_on_triton(features, None)[0]


@_gram_matrix.register_fake
def _(features: Tensor) -> Tensor:
    n, c = features.shape[:2]
    return features.new_empty((n, c, c), dtype=runtime.statistics_dtype(features))


@torch.library.custom_op("fastnst::style_loss", mutates_args=())
def _style_loss(features: Tensor, target_gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss [N], values [N, C, C], scale [N])`: the loss and its `StyleMatrix`."""
    features = runtime.dense(features)
    if runtime.implementation(features) == "reference":
        difference = gram_matrix_reference(features).sub_(target_gram)
        loss = torch.linalg.vector_norm(difference, dim=2).square_().sum(1)  # by rows, which rounds less
        return loss, *style_matrix_reference(difference, features.dtype)
    values, scale, loss = gram_on_triton(features, target_gram.contiguous())
    assert scale is not None
    assert loss is not None
    return loss, values, scale


@_style_loss.register_fake
def _(features: Tensor, target_gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, c = features.shape[:2]
    loss = features.new_empty((n,), dtype=runtime.statistics_dtype(features))
    return loss, features.new_empty((n, c, c)), torch.empty_like(loss)


@torch.library.custom_op("fastnst::gram_backward", mutates_args=())
def _gram_backward(features: Tensor, d_gram: Tensor) -> Tensor:
    """`F (dG + dGᵀ) / (C·H·W)` for `d_gram [N, C, C]`, in the features' dtype and memory format."""
    features, d_gram = runtime.dense(features), d_gram.contiguous()
    if runtime.implementation(features) == "reference":
        # In fp32 throughout, so the operand is not rounded.
        matrix = style_matrix_reference(d_gram, d_gram.dtype)
        return runtime.allocate_like(features).copy_(gram_product_reference(features, matrix))
    values, scale = symmetrize_on_triton(d_gram, features.dtype)
    return product_on_triton(features, values, scale, None, 1 / features[0].numel())


@_gram_backward.register_fake
def _(features: Tensor, d_gram: Tensor) -> Tensor:
    return runtime.allocate_like(features)


@torch.library.custom_op("fastnst::style_backward", mutates_args=())
def _style_backward(features: Tensor, values: Tensor, scale: Tensor, d_loss: Tensor) -> Tensor:
    """`2·d_loss[n]·F (D + Dᵀ) / (C·H·W)` for the `StyleMatrix` (values, scale), like `features`."""
    features, d_loss = runtime.dense(features), d_loss.contiguous()
    if runtime.implementation(features) == "triton":
        return product_on_triton(features, values.contiguous(), scale, d_loss, 2 / features[0].numel())
    product = gram_product_reference(features, StyleMatrix(values, scale), 2 * d_loss)
    return runtime.allocate_like(features).copy_(product)


@_style_backward.register_fake
def _(features: Tensor, values: Tensor, scale: Tensor, d_loss: Tensor) -> Tensor:
    return runtime.allocate_like(features)


def _setup_gram_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gram_autograd(ctx: Any, d_gram: Tensor) -> Tensor:
    return _gram_gradient(ctx.saved_tensors[0], d_gram)


def _gram_gradient(features: Tensor, d_gram: Tensor) -> Tensor:
    """`F (dG + dGᵀ) / (C·H·W)`, differentiable in any mode."""
    if runtime.has_tangent(features) or runtime.has_tangent(d_gram):
        matrix = StyleMatrix(d_gram + d_gram.mT, d_gram.new_ones(d_gram.shape[0]))
        return gram_product_reference(features, matrix).to(features.dtype)
    d_features: Tensor = torch.ops.fastnst.gram_backward(features, d_gram)
    return d_features


def _setup_gram_backward_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gram_backward_autograd(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
    features, d_gram = ctx.saved_tensors
    f, g = (positions_by_channels(x.to(d_gram.dtype)) for x in (features, v))
    product = bmm(f.mT, g) / features[0].numel()
    return _gram_gradient(v, d_gram), product + product.mT


def _setup_style_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _style_autograd(
    ctx: Any, d_loss: Tensor, _values: Tensor | None, _scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    features, target, values, scale = ctx.saved_tensors
    d_features = d_target = None
    if torch.is_grad_enabled() or runtime.has_tangent(d_loss):  # for a second derivative, in which D depends on F, too
        d_gram = 2 * d_loss.view(-1, 1, 1) * (torch.ops.fastnst.gram_matrix(features) - target)
        d_target = -d_gram.sum(0) if target.dim() == 2 else -d_gram
        return _gram_gradient(features, d_gram), d_target
    if ctx.needs_input_grad[0]:
        d_features = torch.ops.fastnst.style_backward(features, values, scale, d_loss)
    if ctx.needs_input_grad[1]:
        # Rarely needed, so D is not saved for it, and S alone does not tell D from Dᵀ.
        difference = torch.ops.fastnst.gram_matrix(features) - target
        d_target = -2 * d_loss.view(-1, 1, 1) * difference
        d_target = d_target.sum(0) if target.dim() == 2 else d_target
    return d_features, d_target


torch.library.register_autograd("fastnst::gram_matrix", _gram_autograd, setup_context=_setup_gram_context)
torch.library.register_autograd(
    "fastnst::gram_backward", _gram_backward_autograd, setup_context=_setup_gram_backward_context
)
torch.library.register_autograd("fastnst::style_loss", _style_autograd, setup_context=_setup_style_context)


def gram_matrix(features: Tensor) -> Tensor:
    """`G[c, c'] = Σ_hw F[c, hw]·F[c', hw] / (C·H·W)` of each sample (Johnson et al. 2016, equation 3).

    Args:
        features: `[N, C, H, W]`, float32, float16, bfloat16 (float64 on the reference path); any memory format.

    Returns:
        `[N, C, C]` float32 (float64 for float64), summed in that type whatever the features' own. Products of float32
        features are float32's own, or TF32's where `torch.backends.cuda.matmul` asks for it.

    Raises:
        ValueError: `features` is not a non-empty floating `[N, C, H, W]`.
    """
    runtime.check_images("features", features, tangent=True)
    if runtime.has_tangent(features):
        return gram_matrix_reference(features)
    gram: Tensor = torch.ops.fastnst.gram_matrix(features)
    return gram


def style_loss(features: Tensor, target_gram: Tensor) -> Tensor:
    """`‖gram_matrix(features) − target_gram‖²_F` of each sample (Johnson et al. 2016, equation 4).

    Args:
        features: `[N, C, H, W]`, float32, float16, bfloat16 (float64 on the reference path); any memory format.
        target_gram: `[C, C]`, one for all samples, or `[N, C, C]`; float32 (float64 for float64).

    Returns:
        `[N]` float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    _check_target(features, target_gram, tangent=True)
    if runtime.has_tangent(features) or runtime.has_tangent(target_gram):
        return style_loss_reference(features, target_gram)
    loss: Tensor = torch.ops.fastnst.style_loss(features, target_gram)[0]
    return loss


@torch.no_grad()
def style_loss_and_matrix(features: Tensor, target_gram: Tensor) -> tuple[Tensor, StyleMatrix]:
    """`style_loss` and the operand of its backward, for callers without autograd.

    Arguments as for `style_loss`.

    Returns:
        The loss `[N]` and the `StyleMatrix` of D = gram_matrix(features) − target_gram, both without a gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    _check_target(features, target_gram)
    loss, values, scale = torch.ops.fastnst.style_loss(features, target_gram)
    return loss, StyleMatrix(values, scale)


def _check_target(features: Tensor, target_gram: Tensor, *, tangent: bool = False) -> None:
    runtime.check_images("features", features, tangent=tangent)
    runtime.check_tensor("target_gram", target_gram, tangent=tangent)
    n, c = features.shape[:2]
    if tuple(target_gram.shape) not in ((c, c), (n, c, c)):
        raise ValueError(
            f"target_gram has shape {tuple(target_gram.shape)}, expected ({c}, {c}) or ({n}, {c}, {c}): "
            f"features are {tuple(features.shape)}"
        )
    wanted = runtime.statistics_dtype(features)
    if target_gram.dtype != wanted:
        raise ValueError(f"target_gram is {target_gram.dtype}, expected {wanted} for {features.dtype} features")
    runtime.check_same_device("target_gram", target_gram, "features", features)
