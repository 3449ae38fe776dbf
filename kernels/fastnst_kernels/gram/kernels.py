# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""The kernels of Gram matrices and style losses: FᵀF split over the positions, and the merge.

Legend: N samples, C channels, K = H·W positions; F [K, C] the features of one sample, row-major in channels_last, its
transpose [C, K] in the contiguous format. G, T, D, A and S are [C, C] and cut into tiles; a pair (i ≤ j) is a tile of
the upper triangle with its mirror image. E = N·C·K elements.

The products run on tensor cores: operands of the features' 16-bit type, sums in fp32. fp32 features are multiplied in
IEEE fp32, or in TF32 where PyTorch itself would (`torch.backends.cuda.matmul.fp32_precision == "tf32"`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.runtime import ceil_div, jit, power_of_two, tl

MERGE_TILE = 32
# Splits are chosen for one program on each of this many multiprocessors. A constant, since rounding must not depend on
# the GPU.
WAVE = 128


class Tile(NamedTuple):
    """One configuration of a product kernel: positions or channels × channels, summed `depth` at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# For FᵀF. 64 rows are the minimum of Hopper's matrix unit, 128 × 128 with 8 warps the most that leaves room for two
# programs per multiprocessor. The first four keep 64 KiB of features in flight, within 99 KiB of shared memory.
# "shared": one tile holds all channels and feeds both operands. "small": too little work for many tiles of 128.
# "narrow": rows without a common alignment of 16 bytes, which are read element by element, through registers.
GRAM_TILES = {
    "64 shared": Tile(64, 64, 128, 4, 5),
    "64 small": Tile(64, 64, 64, 4, 5),
    "128 shared": Tile(128, 128, 128, 8, 3),
    "128": Tile(128, 128, 64, 8, 3),
    "narrow": Tile(64, 64, 32, 8, 2),
    "tf32": Tile(64, 64, 32, 4, 3),
    "ieee": Tile(64, 64, 32, 8, 2),
}


def gram_tile(features: Tensor) -> Tile:
    """The configuration for `features`, by shape, dtype and format, its depth also by the GPU.

    Before Hopper a tile that feeds both operands cannot be prefetched, so there it is loaded twice.
    """
    n, c, h, w = features.shape
    if features.dtype == torch.float32:
        return GRAM_TILES[precision_of(features)]
    if not has_aligned_rows(features):
        return GRAM_TILES["narrow"]
    shares = shares_tiles(features)
    if c <= 64:
        return GRAM_TILES["64 shared" if shares else "64 small"]
    if n * h * w <= 8192:
        return GRAM_TILES["64 small"]
    return GRAM_TILES["128 shared" if c <= 128 and shares else "128"]


def shares_tiles(features: Tensor) -> bool:
    """Whether a diagonal tile is loaded once for both operands."""
    chip = runtime.chip(features)
    return chip is None or chip.capability >= (9, 0)


def precision_of(features: Tensor) -> str:
    """The precision of fp32 products: `ieee`, or `tf32` if PyTorch's own matrix products use it."""
    uses_tf32 = features.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if uses_tf32 else "ieee"


def has_aligned_rows(features: Tensor) -> bool:
    """Whether each row in memory, of channels or of positions, begins at a multiple of 8 elements."""
    _, c, h, w = features.shape
    return (c if is_channels_last(features) else h * w) % 8 == 0


def is_channels_last(features: Tensor) -> bool:
    return runtime.memory_format_of(features) == torch.channels_last


def alignment(count: int) -> int:
    """The largest power of two, up to 8, that divides `count`."""
    return math.gcd(count, 8)


def pairs(channels: int, tile: int) -> int:
    """How many tiles of side `tile` the upper triangle of a C × C matrix has, the diagonal included."""
    tiles = ceil_div(channels, tile)
    return tiles * (tiles + 1) // 2


@cache
def positions_per_split(n_programs: int, positions: int, side: int) -> int:
    """How many positions one program sums, a multiple of 128, if `n_programs` would sum all of them.

    Minimizes a cost in units of a multiprocessor's time for one position: rounds of programs, each with about 512 units
    to start and end, plus the cost to write, read and add partial sums in order.
    """

    def cost(splits: int) -> float:
        rounds = ceil_div(n_programs * splits, WAVE)
        partial = 0.0 if splits == 1 else 7 * (side / 128) ** 2 * n_programs * splits + 10 * splits
        return rounds * (positions / splits + 512) + partial

    most = max(1, min(ceil_div(positions, 128), 2 * WAVE // n_programs))
    splits = min(range(1, most + 1), key=cost)
    return ceil_div(ceil_div(positions, splits), 128) * 128


@jit
def _upper_pair(index):
    """The tile (i ≤ j) with j·(j + 1)/2 + i = index."""
    i_j = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded.
    i_j = tl.where((i_j + 1) * (i_j + 2) // 2 <= index, i_j + 1, i_j)
    i_j = tl.where(i_j * (i_j + 1) // 2 > index, i_j - 1, i_j)
    return index - i_j * (i_j + 1) // 2, i_j


@jit
def _power_of_two_above(bound):
    """`(2ᵉ, 2⁻ᵉ)` with bound·2⁻ᵉ in [2¹⁴, 2¹⁵), far from fp16's ends; 2ᵉ and 2⁻ᵉ are normal numbers.

    A bound of Inf or NaN is not scaled. `bound` need not be tight: fp16 covers a factor of 2³⁹ from there to its
    smallest number, more than fp32 resolves in a difference.
    """
    exponent = (bound.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where(exponent == 255, 141, tl.maximum(exponent, 15))
    scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, inverse


@jit
def _sum_of_products(
    p_left, p_right, first, last, C, K,
    m_left, m_right,
    SAME: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """leftᵀ·right over the positions first…last − 1, fp32; with SAME both are loaded once."""
    o_k = tl.arange(0, BLOCK_K)
    o_c = tl.arange(0, BLOCK_C)
    if CHANNELS_LAST:
        o_left = o_c[:, None] + o_k[None, :] * C
        o_right = o_k[:, None] * C + o_c[None, :]
    else:  # a plane of K elements can pass 2³¹ within a tile
        o_left = o_c.to(tl.int64)[:, None] * K + o_k[None, :]
        o_right = o_k[:, None] + o_c.to(tl.int64)[None, :] * K
    b_sum = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for k in range(first, last, BLOCK_K):
        m_k = o_k < last - k
        o_first = tl.cast(k, tl.int64) * (C if CHANNELS_LAST else 1)
        b_right = tl.load(p_right + o_first + o_right, mask=m_k[:, None] & m_right[None, :], other=0.0)
        if SAME:
            b_left = tl.trans(b_right)
        else:
            b_left = tl.load(p_left + o_first + o_left, mask=m_left[:, None] & m_k[None, :], other=0.0)
        if WIDEN:
            b_left = b_left.to(tl.float32)
            b_right = b_right.to(tl.float32)
        b_sum = tl.dot(b_left, b_right, acc=b_sum, input_precision=PRECISION)
    return b_sum


@jit
def _write_pair(
    b_gram, result, target, loss, i_i, i_j, C, inverse, STYLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a pair of tiles of G; with STYLE of S = (D + Dᵀ)·inverse, D = G − T, and its share of ‖D‖²."""
    o_r = tl.arange(0, BLOCK)
    m_i = i_i * BLOCK + o_r < C
    m_j = i_j * BLOCK + o_r < C
    o_tile = o_r[:, None] * C + o_r[None, :]
    o_upper = (i_i * BLOCK).to(tl.int64) * C + i_j * BLOCK
    o_lower = (i_j * BLOCK).to(tl.int64) * C + i_i * BLOCK
    m_upper = m_i[:, None] & m_j[None, :]
    m_lower = m_j[:, None] & m_i[None, :]
    if STYLE:
        b_upper = b_gram - tl.load(target + o_upper + o_tile, mask=m_upper, other=0.0).to(tl.float32)
        b_lower = b_gram - tl.trans(tl.load(target + o_lower + o_tile, mask=m_lower, other=0.0).to(tl.float32))
        b_squares = b_upper * b_upper
        tl.store(loss, tl.sum(tl.where(i_i == i_j, b_squares, b_squares + b_lower * b_lower)))
        b_gram = (b_upper + b_lower) * inverse
    tl.store(result + o_upper + o_tile, b_gram, mask=m_upper)
    if i_i != i_j:
        tl.store(result + o_lower + o_tile, tl.trans(b_gram), mask=m_lower)


@jit
def _mirror(b_gram, is_diagonal, BLOCK: tl.constexpr):
    """Make the lower half of a diagonal tile the exact mirror image of the upper one."""
    o_r = tl.arange(0, BLOCK)
    return tl.where(is_diagonal & (o_r[:, None] > o_r[None, :]), tl.trans(b_gram), b_gram)


@jit
def _gram_kernel(
    features, target, result, loss, bounds, matrix_scale, n_samples, C, K, chunk, n_pairs, target_stride, scale,
    WHOLE: tl.constexpr, STYLE: tl.constexpr, BOUNDS: tl.constexpr, ONE_TILE: tl.constexpr, SHARE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_K: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """FᵀF over the positions of chunk s: with WHOLE (one chunk) finished, else as partial sums.

    Grid: splits × N × pairs of tiles. Partial sums are `[splits, N, pairs, BLOCK_C, BLOCK_C]` fp32, without those below
    the diagonal. With BOUNDS, `bounds [splits, N, pairs]` gets the largest magnitude of each.
    Reads E once if C ≤ BLOCK_C, else once per row of pairs, all but once from L2; writes splits·N·C²·4 bytes over 2 or
    a little more. 2·K·C² FLOPs per sample in one tile, (1 + 1/tiles)·K·C² in several. Limit: C < 2²⁴.
    """
    C = C // ALIGN_C * ALIGN_C  # exact; lets the compiler see the alignment of rows
    K = K // ALIGN_K * ALIGN_K
    pid = tl.program_id(0)
    i_pair = pid % n_pairs
    i_n = pid // n_pairs % n_samples
    i_s = pid // n_pairs // n_samples
    first = i_s * chunk
    last = tl.minimum(first + chunk, K)
    i_i, i_j = _upper_pair(i_pair)
    o_r = tl.arange(0, BLOCK_C)
    m_i = i_i * BLOCK_C + o_r < C
    m_j = i_j * BLOCK_C + o_r < C
    stride = 1 if CHANNELS_LAST else K
    p_sample = features + i_n.to(tl.int64) * C * K
    p_i = p_sample + (i_i * BLOCK_C).to(tl.int64) * stride
    p_j = p_sample + (i_j * BLOCK_C).to(tl.int64) * stride
    if SHARE and (ONE_TILE or i_i == i_j):
        b_gram = _sum_of_products(
            p_i, p_i, first, last, C, K, m_i, m_i, True, CHANNELS_LAST, WIDEN, PRECISION, BLOCK_C, BLOCK_K
        )
    else:
        b_gram = _sum_of_products(
            p_i, p_j, first, last, C, K, m_i, m_j, False, CHANNELS_LAST, WIDEN, PRECISION, BLOCK_C, BLOCK_K
        )
    if WHOLE:
        b_gram *= scale
        if not STYLE:
            b_gram = _mirror(b_gram, i_i == i_j, BLOCK_C)
        o_n = i_n.to(tl.int64)
        p_target = target + o_n * target_stride if STYLE else target
        p_loss = loss + o_n * n_pairs + i_pair if STYLE else loss
        if STYLE:
            tl.store(matrix_scale + o_n, 1.0)
        _write_pair(b_gram, result + o_n * C * C, p_target, p_loss, i_i, i_j, C, 1.0, STYLE, BLOCK_C)
    else:
        if BOUNDS:
            tl.store(bounds + pid, tl.max(tl.abs(b_gram)))
        m_upper = (i_i != i_j) | (o_r[:, None] // MERGE <= o_r[None, :] // MERGE)
        p_out = result + pid.to(tl.int64) * BLOCK_C * BLOCK_C
        tl.store(p_out + o_r[:, None] * BLOCK_C + o_r[None, :], b_gram, mask=m_upper)


@jit
def _merge_gram_kernel(
    partial, target, result, loss, bounds, target_bound, matrix_scale, n_samples, C, n_pairs, n_tiles, target_stride,
    splits, scale,
    STYLE: tl.constexpr, BOUNDS: tl.constexpr, ALIGN_C: tl.constexpr, BLOCK_C: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """G = scale·Σ_s partial[s]; with STYLE S = (D + Dᵀ)/matrix_scale, D = G − T, and shares of ‖D‖².

    Grid: N × pairs of MERGE × MERGE tiles (`n_tiles` of them). The splits are added in order: the same bits every time.
    With BOUNDS (`BOUNDS` ≥ splits·n_pairs is a power of two) matrix_scale[n] brings S within fp16, else it is 1.
    Moves splits·N·C²·4/2 bytes in and a little more (the diagonal), N·C² results of 4 or 2 bytes out, and T in.
    """
    C = C // ALIGN_C * ALIGN_C
    pid = tl.program_id(0)
    i_n = pid // n_tiles
    i_i, i_j = _upper_pair(pid % n_tiles)
    ratio: tl.constexpr = BLOCK_C // MERGE
    i_row = i_i // ratio
    i_column = i_j // ratio
    i_pair = i_column * (i_column + 1) // 2 + i_row
    o_r = tl.arange(0, MERGE)
    o_tile = (i_i % ratio * MERGE + o_r)[:, None] * BLOCK_C + (i_j % ratio * MERGE + o_r)[None, :]
    p_partial = partial + (i_n * n_pairs + i_pair).to(tl.int64) * BLOCK_C * BLOCK_C
    o_split = tl.cast(n_samples, tl.int64) * n_pairs * BLOCK_C * BLOCK_C
    b_gram = tl.zeros([MERGE, MERGE], tl.float32)
    for s in range(0, splits, 8):
        for u in tl.static_range(8):  # eight loads in flight
            p_split = p_partial + tl.cast(s + u, tl.int64) * o_split
            b_gram += tl.load(p_split + o_tile, mask=(o_tile >= 0) & (s + u < splits), other=0.0)
    b_gram = _mirror(b_gram * scale, i_i == i_j, MERGE)
    o_n = i_n.to(tl.int64)
    inverse = 1.0
    if BOUNDS:
        o_b = tl.arange(0, BOUNDS)
        p_bounds = bounds + (o_b // n_pairs * n_samples + i_n) * n_pairs + o_b % n_pairs
        b_bounds = tl.load(p_bounds, mask=o_b < splits * n_pairs, other=0.0)
        bound = tl.max(b_bounds, 0) * splits * scale + tl.load(target_bound + tl.where(target_stride > 0, i_n, 0))
        power, inverse = _power_of_two_above(2.0 * bound)
        tl.store(matrix_scale + i_n, power)
    elif STYLE:
        tl.store(matrix_scale + i_n, 1.0)
    p_target = target + o_n * target_stride if STYLE else target
    p_loss = loss + pid if STYLE else loss
    _write_pair(b_gram, result + o_n * C * C, p_target, p_loss, i_i, i_j, C, inverse, STYLE, MERGE)


@runtime.launches_on_its_device
def gram_on_triton(features: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(G, None, None)`; with a target `(S, scale, loss)`: D + Dᵀ = scale[n]·S, S in the features' dtype."""
    n, c, h, w = features.shape
    k = h * w
    tile = gram_tile(features)
    n_pairs = pairs(c, tile.rows)
    chunk = positions_per_split(n * n_pairs, k, tile.rows)
    splits = ceil_div(k, chunk)
    style = target is not None
    bounds = style and features.dtype == torch.float16
    # One program finishes its own pair if there is nothing to merge; a tile of 128, or one multiplied without the
    # matrix unit, would not fit into registers.
    multiplies_plainly = tile == GRAM_TILES["ieee"]
    whole = splits == 1 and tile.rows == 64 and not multiplies_plainly and not bounds
    n_tiles = pairs(c, MERGE_TILE)
    target_stride = 0 if target is None or target.dim() == 2 else c * c
    result = runtime.allocate((n, c, c), features, None if style else torch.float32)
    loss = runtime.allocate((n, n_pairs if whole else n_tiles), features, torch.float32) if style else None
    scale = runtime.allocate((n,), features, torch.float32) if style else None
    side = tile.rows
    partial = None if whole else runtime.allocate((splits, n, n_pairs, side, side), features, torch.float32)
    largest = runtime.allocate((splits, n, n_pairs), features, torch.float32) if bounds else None
    _gram_kernel[(splits * n * n_pairs,)](
        features, target if whole else None, result if whole else partial, loss, largest, scale, n, c, k, chunk,
        n_pairs, target_stride, 1 / (c * k),
        WHOLE=whole, STYLE=style, BOUNDS=bounds, ONE_TILE=n_pairs == 1, SHARE=shares_tiles(features),
        CHANNELS_LAST=is_channels_last(features), ALIGN_C=alignment(c), ALIGN_K=alignment(k),
        WIDEN=runtime.INTERPRETING, PRECISION=precision_of(features),
        BLOCK_C=side, BLOCK_K=tile.depth, MERGE=MERGE_TILE, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if not whole:
        target_bound = None
        if bounds:
            target_bound = torch.linalg.vector_norm(target, float("inf"), dim=(-2, -1))
        _merge_gram_kernel[(n * n_tiles,)](
            partial, target, result, loss, largest, target_bound, scale, n, c, n_pairs, n_tiles, target_stride, splits,
            1 / (c * k),
            STYLE=style, BOUNDS=power_of_two(splits * n_pairs) if bounds else 0, ALIGN_C=alignment(c), BLOCK_C=side,
            MERGE=MERGE_TILE, num_warps=4,
        )  # fmt: skip
    return result, scale, None if loss is None else loss.sum(1)
