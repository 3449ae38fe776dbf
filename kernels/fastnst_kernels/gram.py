# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""Gram matrices of feature maps, and the style loss built on them.

Source: Johnson, Alahi, Fei-Fei 2016, "Perceptual Losses for Real-Time Style Transfer", equations 3 and 4.

Legend: N samples, C channels, K = H·W positions; F [K, C] the features of one sample, T [C, C] its target.

    G = FᵀF / (C·K)                loss = ‖D‖²_F,  D = G − T

Backward: dG enters through both factors of FᵀF, so

    dF = F (dG + dGᵀ) / (C·K)      and for the loss, with its gradient l: dG = 2·l·D, dT = −2·l·D

Both are therefore one operation on a matrix A (dG or D) and a number per sample, which the kernel computes without
writing the sum or the scaled matrix: dF = s·F (A + Aᵀ).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.runtime import ceil_div, jit, power_of_two, tl


def gram_matrix_reference(features: Tensor) -> Tensor:
    """The formula in differentiable PyTorch, in fp32 (fp64 for fp64); same argument as `gram_matrix`."""
    f = _positions_by_channels(features.to(runtime.statistics_dtype(features)))
    return _bmm(f.mT, f) / (f.shape[1] * f.shape[2])


def style_loss_reference(features: Tensor, target_gram: Tensor) -> Tensor:
    """The formula in differentiable PyTorch, in fp32 (fp64 for fp64); same arguments as `style_loss`."""
    return (gram_matrix_reference(features) - target_gram).square().sum((1, 2))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """The batched product in the operands' own type: autocast would take it in 16 bits, which fp16's range ends."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def _positions_by_channels(features: Tensor) -> Tensor:
    """`[N, C, H, W]` as `[N, H·W, C]`, a view for both memory formats."""
    if runtime.memory_format_of(features) == torch.channels_last:
        return features.permute(0, 2, 3, 1).flatten(1, 2)
    return features.flatten(2).mT


@jit
def _partial_gram_kernel(
    features, partial, n_samples, C, K, stride_c, stride_k, chunk, n_tiles,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[s, n] = FᵀF over the positions of chunk s.

    Grid: splits × N × tiles². Products in the features' dtype, sums in fp32. Moves K·C·⌈C/BLOCK_C⌉ elements in per
    sample and operand (re-reads meet in L2), splits·N·C²·4 bytes out. Limit: C ≤ 32768 (tile offsets are 32-bit).
    """
    pid = tl.program_id(0)
    i_j = pid % n_tiles
    i_i = pid // n_tiles % n_tiles
    i_n = pid // (n_tiles * n_tiles) % n_samples
    i_s = pid // (n_tiles * n_tiles) // n_samples
    o_i = i_i * BLOCK_C + tl.arange(0, BLOCK_C)
    o_j = i_j * BLOCK_C + tl.arange(0, BLOCK_C)
    o_k = tl.arange(0, BLOCK_K)
    p_sample = features + i_n.to(tl.int64) * C * K
    first = i_s * chunk
    last = tl.minimum(first + chunk, K)
    b_gram = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for k in range(first, last, BLOCK_K):
        m_k = k + o_k < last
        p_k = p_sample + (k + o_k).to(tl.int64) * stride_k
        # [BLOCK_C, BLOCK_K] and [BLOCK_K, BLOCK_C]
        p_left = p_k[None, :] + o_i.to(tl.int64)[:, None] * stride_c
        p_right = p_k[:, None] + o_j.to(tl.int64)[None, :] * stride_c
        b_left = tl.load(p_left, mask=(o_i < C)[:, None] & m_k[None, :], other=0.0)
        b_right = tl.load(p_right, mask=m_k[:, None] & (o_j < C)[None, :], other=0.0)
        if WIDEN:
            b_left = b_left.to(tl.float32)
            b_right = b_right.to(tl.float32)
        b_gram = tl.dot(b_left, b_right, acc=b_gram, input_precision=PRECISION)
    p_out = partial + (i_s.to(tl.int64) * n_samples + i_n) * C * C + o_i[:, None] * C + o_j[None, :]
    tl.store(p_out, b_gram, mask=(o_i < C)[:, None] & (o_j < C)[None, :])


