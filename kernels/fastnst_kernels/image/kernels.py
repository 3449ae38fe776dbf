# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""The kernels of images at the ends of networks, and the checks that their ops share.

Legend: as in `uint8_to_input.py` and `output_to_vgg_input.py`. Three channels do not fill a vector, so a row of an
image counts as a line of 3·W numbers: number e is channel e mod 3, and its neighbours along the width are e ± 3. A
program has a tile of rows × numbers. Accesses have 16 bytes if rows begin at multiples of 16 bytes, except for
neighbours along the width, 3 numbers away: these are read number by number from the L1 cache, which holds the tile.

Bytes, E numbers of e bytes: see each kernel. The rows above and below a tile are read again, from L2.

tanh x is computed as 2σ(2x) − 1, with an error of 10⁻⁷ at most, for values of size 1 a rounding of fp32.

Limits: ⌈rows / 8⌉·N below 2³¹, 3·W·9 below 2³¹.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.runtime import ceil_div, jit, power_of_two, tl

# 16 numbers per thread. 256 in a row divide 3·256, and 8 rows make one more, read again, an eighth.
_ROWS, _BLOCK, _WARPS = 8, 256, 4
_INPUT_BLOCK = 1024  # of a row that is padded: 3·(256 + 2·40) = 1008


@jit
def _mirror(o, side):
    """The pixel of `side` ≥ 2 pixels at position `o`, which may be negative or beyond the side."""
    o = tl.abs(o) % (2 * side - 2)
    return tl.minimum(o, 2 * side - 2 - o)


