# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""The product of features with a symmetric matrix: the backward of Gram matrices and style losses.

Legend: N samples, C channels, K = H·W positions; F [K, C] the features of one sample, row-major in channels_last, its
transpose [C, K] in the contiguous format; A, S [C, C], S symmetric. E = N·C·K elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.gram.kernels import (
    MERGE_TILE,
    WAVE,
    Tile,
    _power_of_two_above,
    _upper_pair,
    alignment,
    has_aligned_rows,
    is_channels_last,
    pairs,
    precision_of,
)
from fastnst_kernels.runtime import ceil_div, jit, tl

# Positions × channels of the result, summed over `depth` channels at a time; see `kernels.GRAM_TILES`.
PRODUCT_TILES = {
    "C ≤ 64": Tile(128, 64, 64, 4, 1),
    "C ≤ 128": Tile(128, 128, 128, 8, 1),
    "C > 128": Tile(128, 128, 64, 8, 3),
    "small": Tile(64, 64, 64, 4, 4),
    "narrow": Tile(64, 64, 32, 8, 2),
    "tf32": Tile(64, 64, 32, 8, 3),
    "ieee": Tile(64, 64, 16, 8, 3),
}


def product_tile(features: Tensor) -> Tile:
    """The configuration for `features [N, C, H, W]`, by shape, dtype and format alone."""
    n, c, h, w = features.shape
    if features.dtype == torch.float32:
        return PRODUCT_TILES[precision_of(features)]
    if not has_aligned_rows(features):
        return PRODUCT_TILES["narrow"]
    if c <= 64:
        return PRODUCT_TILES["C ≤ 64"]
    if n * ceil_div(h * w, 128) * ceil_div(c, 128) < WAVE:
        return PRODUCT_TILES["small"]
    return PRODUCT_TILES["C ≤ 128" if c <= 128 else "C > 128"]


