# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""The gradient at a layer with losses: incoming, style and content terms, through the ReLU.

Legend: N samples, C channels, K = H·W positions; F = max(z, 0) the layer's output [N, C, H, W], read as [K, C] per
sample in products; I the gradient of the layers above; D the difference of a style loss ‖D‖²_F, D = FᵀF/(C·K) − T; X
the content features. With s and c numbers per sample:

    dz = [F > 0] · (I + s·F (D + Dᵀ) / (C·K) + c·(F − X))

Each term is a gradient with respect to F: l·‖D‖² has s = 2·l (see `style_loss.py`), l·‖F − X‖² has c = 2·l; their sum
passes the ReLU once. The mask is PyTorch's: dz = 0 where F ≤ 0, even if a term is NaN there; where F is positive or NaN
it is the sum with all its NaN and Inf. Nothing is multiplied by the mask, which would turn Inf into NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.gram.kernels import alignment
from fastnst_kernels.gram.product import product_on_triton
from fastnst_kernels.gram.style_loss import StyleMatrix, gram_product_reference
from fastnst_kernels.runtime import ceil_div, jit, tl


def loss_relu_backward_reference(features: Tensor, **terms: Any) -> Tensor:
    """The formula in PyTorch, in fp32 (fp64 for fp64); same arguments as `loss_relu_backward`."""
    total = _sum_of_terms(features, **terms)
    masked: Tensor = torch.ops.aten.threshold_backward(total, features.to(total.dtype), 0)
    return masked.to(features.dtype)


def _sum_of_terms(
    features: Tensor,
    incoming: Tensor | None = None,
    style_matrix: StyleMatrix | None = None,
    style_factor: Tensor | None = None,
    content_target: Tensor | None = None,
    content_factor: Tensor | None = None,
) -> Tensor:
    """The formula without its mask, in new memory that is added to in place."""
    wide = runtime.statistics_dtype(features)
    if style_matrix is not None:
        total = gram_product_reference(features, style_matrix, style_factor)
        total = total if incoming is None else total.add_(incoming)
    else:
        total = torch.zeros_like(features, dtype=wide) if incoming is None else incoming.to(wide, copy=True)
    if content_target is not None and content_factor is not None:
        total.addcmul_(features.to(wide) - content_target, content_factor.view(-1, 1, 1, 1))
    return total