@jit
def _merge_gram_kernel(
    partial, target, result, loss, size, total, target_stride, splits, scale, n_blocks,
    STYLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """result = scale·Σ_s partial[s] (− target, and the block's sum of squares into `loss`, with STYLE).

    Grid: N × blocks of `size` = C². The splits are added in order: the same bits every time. Moves
    (splits + 1 + STYLE)·N·C²·4 bytes.
    """
    pid = tl.program_id(0)
    i_n = (pid // n_blocks).to(tl.int64)
    o_e = pid % n_blocks * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < size
    b_sum = tl.zeros([BLOCK], tl.float32)
    for s in range(splits):
        b_sum += tl.load(partial + tl.cast(s, tl.int64) * total + i_n * size + o_e, mask=m_e, other=0.0)
    b_sum *= scale
    if STYLE:
        b_sum -= tl.load(target + i_n * target_stride + o_e, mask=m_e, other=0.0).to(tl.float32)
        tl.store(loss + pid, tl.sum(b_sum * b_sum, 0))
    tl.store(result + i_n * size + o_e, b_sum, mask=m_e)


@jit
def _gram_backward_kernel(
    features, matrix, factor, d_features, C, K, stride_c, stride_k, n_k, n_c, scale,
    HAS_FACTOR: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_features = scale·factor[n]·F (A + Aᵀ), A = `matrix [N, C, C]` fp32.

    Grid: N × blocks of K × blocks of C. Moves K·C·⌈C/BLOCK_C⌉ elements in (re-reads meet in L2), K·C out, A from L2.
    bf16 features meet A rounded to bf16. WIDEN multiplies fp16 ones in TF32: A has fp32's range, fp16 would overflow.
    """
    pid = tl.program_id(0)
    i_c = pid % n_c
    i_k = pid // n_c % n_k
    i_n = (pid // n_c // n_k).to(tl.int64)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p_k = i_n * C * K + o_k.to(tl.int64)[:, None] * stride_k
    p_matrix = matrix + i_n * C * C
    m_k = (o_k < K)[:, None]
    m_c = (o_c < C)[None, :]
    b_acc = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for i in range(0, C, BLOCK_C):
        o_i = i + tl.arange(0, BLOCK_C)
        m_a = (o_i < C)[:, None] & m_c
        p_features = features + p_k + o_i.to(tl.int64)[None, :] * stride_c
        b_features = tl.load(p_features, mask=m_k & (o_i < C)[None, :], other=0.0)
        b_a = tl.load(p_matrix + o_i[:, None] * C + o_c[None, :], mask=m_a, other=0.0)
        b_a += tl.load(p_matrix + o_c[None, :] * C + o_i[:, None], mask=m_a, other=0.0)
        if features.dtype.element_ty == tl.bfloat16:
            b_a = b_a.to(tl.bfloat16)
        if WIDEN:
            b_features = b_features.to(tl.float32)
            b_a = b_a.to(tl.float32)
        b_acc = tl.dot(b_features, b_a, acc=b_acc, input_precision=PRECISION)
    b_acc *= scale
    if HAS_FACTOR:
        b_acc *= tl.load(factor + i_n)
    tl.store(d_features + p_k + o_c.to(tl.int64)[None, :] * stride_c, b_acc, mask=m_k & m_c)


def _strides(features: Tensor) -> tuple[int, int]:
    """Strides of a channel and of a position in the dense `[N, C, H, W]`, in elements."""
    if runtime.memory_format_of(features) == torch.channels_last:
        return 1, features.shape[1]
    return features.shape[2] * features.shape[3], 1


@runtime.launches_on_its_device
def _gram_on_triton(features: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`(G, None)`, or `(G − target, loss)` with a target."""
    n, c, h, w = features.shape
    k = h * w
    block_c, block_k = min(64, max(16, power_of_two(c))), 32
    n_tiles = ceil_div(c, block_c)
    wanted = max(1, runtime.TARGET_PROGRAMS // (n * n_tiles * n_tiles))
    chunk = ceil_div(ceil_div(k, wanted), block_k) * block_k
    splits = ceil_div(k, chunk)
    partial = runtime.allocate((splits, n, c, c), features, torch.float32)
    # IEEE products for fp32 features: TF32's 10 bits would lose what fp32 was chosen for.
    _partial_gram_kernel[(splits * n * n_tiles * n_tiles,)](
        features, partial, n, c, k, *_strides(features), chunk, n_tiles,
        WIDEN=runtime.INTERPRETING, PRECISION="ieee", BLOCK_C=block_c, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    result = runtime.allocate((n, c, c), features, torch.float32)
    block = min(1024, power_of_two(c * c))
    n_blocks = ceil_div(c * c, block)
    loss = None if target is None else runtime.allocate((n, n_blocks), features, torch.float32)
    target_stride = 0 if target is None or target.dim() == 2 else c * c
    _merge_gram_kernel[(n * n_blocks,)](
        partial, target, result, loss, c * c, n * c * c, target_stride, splits, 1 / (c * k), n_blocks,
        STYLE=target is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return result, None if loss is None else loss.sum(1)


@runtime.launches_on_its_device
def _backward_on_triton(features: Tensor, matrix: Tensor, factor: Tensor | None) -> Tensor:
    n, c, h, w = features.shape
    k = h * w
    largest = 32 if features.dtype == torch.float32 else 64  # IEEE products run on plain registers: 64 × 64 would spill
    block_c, block_k = (min(largest, max(16, power_of_two(side))) for side in (c, k))
    n_k, n_c = ceil_div(k, block_k), ceil_div(c, block_c)
    d_features = runtime.allocate_like(features)
    widen = features.dtype == torch.float16 or runtime.INTERPRETING
    _gram_backward_kernel[(n * n_k * n_c,)](
        features, matrix, factor, d_features, c, k, *_strides(features), n_k, n_c, 1 / (c * k),
        HAS_FACTOR=factor is not None, WIDEN=widen, PRECISION="tf32" if widen else "ieee",
        BLOCK_C=block_c, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    return d_features


@torch.library.custom_op("fastnst::gram_matrix", mutates_args=())
def _gram_matrix(features: Tensor) -> Tensor:
    features = runtime.dense(features)
    if runtime.implementation(features) == "reference":
        return gram_matrix_reference(features)
    return _gram_on_triton(features, None)[0]


@_gram_matrix.register_fake
def _(features: Tensor) -> Tensor:
    n, c = features.shape[:2]
    return features.new_empty((n, c, c), dtype=runtime.statistics_dtype(features))


@torch.library.custom_op("fastnst::style_loss", mutates_args=())
def _style_loss(features: Tensor, target_gram: Tensor) -> tuple[Tensor, Tensor]:
    """`(loss [N], difference [N, C, C])`."""
    features = runtime.dense(features)
    if runtime.implementation(features) == "reference":
        difference = gram_matrix_reference(features).sub_(target_gram)
        return torch.linalg.vector_norm(difference, dim=(1, 2)).square_(), difference
    difference, loss = _gram_on_triton(features, target_gram.contiguous())
    assert loss is not None
    return loss, difference


@_style_loss.register_fake
def _(features: Tensor, target_gram: Tensor) -> tuple[Tensor, Tensor]:
    n, c = features.shape[:2]
    difference = features.new_empty((n, c, c), dtype=runtime.statistics_dtype(features))
    return difference.new_empty((n,)), difference


@torch.library.custom_op("fastnst::gram_backward", mutates_args=())
def _gram_backward(features: Tensor, matrix: Tensor, factor: Tensor | None) -> Tensor:
    """`factor[n]·F (A + Aᵀ) / (C·H·W)` for A = `matrix [N, C, C]`, in the features' dtype and memory format."""
    features, matrix = runtime.dense(features), matrix.contiguous()
    if runtime.implementation(features) == "triton":
        return _backward_on_triton(features, matrix, None if factor is None else factor.contiguous())
    f = _positions_by_channels(features).to(matrix.dtype)
    a = (matrix + matrix.mT) / (f.shape[1] * f.shape[2])
    if factor is not None:
        a *= factor.view(-1, 1, 1)
    d_features = runtime.allocate_like(features)
    d_features.copy_(_bmm(f, a).mT.reshape(features.shape))
    return d_features


@_gram_backward.register_fake
def _(features: Tensor, matrix: Tensor, factor: Tensor | None) -> Tensor:
    return runtime.allocate_like(features)


def _setup_gram_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gram_autograd(ctx: Any, d_gram: Tensor) -> Tensor:
    d_features: Tensor = torch.ops.fastnst.gram_backward(ctx.saved_tensors[0], d_gram, None)
    return d_features


def _setup_style_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    features, target = inputs
    ctx.target_dim, ctx.target_dtype = target.dim(), target.dtype
    ctx.save_for_backward(features, output[1])


def _style_autograd(ctx: Any, d_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    features, difference = ctx.saved_tensors
    factor = 2 * d_loss
    d_features = d_target = None
    if ctx.needs_input_grad[0]:
        d_features = torch.ops.fastnst.gram_backward(features, difference, factor)
    if ctx.needs_input_grad[1]:
        d_target = -factor.view(-1, 1, 1) * difference
        d_target = (d_target.sum(0) if ctx.target_dim == 2 else d_target).to(ctx.target_dtype)
    return d_features, d_target


torch.library.register_autograd("fastnst::gram_matrix", _gram_autograd, setup_context=_setup_gram_context)
torch.library.register_autograd("fastnst::style_loss", _style_autograd, setup_context=_setup_style_context)


def gram_matrix(features: Tensor) -> Tensor:
    """`G[c, c'] = Σ_hw F[c, hw]·F[c', hw] / (C·H·W)` of each sample (Johnson et al. 2016, equation 3).

    Args:
        features: `[N, C, H, W]`, float32, float16, bfloat16 (float64 on the reference path); any memory format.

    Returns:
        `[N, C, C]` float32 (float64 for float64), summed in that type whatever the features' own.

    Raises:
        ValueError: `features` is not a non-empty floating `[N, C, H, W]`.
    """
    runtime.check_images("features", features)
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
        ValueError: shapes, dtypes or devices do not go together.
    """
    runtime.check_images("features", features)
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
    loss: Tensor = torch.ops.fastnst.style_loss(features, target_gram)[0]
    return loss
