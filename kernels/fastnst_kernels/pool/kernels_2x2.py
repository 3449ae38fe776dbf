# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""Pooling kernels for 2×2 windows of stride 2: each reads a window once and writes it once.

Legend: as in `max_pool`; a pair is the two rows of x under one row of windows, or the single last row if H is odd.
There are ⌈H/2⌉ pairs per plane, numbered through all planes; pair i of plane p begins at row 2i − p·[H odd] of x and
is row i − p·[H odd] of y, so no division is needed unless H is odd.

A program has a tile of windows, and a thread one vector of 16 bytes of each of the four corners:

    channels_last   one pair, BLOCK_W columns of windows × BLOCK_C channels: a corner is a tile with 2C between columns
    contiguous      BLOCK_R pairs × BLOCK_W columns: a row alternates left and right corners, split in registers

Every element is read or written once. With e bytes per element and E elements of x, pool and gather read E·e and write
E·e/4, unpool the other way round, and each passes E/4 bytes of switches: the minimum.

Limits: W·C (contiguous: W) below 2³¹. Full 16-byte accesses need C (contiguous: W) divisible by 16 bytes' worth of
elements and aligned tensors; other sizes are correct, with narrower accesses. Channels are processed in powers of two;
channels_last rows shorter than a tile use fewer threads.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.runtime import ceil_div, jit, power_of_two, tl

# Threads of a program with a full tile. Four loads of 16 bytes per thread and 2,048 threads per multiprocessor put
# 128 KiB in flight there, several times as much as hides the latency of memory.
_THREADS = 128
_GRID_LIMITS = (2**31 - 1, 65535, 65535)


@jit
def _first_maximum(b_a, i_a, b_b, i_b):
    """The larger of two and its index: the first of equals (−0 and +0 are equal), the last NaN."""
    wins = (b_b > b_a) | (b_b != b_b)
    return tl.maximum(b_a, b_b, propagate_nan=tl.PropagateNan.ALL), tl.where(wins, i_b, i_a)


@jit
def _first_of_four(b_a, b_b, b_c, b_d):
    b_top, i_top = _first_maximum(b_a.to(tl.float32), 0, b_b.to(tl.float32), 1)
    b_bottom, i_bottom = _first_maximum(b_c.to(tl.float32), 2, b_d.to(tl.float32), 3)
    b_max, b_switch = _first_maximum(b_top, i_top, b_bottom, i_bottom)
    return b_max, b_switch.to(tl.uint8)


@jit
def _pointed_at(b_switch, b_a, b_b, b_c, b_d):
    """One of four; 0 where the switch is out of range."""
    b_bottom = tl.where(b_switch == 2, b_c, tl.where(b_switch == 3, b_d, 0.0))
    return tl.where(b_switch == 0, b_a, tl.where(b_switch == 1, b_b, b_bottom))