@jit
def _uint8_to_input_kernel(
    images, scale, shift, y, factor, H, W, x_vectors, y_vectors,
    PADDING: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = factor·scale[c]·x + shift[c], mirrored. Grid: rows of y × blocks of a row.

    Moves E bytes in and y out; the pixels that the padding mirrors are read again.
    """
    X = x_vectors * VECTOR
    Y = y_vectors * VECTOR
    rows = H + 2 * PADDING
    i_row = tl.program_id(0)
    i_n = i_row // rows
    i_h = i_row - i_n * rows
    o_e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < Y
    o_c = o_e % 3
    if PADDING > 0:
        i_h = _mirror(i_h - PADDING, H)
        p_x = images + (i_n.to(tl.int64) * H + i_h) * X
        # The inside is contiguous and read in vectors; only the padding is read number by number.
        m_inside = (o_e >= 3 * PADDING) & (o_e < 3 * PADDING + X)
        b_x = tl.load(p_x + (o_e - 3 * PADDING), mask=m_inside, other=0).to(tl.float32)
        o_x = 3 * _mirror(o_e // 3 - PADDING, W) + o_c
        m_padding = m_e & (m_inside == 0)
        b_x += tl.load(p_x + o_x, mask=m_padding, other=0).to(tl.float32)
    else:
        p_x = images + i_row.to(tl.int64) * X
        b_x = tl.load(p_x + o_e, mask=m_e, other=0).to(tl.float32)
    b_y = b_x * factor
    if scale is not None:
        b_y = b_x * (factor * tl.load(scale + o_c).to(tl.float32))
    if shift is not None:
        b_y += tl.load(shift + o_c).to(tl.float32)
    tl.store(y + i_row.to(tl.int64) * Y + o_e, b_y, mask=m_e)


@jit
def _activation(b_z, TANH: tl.constexpr):
    b_z = b_z.to(tl.float32)
    if TANH:
        b_z = 2.0 * tl.sigmoid(2.0 * b_z) - 1.0
    return b_z


@jit
def _output_to_vgg_input_kernel(
    z, mean, gain, u, partial, factor, offset, n_strips, z_rows, H, top, left_vectors, z_vectors, u_vectors,
    TANH: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """u, and per program the sums over its tile. Grid: N · strips of ROWS rows of u × blocks of a row.

    Moves E·e in, E·e out and 12 bytes per program: a difference belongs to the upper or left one of its two numbers.
    """
    Z = z_vectors * VECTOR
    U = u_vectors * VECTOR
    i_strip = tl.program_id(0)
    i_n = (i_strip // n_strips).to(tl.int64)
    i_h = i_strip % n_strips * ROWS
    o_r = tl.arange(0, ROWS)[:, None]
    o_e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_s = (i_h + o_r < H) & (o_e < U)
    m_below = m_s & (i_h + o_r + 1 < H)
    m_right = m_s & (o_e + 3 < U)
    p_z = z + (i_n * z_rows + top + i_h) * Z + left_vectors * VECTOR
    o_z = o_r * Z + o_e
    b_z = tl.load(p_z + o_z, mask=m_s, other=0.0)
    b_below = tl.load(p_z + Z + o_z, mask=m_below, other=0.0)
    b_right = tl.load(p_z + 3 + o_z, mask=m_right, other=0.0)
    b_s = factor * _activation(b_z, TANH) + offset
    b_below = tl.where(m_below, factor * _activation(b_below, TANH) + offset - b_s, 0.0)
    b_right = tl.where(m_right, factor * _activation(b_right, TANH) + offset - b_s, 0.0)
    b_mean = tl.load(mean + o_e % 3).to(tl.float32)
    b_gain = tl.load(gain + o_e % 3).to(tl.float32)
    tl.store(u + (i_n * H + i_h) * U + o_r * U + o_e, (b_s - b_mean) * b_gain, mask=m_s)
    p_partial = partial + (i_strip.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(p_partial, tl.sum(b_below * b_below))
    tl.store(p_partial + 1, tl.sum(b_right * b_right))
    tl.store(p_partial + 2, tl.sum(tl.where(m_s, b_s * 0.0, 0.0)))


@jit
def _output_to_vgg_input_backward_kernel(
    z, du, gain, dz, d_variation, watch, factor, vertical, horizontal, n_strips, z_rows, H, top, left_vectors,
    z_vectors, u_vectors,
    TANH: tl.constexpr, VARIATION: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz, zeros around the window included. Grid: N · strips of ROWS rows of z × blocks of a row.

    Moves z and du in and dz out. `vertical` and `horizontal` are 2·factor times the weights of the sums.
    """
    Z = z_vectors * VECTOR
    U = u_vectors * VECTOR
    i_strip = tl.program_id(0)
    i_n = (i_strip // n_strips).to(tl.int64)
    i_h = i_strip % n_strips * ROWS
    o_r = tl.arange(0, ROWS)[:, None]
    o_e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    o_h = i_h - top + o_r
    o_w = o_e - left_vectors * VECTOR
    m_s = (o_h >= 0) & (o_h < H) & (o_w >= 0) & (o_w < U)
    p_z = z + (i_n * z_rows + i_h) * Z
    o_z = o_r * Z + o_e
    b_s = _activation(tl.load(p_z + o_z, mask=m_s, other=0.0), TANH)
    b_du = tl.load(du + (i_n * H + i_h - top) * U + o_r * U + o_w, mask=m_s, other=0.0).to(tl.float32)
    b_d = b_du * tl.load(gain + o_e % 3).to(tl.float32)
    if VARIATION:
        m_up, m_down = m_s & (o_h >= 1), m_s & (o_h + 1 < H)
        m_left, m_right = m_s & (o_w >= 3), m_s & (o_w + 3 < U)
        b_up = _activation(tl.load(p_z - Z + o_z, mask=m_up, other=0.0), TANH)
        b_down = _activation(tl.load(p_z + Z + o_z, mask=m_down, other=0.0), TANH)
        b_left = _activation(tl.load(p_z - 3 + o_z, mask=m_left, other=0.0), TANH)
        b_right = _activation(tl.load(p_z + 3 + o_z, mask=m_right, other=0.0), TANH)
        b_v = tl.where(m_up, b_s - b_up, 0.0) - tl.where(m_down, b_down - b_s, 0.0)
        b_h = tl.where(m_left, b_s - b_left, 0.0) - tl.where(m_right, b_right - b_s, 0.0)
        b_v = vertical * b_v + horizontal * b_h
        if d_variation is not None:
            b_v *= tl.load(d_variation).to(tl.float32)
        b_d += b_v
    b_d *= factor
    if TANH:
        b_d *= 1.0 - b_s * b_s
    if watch is not None:
        b_d += tl.load(watch).to(tl.float32)
    m_z = (i_h + o_r < z_rows) & (o_e < Z)
    tl.store(dz + (i_n * z_rows + i_h) * Z + o_z, tl.where(m_s, b_d, 0.0), mask=m_z)


@runtime.launches_on_its_device
def uint8_to_input(
    images: Tensor, factor: float, scale: Tensor | None, shift: Tensor | None, y: Tensor, padding: int
) -> None:
    """Fill `y` `[N, 3, H + 2·padding, W + 2·padding]` from uint8 `[N, 3, H, W]`; both are channels_last."""
    n, _, height, width = images.shape
    x_row, y_row = 3 * width, 3 * y.shape[3]
    vector = gcd(16 // y.element_size(), x_row, y_row)
    block = min(power_of_two(y_row), _INPUT_BLOCK)
    grid = (n * y.shape[2], ceil_div(y_row, block))
    _check_extent("images", y, grid)
    _uint8_to_input_kernel[grid](
        images, scale, shift, y, factor, height, width, x_row // vector, y_row // vector,
        PADDING=padding, VECTOR=vector, BLOCK=block, num_warps=max(1, block // (32 * 8)),
    )  # fmt: skip


@runtime.launches_on_its_device
def output_to_vgg_input(
    z: Tensor,
    mean: Tensor,
    gain: Tensor,
    u: Tensor,
    window: Sequence[int],
    tanh: bool,
    factor: float,
    offset: float,
) -> Tensor:
    """Fill `u` and return the sums per tile, `[N, tiles, 3]`; `z` and `u` are channels_last."""
    n, (top, left, height, width) = z.shape[0], window
    strips = ceil_div(height, _ROWS)
    grid = (n * strips, ceil_div(3 * width, _BLOCK))
    _check_extent("z", z, grid)
    partial = runtime.allocate((n, strips * grid[1], 3), z, torch.float32)
    vector = _vector(z, u, left)
    _output_to_vgg_input_kernel[grid](
        z, mean, gain, u, partial, factor, offset, strips, z.shape[2], height, top, 3 * left // vector,
        3 * z.shape[3] // vector, 3 * width // vector,
        TANH=tanh, VECTOR=vector, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return partial


@runtime.launches_on_its_device
def output_to_vgg_input_backward(
    z: Tensor,
    du: Tensor,
    gain: Tensor,
    dz: Tensor,
    window: Sequence[int],
    tanh: bool,
    factor: float,
    variation: Sequence[float],
    d_variation: Tensor | None,
    watch: Tensor | None,
) -> None:
    """Fill `dz`, of z's shape; `z`, `du` and `dz` are channels_last."""
    n, (top, left, height, width) = z.shape[0], window
    strips = ceil_div(z.shape[2], _ROWS)
    grid = (n * strips, ceil_div(3 * z.shape[3], _BLOCK))
    _check_extent("z", z, grid)
    vector = _vector(z, du, left)
    vertical, horizontal = (2.0 * weight * factor for weight in variation)
    _output_to_vgg_input_backward_kernel[grid](
        z, du, gain, dz, d_variation, watch, factor, vertical, horizontal, strips, z.shape[2], height, top,
        3 * left // vector, 3 * z.shape[3] // vector, 3 * width // vector,
        TANH=tanh, VARIATION=any(variation), VECTOR=vector, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip


def _vector(z: Tensor, u: Tensor, left: int) -> int:
    """The largest vector, in numbers, that the rows of z and of u and the window in z are aligned to."""
    return gcd(16 // min(z.element_size(), u.element_size()), 3 * z.shape[3], 3 * u.shape[3], 3 * left)


def allocate(n: int, height: int, width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`[N, 3, height, width]`, channels_last."""
    return runtime.allocate((n, height, width, 3), like, dtype).permute(0, 3, 1, 2)


def check_three_channels(name: str, x: Tensor) -> None:
    runtime.check_tensor(name, x)
    if x.dim() != 4 or x.shape[1] != 3 or x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [N, 3, H, W] with at least one pixel")


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in runtime.REFERENCE_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected float32, float16, bfloat16 or float64")


def _check_extent(name: str, x: Tensor, grid: tuple[int, int]) -> None:
    """Raise if 32 bits cannot count the programs or the numbers within a tile.

    Raises:
        ValueError: `x` `[N, 3, H, W]` has too many of either.
    """
    numbers = 3 * x.shape[3] * (_ROWS + 1)
    if numbers >= 2**31 or grid[0] >= 2**31 or grid[1] > 65535:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: it takes {grid} programs of {numbers} numbers in {_ROWS + 1} rows, "
            f"the kernels take up to {(2**31 - 1, 65535)} and {2**31 - 1}"
        )