@jit
def _symmetrize_kernel(
    matrix, bound, result, scale, C, n_tiles, ALIGN_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """result = (A + Aᵀ)/scale[n] for A = `matrix [N, C, C]` fp32; scale[n] from bound[n] ≥ max|A|.

    Grid: N × pairs of tiles (`n_tiles`). Without `bound` nothing is scaled. Moves N·C² elements of each in and out.
    """
    C = C // ALIGN_C * ALIGN_C
    pid = tl.program_id(0)
    i_n = (pid // n_tiles).to(tl.int64)
    i_i, i_j = _upper_pair(pid % n_tiles)
    o_r = tl.arange(0, BLOCK)
    m_i = i_i * BLOCK + o_r < C
    m_j = i_j * BLOCK + o_r < C
    o_tile = o_r[:, None] * C + o_r[None, :]
    o_upper = i_n * C * C + (i_i * BLOCK).to(tl.int64) * C + i_j * BLOCK
    o_lower = i_n * C * C + (i_j * BLOCK).to(tl.int64) * C + i_i * BLOCK
    m_upper = m_i[:, None] & m_j[None, :]
    m_lower = m_j[:, None] & m_i[None, :]
    b_upper = tl.load(matrix + o_upper + o_tile, mask=m_upper, other=0.0)
    b_lower = tl.load(matrix + o_lower + o_tile, mask=m_lower, other=0.0)
    b_sum = b_upper + tl.trans(b_lower)
    if bound is not None:
        power, inverse = _power_of_two_above(2.0 * tl.load(bound + i_n))
        tl.store(scale + i_n, power)
        b_sum *= inverse
    tl.store(result + o_upper + o_tile, b_sum, mask=m_upper)
    tl.store(result + o_lower + o_tile, tl.trans(b_sum), mask=m_lower)


@jit
def _product_kernel(
    left, right, features, scale, factor, incoming, content_target, content_factor, result,
    rows, columns, C, n_rows, n_columns, left_stride, right_stride, constant,
    CHANNELS_LAST: tl.constexpr, ONE_STEP: tl.constexpr, MASK: tl.constexpr,
    ALIGN_C: tl.constexpr, ALIGN_COLUMNS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """result = [F > 0]·(incoming + constant·scale[n]·factor[n]·P + content_factor[n]·(F − content_target))

    with P = left `[rows, C]` · right `[C, columns]`: F S in channels_last, S Fᵀ in the contiguous format, S symmetric.
    Terms that are None are left out; the mask needs MASK.

    Grid: N × tiles of the result. Moves E in and E out, E more for each further term, and N·C² elements of S; further
    reads of the same element, by other programs or by the mask and the content term, come from L2 or L1. 2·K·C² FLOPs
    per sample. Limit: C < 2²⁴.
    """
    C = C // ALIGN_C * ALIGN_C
    columns = columns // ALIGN_COLUMNS * ALIGN_COLUMNS
    pid = tl.program_id(0)
    i_n = (pid // (n_rows * n_columns)).to(tl.int64)
    # Tiles of the same positions run at the same time, so that L2 serves their features.
    if CHANNELS_LAST:
        i_q = pid % n_columns
        i_r = pid // n_columns % n_rows
    else:
        i_r = pid % n_rows
        i_q = pid // n_rows % n_columns
    o_r = tl.arange(0, BLOCK_R)
    o_q = tl.arange(0, BLOCK_Q)
    o_i = tl.arange(0, BLOCK_I)
    m_r = i_r * BLOCK_R + o_r < rows
    m_q = i_q * BLOCK_Q + o_q < columns
    o_left = o_r[:, None] * C + o_i[None, :]
    if CHANNELS_LAST:
        o_right = o_i[:, None] * columns + o_q[None, :]
        o_tile = o_r[:, None] * columns
    else:  # a plane can pass 2³¹ within a tile
        o_right = o_i.to(tl.int64)[:, None] * columns + o_q[None, :]
        o_tile = o_r.to(tl.int64)[:, None] * columns
    p_left = left + i_n * left_stride + (i_r * BLOCK_R).to(tl.int64) * C
    p_right = right + i_n * right_stride + i_q * BLOCK_Q
    o_first = i_n * C * (rows if CHANNELS_LAST else columns) + (i_r * BLOCK_R).to(tl.int64) * columns + i_q * BLOCK_Q
    b_sum = tl.zeros([BLOCK_R, BLOCK_Q], tl.float32)
    for i in range(0, BLOCK_I if ONE_STEP else C, BLOCK_I):
        m_i = o_i < C - i
        b_left = tl.load(p_left + i + o_left, mask=m_r[:, None] & m_i[None, :], other=0.0)
        p_right_i = p_right + tl.cast(i, tl.int64) * columns
        b_right = tl.load(p_right_i + o_right, mask=m_i[:, None] & m_q[None, :], other=0.0)
        if WIDEN:
            b_left = b_left.to(tl.float32)
            b_right = b_right.to(tl.float32)
        b_sum = tl.dot(b_left, b_right, acc=b_sum, input_precision=PRECISION)
    if scale is not None:
        constant *= tl.load(scale + i_n)
    if factor is not None:
        constant *= tl.load(factor + i_n)
    # In parts, because a whole tile of every term at once would not fit into the registers.
    b_sum = tl.permute(tl.reshape(b_sum * constant, [BLOCK_R, 2, BLOCK_Q // 2]), (0, 2, 1))
    b_first, b_second = tl.split(b_sum)
    for part in tl.static_range(2):
        b_part = b_first if part == 0 else b_second
        o_q = part * (BLOCK_Q // 2) + tl.arange(0, BLOCK_Q // 2)
        m_part = m_r[:, None] & (i_q * BLOCK_Q + o_q < columns)[None, :]
        o_part = o_first + o_tile + o_q[None, :]
        if MASK or content_target is not None:
            b_features = tl.load(features + o_part, mask=m_part, other=0.0)
        if incoming is not None:
            b_part += tl.load(incoming + o_part, mask=m_part, other=0.0).to(tl.float32)
        if content_target is not None:
            b_target = tl.load(content_target + o_part, mask=m_part, other=0.0).to(tl.float32)
            b_part += (b_features.to(tl.float32) - b_target) * tl.load(content_factor + i_n)
        if MASK:
            b_part = tl.where(b_features <= 0.0, 0.0, b_part)  # a NaN passes the gradient, as in PyTorch
        tl.store(result + o_part, b_part, mask=m_part)


@runtime.launches_on_its_device
def symmetrize_on_triton(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`(S, scale)`: A + Aᵀ = scale[n]·S, A = `matrix [N, C, C]` fp32, S in `dtype`; scale only for fp16."""
    n, c, _ = matrix.shape
    bound = torch.linalg.vector_norm(matrix, float("inf"), dim=(1, 2)) if dtype == torch.float16 else None
    result = runtime.allocate((n, c, c), matrix, dtype)
    scale = None if bound is None else runtime.allocate((n,), matrix, torch.float32)
    n_tiles = pairs(c, MERGE_TILE)
    _symmetrize_kernel[(n * n_tiles,)](
        matrix, bound, result, scale, c, n_tiles, ALIGN_C=alignment(c), BLOCK=MERGE_TILE, num_warps=4
    )
    return result, scale


@runtime.launches_on_its_device
def product_on_triton(
    features: Tensor,
    matrix: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    constant: float,
    *,
    masked: bool = False,
    incoming: Tensor | None = None,
    content_target: Tensor | None = None,
    content_factor: Tensor | None = None,
) -> Tensor:
    """`_product_kernel` for dense tensors: S = `matrix [N, C, C]` in the features' dtype; factors `[N]`."""
    n, c, h, w = features.shape
    k = h * w
    tile = product_tile(features)
    channels_last = is_channels_last(features)
    if channels_last:
        left, right, rows, columns, block_r, block_q = features, matrix, k, c, tile.rows, tile.columns
    else:
        left, right, rows, columns, block_r, block_q = matrix, features, c, k, tile.columns, tile.rows
    n_rows, n_columns = ceil_div(rows, block_r), ceil_div(columns, block_q)
    result = runtime.allocate_like(features)
    _product_kernel[(n * n_rows * n_columns,)](
        left, right, features, scale, factor, incoming, content_target, content_factor, result,
        rows, columns, c, n_rows, n_columns, rows * c, c * columns, constant,
        CHANNELS_LAST=channels_last, ONE_STEP=c <= tile.depth, MASK=masked,
        ALIGN_C=alignment(c), ALIGN_COLUMNS=alignment(columns),
        WIDEN=runtime.INTERPRETING, PRECISION=precision_of(features),
        BLOCK_R=block_r, BLOCK_Q=block_q, BLOCK_I=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return result