@jit
def _columns_tile(H, W, C, ODD: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """The tile's start in x and y, its offsets in both, and its masks: left and right corners, bottom row."""
    i_pair = tl.program_id(0).to(tl.int64)
    i_x, i_y = 2 * i_pair, i_pair
    bottom = True
    if ODD:
        i_p = i_pair // (H // 2 + 1)
        i_x, i_y = i_x - i_p, i_y - i_p
        bottom = i_y - i_p * (H // 2) < H // 2
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    o_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    m_left = (2 * o_w < W) & (o_c < C)
    m_right = (2 * o_w + 1 < W) & (o_c < C)
    return i_x * (W * C), i_y * (W // 2 * C), o_w * (2 * C) + o_c, o_w * C + o_c, m_left, m_right, bottom


@jit
def _pool_columns_kernel(
    x, y, switches, H, W, vectors,
    VECTOR: tl.constexpr, ODD: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y and switches of x `[P, H, W, C]`. Grid: pairs × blocks of columns × of channels. Moves: see above."""
    C = vectors * VECTOR
    i_x, i_y, o_x, o_y, _, m_y, bottom = _columns_tile(H, W, C, ODD, BLOCK_W, BLOCK_C)
    m_y &= bottom
    p_a, p_c = x + i_x, x + i_x + W * C
    b_a = tl.load(p_a + o_x, mask=m_y, other=0.0)
    b_b = tl.load(p_a + C + o_x, mask=m_y, other=0.0)
    b_c = tl.load(p_c + o_x, mask=m_y, other=0.0)
    b_d = tl.load(p_c + C + o_x, mask=m_y, other=0.0)
    b_max, b_switch = _first_of_four(b_a, b_b, b_c, b_d)
    tl.store(y + i_y + o_y, b_max, mask=m_y)
    tl.store(switches + i_y + o_y, b_switch, mask=m_y)


@jit
def _unpool_columns_kernel(
    y, switches, x, H, W, vectors,
    VECTOR: tl.constexpr, ODD: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x `[P, H, W, C]` = Sᵀy with zeros. Grid: pairs × blocks of columns × of channels. Moves: see above."""
    C = vectors * VECTOR
    i_x, i_y, o_x, o_y, m_left, m_right, bottom = _columns_tile(H, W, C, ODD, BLOCK_W, BLOCK_C)
    m_y = m_right & bottom
    b_switch = tl.load(switches + i_y + o_y, mask=m_y, other=0)
    b_y = tl.load(y + i_y + o_y, mask=m_y, other=0.0)  # 0 beyond the last window: the last odd row becomes 0
    p_a, p_c = x + i_x, x + i_x + W * C
    tl.store(p_a + o_x, tl.where(b_switch == 0, b_y, 0.0), mask=m_left)
    tl.store(p_a + C + o_x, tl.where(b_switch == 1, b_y, 0.0), mask=m_right)
    tl.store(p_c + o_x, tl.where(b_switch == 2, b_y, 0.0), mask=m_left & bottom)
    tl.store(p_c + C + o_x, tl.where(b_switch == 3, b_y, 0.0), mask=m_y)


@jit
def _gather_columns_kernel(
    x, switches, y, H, W, vectors,
    VECTOR: tl.constexpr, ODD: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = S x of x `[P, H, W, C]`. Grid: pairs × blocks of columns × of channels. Moves: see above."""
    C = vectors * VECTOR
    i_x, i_y, o_x, o_y, _, m_y, bottom = _columns_tile(H, W, C, ODD, BLOCK_W, BLOCK_C)
    m_y &= bottom
    p_a, p_c = x + i_x, x + i_x + W * C
    b_switch = tl.load(switches + i_y + o_y, mask=m_y, other=0)
    b_a = tl.load(p_a + o_x, mask=m_y, other=0.0)
    b_b = tl.load(p_a + C + o_x, mask=m_y, other=0.0)
    b_c = tl.load(p_c + o_x, mask=m_y, other=0.0)
    b_d = tl.load(p_c + C + o_x, mask=m_y, other=0.0)
    tl.store(y + i_y + o_y, _pointed_at(b_switch, b_a, b_b, b_c, b_d), mask=m_y)


@jit
def _rows_tile(PAIRS, H, W, ODD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """As `_columns_tile`, with x's offsets and mask for a whole row, left and right corners together."""
    i_pair = tl.program_id(0).to(tl.int64) * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)[:, None]
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    o_row = tl.program_id(1) * (2 * BLOCK_W) + tl.arange(0, 2 * BLOCK_W)[None, :]
    m_r = o_r < PAIRS - i_pair
    m_bottom = m_r
    i_x, i_y = 2 * i_pair, i_pair
    o_x, o_y = 2 * o_r, o_r
    if ODD:
        i_p = i_pair // (H // 2 + 1)
        i_h = (i_pair - i_p * (H // 2 + 1)).to(tl.int32)
        o_p = (i_h + o_r) // (H // 2 + 1)
        i_x, i_y, o_x, o_y = i_x - i_p, i_y - i_p, o_x - o_p, o_y - o_p
        m_bottom = m_r & (i_h + o_r - o_p * (H // 2 + 1) < H // 2)
    return i_x * W, i_y * (W // 2), o_x * W + o_row, o_y * (W // 2) + o_w, m_r, m_bottom, o_row < W, o_w < W // 2


@jit
def _split_row(b_row, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Left and right corners of a row that alternates them."""
    return tl.split(tl.reshape(b_row, (BLOCK_R, BLOCK_W, 2)))


@jit
def _join_row(b_left, b_right, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    return tl.reshape(tl.join(b_left, b_right), (BLOCK_R, 2 * BLOCK_W))


@jit
def _pool_rows_kernel(
    x, y, switches, PAIRS, H, vectors,
    VECTOR: tl.constexpr, ODD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """y and switches of x `[P, H, W]`. Grid: blocks of pairs × blocks of columns. Moves: see above."""
    W = vectors * VECTOR
    i_x, i_y, o_x, o_y, _, m_r, m_row, m_w = _rows_tile(PAIRS, H, W, ODD, BLOCK_R, BLOCK_W)
    b_top = tl.load(x + i_x + o_x, mask=m_r & m_row, other=0.0)
    b_bottom = tl.load(x + i_x + W + o_x, mask=m_r & m_row, other=0.0)
    b_a, b_b = _split_row(b_top, BLOCK_R, BLOCK_W)
    b_c, b_d = _split_row(b_bottom, BLOCK_R, BLOCK_W)
    b_max, b_switch = _first_of_four(b_a, b_b, b_c, b_d)
    tl.store(y + i_y + o_y, b_max, mask=m_r & m_w)
    tl.store(switches + i_y + o_y, b_switch, mask=m_r & m_w)


@jit
def _unpool_rows_kernel(
    y, switches, x, PAIRS, H, vectors,
    VECTOR: tl.constexpr, ODD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """x `[P, H, W]` = Sᵀy, zeros included. Grid: blocks of pairs × blocks of columns. Moves: see above."""
    W = vectors * VECTOR
    i_x, i_y, o_x, o_y, m_r, m_bottom, m_row, m_w = _rows_tile(PAIRS, H, W, ODD, BLOCK_R, BLOCK_W)
    b_switch = tl.load(switches + i_y + o_y, mask=m_bottom & m_w, other=0)
    b_y = tl.load(y + i_y + o_y, mask=m_bottom & m_w, other=0.0)
    b_top = _join_row(tl.where(b_switch == 0, b_y, 0.0), tl.where(b_switch == 1, b_y, 0.0), BLOCK_R, BLOCK_W)
    b_bottom = _join_row(tl.where(b_switch == 2, b_y, 0.0), tl.where(b_switch == 3, b_y, 0.0), BLOCK_R, BLOCK_W)
    tl.store(x + i_x + o_x, b_top, mask=m_r & m_row)
    tl.store(x + i_x + W + o_x, b_bottom, mask=m_bottom & m_row)


@jit
def _gather_rows_kernel(
    x, switches, y, PAIRS, H, vectors,
    VECTOR: tl.constexpr, ODD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """y = S x of x `[P, H, W]`. Grid: blocks of pairs × blocks of columns. Moves: see above."""
    W = vectors * VECTOR
    i_x, i_y, o_x, o_y, _, m_r, m_row, m_w = _rows_tile(PAIRS, H, W, ODD, BLOCK_R, BLOCK_W)
    b_switch = tl.load(switches + i_y + o_y, mask=m_r & m_w, other=0)
    b_top = tl.load(x + i_x + o_x, mask=m_r & m_row, other=0.0)
    b_bottom = tl.load(x + i_x + W + o_x, mask=m_r & m_row, other=0.0)
    b_a, b_b = _split_row(b_top, BLOCK_R, BLOCK_W)
    b_c, b_d = _split_row(b_bottom, BLOCK_R, BLOCK_W)
    tl.store(y + i_y + o_y, _pointed_at(b_switch, b_a, b_b, b_c, b_d), mask=m_r & m_w)


def pool(x: Tensor, y: Tensor, switches: Tensor) -> None:
    """Fill `y` and `switches` `[N, C, ⌊H/2⌋, ⌊W/2⌋]` from `x [N, C, H, W]`, all dense in one format."""
    _launch(x, (x, y, switches), _pool_columns_kernel, _pool_rows_kernel)


def unpool(y: Tensor, switches: Tensor, x: Tensor) -> None:
    """Fill `x`; the shapes and formats are those of `pool`."""
    _launch(x, (y, switches, x), _unpool_columns_kernel, _unpool_rows_kernel)


def gather(x: Tensor, switches: Tensor, y: Tensor) -> None:
    """Fill `y` with the values of `x` at the `switches`; the shapes and formats are those of `pool`."""
    _launch(x, (x, switches, y), _gather_columns_kernel, _gather_rows_kernel)


@runtime.launches_on_its_device
def _launch(x: Tensor, tensors: tuple[Tensor, ...], columns_kernel: Any, rows_kernel: Any) -> None:
    """One program per tile, with one vector of each corner, or of each row of a pair, per thread."""
    (height, width), (p, _, c) = x.shape[2:], runtime.as_prq(x)
    pairs, columns = p * ceil_div(height, 2), ceil_div(width, 2)
    odd = height % 2 == 1
    widest = 16 // x.element_size()
    if c > 1:
        vector = gcd(c, widest)
        per_thread = max(vector, 4)
        # A power of two that divides C leaves no lane idle; below 32 channels idle lanes cost less than short accesses.
        block_c = min(c & -c if c & -c >= 32 else power_of_two(c), _THREADS * per_thread)
        block_w = min(power_of_two(columns), _THREADS * per_thread // block_c)
        grid = (pairs, ceil_div(columns, block_w), ceil_div(c, block_c))
        check_extent(x, grid)
        columns_kernel[grid](
            *tensors, height, width, c // vector,
            VECTOR=vector, ODD=odd, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=_warps(block_w * block_c, per_thread),
        )  # fmt: skip
    else:
        vector = gcd(width, widest)
        # A thread's windows are those of its vector of x: with more of them y would need another layout over threads
        # than x, and a conversion through shared memory.
        per_thread = max(vector // 2, 2)
        block_w = min(power_of_two(columns), _THREADS * per_thread)
        block_r = min(power_of_two(pairs), _THREADS * per_thread // block_w)
        grid = (ceil_div(pairs, block_r), ceil_div(columns, block_w), 1)
        check_extent(x, grid)
        rows_kernel[grid](
            *tensors, pairs, height, width // vector,
            VECTOR=vector, ODD=odd, BLOCK_R=block_r, BLOCK_W=block_w, num_warps=_warps(block_r * block_w, per_thread),
        )  # fmt: skip


def _warps(windows: int, per_thread: int) -> int:
    return max(1, windows // (32 * per_thread))


def check_extent(x: Tensor, grid: tuple[int, int, int]) -> None:
    """Raise if 32 bits cannot count the programs or the elements within a row of dense `x [N, C, H, W]`.

    Raises:
        ValueError: `x` has too many of either.
    """
    row = x.shape[3] * runtime.as_prq(x)[2]
    if row >= 2**31:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: a row holds {row} elements, the kernels take up to {2**31 - 1}"
        )
    if any(blocks > limit for blocks, limit in zip(grid, _GRID_LIMITS, strict=True)):
        raise ValueError(f"x has shape {tuple(x.shape)}: it takes {grid} programs, CUDA allows {_GRID_LIMITS}")
