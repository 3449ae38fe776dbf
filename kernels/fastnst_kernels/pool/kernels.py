# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""Pooling kernels for windows of any size and stride, and the dispatch to those for 2×2 windows.

Legend: as in `max_pool`; tensors are `[P, H, W, Q]` in memory, channels_last with P = N and Q = C, contiguous with
P = N·C and Q = 1. Each program has a tile of one row of its output, columns × channels, so that no position needs a
division. Overlapping windows are read again from the L1 cache; beyond that each element moves once.

Limits: a row of x, W·C elements (contiguous: W), below 2³¹, as offsets within a row have 32 bits; the rest has 64.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.pool import kernels_2x2
from fastnst_kernels.runtime import ceil_div, jit, power_of_two, tl

_TILE = 1024  # elements of a program's output: eight per thread
_CHANNELS = 128  # of a tile at most, so that neighbouring windows, which overlap, mostly share a program


@jit
def _tile(W, Q, BLOCK_W: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The program's columns and channels, and the mask of those that exist."""
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    o_q = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    return o_w, o_q, (o_w < W) & (o_q < Q)


@jit
def _pool_kernel(
    x, y, switches, H, W, Q, OH, OW,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """y and switches. Grid: P·OH × blocks of OW × blocks of Q.

    Moves H·W in, OH·OW out per plane in x's dtype, and OH·OW bytes of switches.
    """
    i_row = tl.program_id(0)
    i_p = (i_row // OH).to(tl.int64)
    i_h = (i_row % OH).to(tl.int64)
    o_w, o_q, m_y = _tile(OW, Q, BLOCK_W, BLOCK_Q)
    o_x = o_w * (STRIDE * Q) + o_q
    p_x = x + (i_p * H + i_h * STRIDE) * (W * Q)
    b_max = tl.full([BLOCK_W, BLOCK_Q], float("-inf"), tl.float32)
    b_switch = tl.zeros([BLOCK_W, BLOCK_Q], tl.int32)
    for row in range(KERNEL):
        for column in range(KERNEL):
            b_x = tl.load(p_x + column * Q + o_x, mask=m_y, other=0.0).to(tl.float32)
            wins = (b_x > b_max) | (b_x != b_x)
            b_max = tl.where(wins, b_x, b_max)
            b_switch = tl.where(wins, row * KERNEL + column, b_switch)
        p_x += W * Q
    i_y = i_row.to(tl.int64) * (OW * Q)
    o_y = o_w * Q + o_q
    tl.store(y + i_y + o_y, b_max, mask=m_y)
    tl.store(switches + i_y + o_y, b_switch.to(tl.uint8), mask=m_y)


@jit
def _unpool_kernel(
    y, switches, x, H, W, Q, OH, OW,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """x = Sᵀy. Grid: P·H × blocks of W × blocks of Q.

    Each position checks the switches of the windows that cover it, nearest first: no atomics, the same bits every
    time, and a switch out of range is ignored. Moves OH·OW in with as many bytes of switches, H·W out per plane.
    """
    i_row = tl.program_id(0)
    i_p = (i_row // H).to(tl.int64)
    i_h = i_row % H
    o_w, o_q, m_x = _tile(W, Q, BLOCK_W, BLOCK_Q)
    b_sum = tl.zeros([BLOCK_W, BLOCK_Q], tl.float32)
    COVER: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    for above in range(COVER):
        i_oh = i_h // STRIDE - above
        row = i_h - i_oh * STRIDE
        m_row = (i_oh >= 0) & (i_oh < OH) & (row < KERNEL)
        i_y = (i_p * OH + i_oh) * (OW * Q)
        for left in range(COVER):
            o_ow = o_w // STRIDE - left
            o_column = o_w - o_ow * STRIDE
            m_y = m_x & m_row & (o_ow >= 0) & (o_ow < OW) & (o_column < KERNEL)
            o_y = o_ow * Q + o_q
            b_switch = tl.load(switches + i_y + o_y, mask=m_y, other=0).to(tl.int32)
            b_y = tl.load(y + i_y + o_y, mask=m_y, other=0.0).to(tl.float32)
            b_sum += tl.where(b_switch == row * KERNEL + o_column, b_y, 0.0)
    tl.store(x + i_row.to(tl.int64) * (W * Q) + o_w * Q + o_q, b_sum, mask=m_x)


@jit
def _gather_kernel(
    x, switches, y, H, W, Q, OH, OW,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """y = S x, 0 where a switch is out of range. Grid: P·OH × blocks of OW × blocks of Q.

    Moves at most H·W in, OH·OW out per plane, and OH·OW bytes of switches.
    """
    i_row = tl.program_id(0)
    i_p = (i_row // OH).to(tl.int64)
    i_h = (i_row % OH).to(tl.int64)
    o_w, o_q, m_y = _tile(OW, Q, BLOCK_W, BLOCK_Q)
    o_y = i_row.to(tl.int64) * (OW * Q) + o_w * Q + o_q
    b_switch = tl.load(switches + o_y, mask=m_y, other=0).to(tl.int32)
    o_row = i_p * H + i_h * STRIDE + b_switch // KERNEL
    o_x = o_row * (W * Q) + (o_w * STRIDE + b_switch % KERNEL) * Q + o_q
    tl.store(y + o_y, tl.load(x + o_x, mask=m_y & (b_switch < KERNEL * KERNEL), other=0.0), mask=m_y)


def pool(x: Tensor, y: Tensor, switches: Tensor, kernel_size: int, stride: int) -> None:
    """Fill `y` and `switches` `[N, C, OH, OW]` from `x [N, C, H, W]`; all dense in one format."""
    if kernel_size == stride == 2:
        kernels_2x2.pool(x, y, switches)
    else:
        _launch(x, y, y, _pool_kernel, (x, y, switches), kernel_size, stride)


def unpool(y: Tensor, switches: Tensor, x: Tensor, kernel_size: int, stride: int) -> None:
    """Fill `x` with Sᵀy; shapes and formats as in `pool`."""
    if kernel_size == stride == 2:
        kernels_2x2.unpool(y, switches, x)
    else:
        _launch(x, y, x, _unpool_kernel, (y, switches, x), kernel_size, stride)


def gather(x: Tensor, switches: Tensor, y: Tensor, kernel_size: int, stride: int) -> None:
    """Fill `y` with S x; shapes and formats as in `pool`."""
    if kernel_size == stride == 2:
        kernels_2x2.gather(x, switches, y)
    else:
        _launch(x, y, y, _gather_kernel, (x, switches, y), kernel_size, stride)


@runtime.launches_on_its_device
def _launch(
    large: Tensor, small: Tensor, over: Tensor, kernel: Any, tensors: tuple[Tensor, ...], kernel_size: int, stride: int
) -> None:
    """Tiles for the rows of `over`, which is `large [N, C, H, W]` or `small [N, C, OH, OW]`."""
    p, _, q = runtime.as_prq(large)
    height, width = over.shape[2:]
    block_q = min(power_of_two(q), _CHANNELS)
    block_w = min(power_of_two(width), _TILE // block_q)
    grid = (p * height, ceil_div(width, block_w), ceil_div(q, block_q))
    kernels_2x2.check_extent(large, grid)
    kernel[grid](
        *tensors, *large.shape[2:], q, *small.shape[2:],
        KERNEL=kernel_size, STRIDE=stride, BLOCK_W=block_w, BLOCK_Q=block_q, num_warps=4,
    )  # fmt: skip