@jit
def _loss_relu_kernel(
    features, incoming, content_target, content_factor, result, size, n_blocks,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """result = [F > 0]·(incoming + content_factor[n]·(F − content_target)), without terms that are None.

    Grid: N × blocks of a sample's `size` = C·K elements. Moves E in for F and for each term and E out, which is the
    minimum, in accesses of 16 bytes if ALIGN = 8; a thread has two of each operand in flight.
    """
    size = tl.cast(size, tl.int64) // ALIGN * ALIGN  # exact; lets the compiler see the alignment of samples
    pid = tl.program_id(0)
    i_n = (pid // n_blocks).to(tl.int64)
    o_first = (pid % n_blocks).to(tl.int64) * BLOCK
    o_e = tl.arange(0, BLOCK)
    m_e = o_e < size - o_first
    o_first += i_n * size
    b_features = tl.load(features + o_first + o_e, mask=m_e, other=0.0)
    b_sum = tl.zeros([BLOCK], tl.float32)
    if incoming is not None:
        b_sum += tl.load(incoming + o_first + o_e, mask=m_e, other=0.0).to(tl.float32)
    if content_target is not None:
        b_target = tl.load(content_target + o_first + o_e, mask=m_e, other=0.0).to(tl.float32)
        b_sum += (b_features.to(tl.float32) - b_target) * tl.load(content_factor + i_n)
    tl.store(result + o_first + o_e, tl.where(b_features <= 0.0, 0.0, b_sum), mask=m_e)


@runtime.launches_on_its_device
def _loss_relu_on_triton(
    features: Tensor, incoming: Tensor | None, content_target: Tensor | None, content_factor: Tensor | None
) -> Tensor:
    n, size = features.shape[0], features[0].numel()
    block = 2048 if features.element_size() == 2 else 1024
    n_blocks = ceil_div(size, block)
    result = runtime.allocate_like(features)
    _loss_relu_kernel[(n * n_blocks,)](
        features, incoming, content_target, content_factor, result, size, n_blocks,
        ALIGN=alignment(size), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return result


@torch.library.custom_op("fastnst::loss_relu_backward", mutates_args=())
def _loss_relu_backward(
    features: Tensor,
    incoming: Tensor | None,
    style_values: Tensor | None,
    style_scale: Tensor | None,
    style_factor: Tensor | None,
    content_target: Tensor | None,
    content_factor: Tensor | None,
) -> Tensor:
    features = runtime.dense(features)
    incoming, content_target = (
        None if x is None else runtime.dense(x, like=features) for x in (incoming, content_target)
    )
    content_factor = None if content_factor is None else content_factor.contiguous()
    if runtime.implementation(features) == "reference":
        matrix = None
        if style_values is not None and style_scale is not None:
            matrix = StyleMatrix(style_values, style_scale)
        total = _sum_of_terms(features, incoming, matrix, style_factor, content_target, content_factor)
        torch.ops.aten.threshold_backward.grad_input(total, features.to(total.dtype), 0, grad_input=total)
        return runtime.laid_out_like(total.to(features.dtype), features)
    if style_values is None or style_scale is None or style_factor is None:
        return _loss_relu_on_triton(features, incoming, content_target, content_factor)
    return product_on_triton(
        features,
        style_values.contiguous(),
        style_scale.contiguous(),
        style_factor.contiguous(),
        1 / features[0].numel(),
        masked=True,
        incoming=incoming,
        content_target=content_target,
        content_factor=content_factor,
    )


@_loss_relu_backward.register_fake
def _(features: Tensor, *_: Any) -> Tensor:
    return runtime.allocate_like(features)


@torch.no_grad()
def loss_relu_backward(
    features: Tensor,
    *,
    incoming: Tensor | None = None,
    style_matrix: StyleMatrix | None = None,
    style_factor: Tensor | None = None,
    content_target: Tensor | None = None,
    content_factor: Tensor | None = None,
) -> Tensor:
    """`[F > 0]·(incoming + style_factor·F (D + Dᵀ)/(C·H·W) + content_factor·(F − content_target))`.

    The gradient with respect to a ReLU's input if losses are measured on its output F; for callers that chain gradients
    themselves, so it has none of its own. Terms that are not given are left out; at least one is needed. Where F ≤ 0
    the result is 0; where F is NaN or positive, NaN and Inf in the terms stay visible.

    Args:
        features: F, the ReLU's output, `[N, C, H, W]`, float32, float16, bfloat16 (float64 on the reference path); any
            memory format, which the result takes.
        incoming: the gradient with respect to F from the layers above, of F's shape and dtype.
        style_matrix: D + Dᵀ, as `style_loss_and_matrix` returns it.
        style_factor: `[N]` float32 (float64 for float64): for l[n]·style_loss it is 2·l[n].
        content_target: the content features X, of F's shape and dtype.
        content_factor: `[N]` float32 (float64 for float64): for l[n]·‖F − content_target‖² it is 2·l[n].

    Returns:
        `[N, C, H, W]` in F's dtype and memory format, summed in float32 (float64 for float64).

    Raises:
        ValueError: no term is given, half of a pair is missing, or shapes, dtypes or devices do not match.
    """
    runtime.check_images("features", features)
    n, c = features.shape[:2]
    if incoming is None and style_matrix is None and content_target is None:
        raise ValueError("no term is given: pass incoming, style_matrix or content_target")
    for name, factor_name, term, factor in (
        ("style_matrix", "style_factor", style_matrix, style_factor),
        ("content_target", "content_factor", content_target, content_factor),
    ):
        if (term is None) != (factor is None):
            given, missing = (name, factor_name) if factor is None else (factor_name, name)
            raise ValueError(f"{given} is given and {missing} is not: pass both or neither")
    if style_matrix is not None and not (isinstance(style_matrix, tuple) and len(style_matrix) == 2):
        raise ValueError(
            f"style_matrix is of type {type(style_matrix).__name__}, expected the one of style_loss_and_matrix"
        )
    values, scale = (None, None) if style_matrix is None else style_matrix
    wide = runtime.statistics_dtype(features)
    for name, tensor, shape, dtype in (
        ("incoming", incoming, tuple(features.shape), features.dtype),
        ("style_matrix.values", values, (n, c, c), features.dtype),
        ("style_matrix.scale", scale, (n,), wide),
        ("style_factor", style_factor, (n,), wide),
        ("content_target", content_target, tuple(features.shape), features.dtype),
        ("content_factor", content_factor, (n,), wide),
    ):
        if tensor is not None:
            _check(name, tensor, shape, dtype, features)
    result: Tensor = torch.ops.fastnst.loss_relu_backward(
        features, incoming, values, scale, style_factor, content_target, content_factor
    )
    return result


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, features: Tensor) -> None:
    runtime.check_tensor(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {shape}: features are {tuple(features.shape)}"
        )
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype} for {features.dtype} features")
    runtime.check_same_device(name, tensor, "features", features)
