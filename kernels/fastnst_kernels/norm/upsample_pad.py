# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""Nearest-neighbour upsampling and padding of a norm's result, for an unpadded next convolution.

Legend: z `[N, C, H, W]` the norm's result, s the upsampling factor (1 or 2), (left, right, top, bottom) the padding in
pixels of the upsampled image, y `[N, C, s·H + top + bottom, s·W + left + right]`.

    u = upsample(z):  u[h, w] = z[⌊h/s⌋, ⌊w/s⌋]        y = pad(u)

    mode     reflect    y[top − 1 − i] = u[i + 1]     mirrored about the border pixel, which is not repeated
             symmetric  y[top − 1 − i] = u[i]         mirrored with it; by one pixel: PyTorch's "replicate"
             zeros      y[top − 1 − i] = 0

(and likewise at the other three sides). Both steps copy, so their adjoint adds: dz[h, w] is the sum of dy over all
copies of z[h, w]. A pixel has s² unmirrored copies, and each of them at most one mirror image per direction if the
mirrored strips of a side do not overlap, s·H ≥ top + bottom + 2·skip. The kernels require that; for smaller images
`upsample_pad` runs after the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.runtime import jit, tl

# How many pixels at the border a mirror image skips.
_SKIP = {"reflect": 1, "symmetric": 0, "zeros": 0}


@dataclass(frozen=True)
class UpsamplePad:
    """Upsampling factor and padding (left, right, top, bottom), as in `torch.nn.functional.pad`."""

    upsample: int = 1
    padding: tuple[int, ...] = (0, 0, 0, 0)
    mode: str = "reflect"

    @classmethod
    def checked(cls, x: Tensor, upsample: int, padding: int | Sequence[int], padding_mode: str) -> UpsamplePad:
        """The arguments of a norm of `x [N, C, H, W]`.

        Raises:
            ValueError: the mode is unknown, the factor is not 1 or 2, or the padding is negative, not one or four
                numbers, or wider than what it mirrors.
        """
        if not runtime.is_integer(upsample) or upsample not in (1, 2):
            raise ValueError(f"upsample is {upsample}, expected 1 or 2")
        sides = tuple(padding) if isinstance(padding, Sequence) else (padding,) * 4
        if len(sides) != 4 or not all(map(runtime.is_integer, sides)) or min(sides) < 0:
            raise ValueError(f"padding is {padding}, expected a number or (left, right, top, bottom), none negative")
        if padding_mode not in _SKIP:
            raise ValueError(f"padding_mode is {padding_mode!r}, expected one of {', '.join(map(repr, _SKIP))}")
        left, right, top, bottom = sides
        height, width = upsample * x.shape[2], upsample * x.shape[3]
        skip = _SKIP[padding_mode]
        if padding_mode != "zeros" and (max(top, bottom) > height - skip or max(left, right) > width - skip):
            raise ValueError(
                f"padding is {sides} (left, right, top, bottom), but mode {padding_mode!r} can mirror at most "
                f"{max(0, height - skip)} rows and {max(0, width - skip)} columns of an image of {height} × {width}"
            )
        return cls(upsample, sides, padding_mode)

    @classmethod
    def zeros(cls, width: int) -> UpsamplePad:
        """`width` zeros at each side."""
        return cls(1, (width,) * 4, "zeros")

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> UpsamplePad:
        """The inverse of `as_ints`."""
        return cls(values[0], tuple(values[1:5]), list(_SKIP)[values[5]])

    def as_ints(self) -> list[int]:
        """All fields as one `int[]`, which an op's schema can hold."""
        return [self.upsample, *self.padding, list(_SKIP).index(self.mode)]

    @property
    def is_identity(self) -> bool:
        return self.upsample == 1 and self.padding == (0, 0, 0, 0)

    @property
    def skip(self) -> int:
        return _SKIP[self.mode]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result."""
        left, right, top, bottom = self.padding
        return self.upsample * height + top + bottom, self.upsample * width + left + right

    def shape(self, x: Tensor) -> tuple[int, int, int, int]:
        return (x.shape[0], x.shape[1], *self.size(x.shape[2], x.shape[3]))

    def supports_kernels(self, height: int, width: int) -> bool:
        """Whether no pixel has two mirror images in one direction."""
        left, right, top, bottom = self.padding
        rows, columns = self.upsample * height, self.upsample * width
        return rows >= top + bottom + 2 * self.skip and columns >= left + right + 2 * self.skip

    def constants(self) -> dict[str, int | bool]:
        """The compile-time parameters of the kernels."""
        left, right, top, bottom = self.padding
        return {
            "UPSAMPLE_PAD": not self.is_identity,
            "UP": self.upsample,
            "LEFT": left,
            "RIGHT": right,
            "TOP": top,
            "BOTTOM": bottom,
            "SKIP": self.skip,
            "ZEROS": self.mode == "zeros",
        }


def upsample_pad(z: Tensor, pad: UpsamplePad) -> Tensor:
    """y of the module's docstring by PyTorch copies, in z's memory format; z itself for the identity."""
    if pad.is_identity:
        return z
    s, skip = pad.upsample, pad.skip
    left, right, top, bottom = pad.padding
    height, width = s * z.shape[2], s * z.shape[3]
    y = runtime.allocate_like(z, pad.shape(z))
    rows = y[:, :, top : top + height]
    inside = rows[..., left : left + width]
    for i in range(s):
        for j in range(s):
            inside[:, :, i::s, j::s] = z
    if pad.mode == "zeros":
        for strip in (y[:, :, :top], y[:, :, top + height :], rows[..., :left], rows[..., left + width :]):
            strip.zero_()
        return y
    rows[..., :left] = inside[..., skip : skip + left].flip(3)
    rows[..., left + width :] = inside[..., width - skip - right : width - skip].flip(3)
    y[:, :, :top] = rows[:, :, skip : skip + top].flip(2)
    y[:, :, top + height :] = rows[:, :, height - skip - bottom : height - skip].flip(2)
    return y


def upsample_pad_adjoint(dy: Tensor, pad: UpsamplePad) -> Tensor:
    """dz of the module's docstring by PyTorch additions, dense in dy's memory format."""
    if pad.is_identity:
        return dy
    s, skip = pad.upsample, pad.skip
    left, right, top, bottom = pad.padding
    height, width = dy.shape[2] - top - bottom, dy.shape[3] - left - right
    memory_format = runtime.memory_format_of(dy)
    rows = dy[:, :, top : top + height]
    if pad.mode == "zeros":
        dz = rows[..., left : left + width]
    else:
        rows = rows.clone(memory_format=memory_format)
        rows[:, :, skip : skip + top] += dy[:, :, :top].flip(2)
        rows[:, :, height - skip - bottom : height - skip] += dy[:, :, top + height :].flip(2)
        dz = rows[..., left : left + width]
        dz[..., skip : skip + left] += rows[..., :left].flip(3)
        dz[..., width - skip - right : width - skip] += rows[..., left + width :].flip(3)
    if s > 1:
        dz = dz[:, :, ::2, ::2] + dz[:, :, ::2, 1::2] + dz[:, :, 1::2, ::2] + dz[:, :, 1::2, 1::2]
    return dz.contiguous(memory_format=memory_format)


def upsample_pad_reference(z: Tensor, pad: UpsamplePad) -> Tensor:
    """y of the module's docstring in differentiable PyTorch."""
    left, right, top, bottom = pad.padding
    u = z.repeat_interleave(pad.upsample, 2).repeat_interleave(pad.upsample, 3)
    if pad.mode == "zeros":
        return torch.nn.functional.pad(u, pad.padding)
    skip = pad.skip
    rows, columns = (
        torch.cat([inner[skip : skip + low].flip(0), inner, inner[side - skip - high : side - skip].flip(0)])
        for side, low, high in ((u.shape[2], top, bottom), (u.shape[3], left, right))
        for inner in [torch.arange(side, device=z.device)]
    )
    return u[:, :, rows[:, None], columns]


def unpadded(y: Tensor, pad: UpsamplePad, size: Sequence[int]) -> Tensor:
    """z out of y, as a view; `size` is z's height and width."""
    left, _, top, _ = pad.padding
    s = pad.upsample
    return y[:, :, top : top + s * size[0] : s, left : left + s * size[1] : s]


def margin(outer: Tensor, inner: Tensor) -> int:
    """How much larger `outer` is at each side."""
    return (outer.shape[2] - inner.shape[2]) // 2


def center_crop(outer: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of `outer`, of height and width `size`, as a view."""
    offset = (outer.shape[2] - size[0]) // 2
    return outer[:, :, offset : offset + size[0], offset : offset + size[1]]


@jit
def _mirrored(o_u, size, LOW: tl.constexpr, HIGH: tl.constexpr, SKIP: tl.constexpr):
    """The mirror images of the positions `o_u` < `size` along one direction, and which positions have one."""
    o_v = size - 1 - o_u
    m_low = (o_u >= SKIP) & (o_u < LOW + SKIP)
    m_high = (o_v >= SKIP) & (o_v < HIGH + SKIP)
    return tl.where(m_low, LOW - 1 + SKIP - o_u, LOW + size + o_v - SKIP), m_low | m_high


@jit
def copy_positions(o_r, m_r, H, W, d, UP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TOP: tl.constexpr,
                   BOTTOM: tl.constexpr, SKIP: tl.constexpr):  # fmt: skip
    """Positions in y of the d-th copy of the positions `o_r` of z, d < 4·UP², and which of them have it.

    d counts the UP² unmirrored copies by four: itself, mirrored along w, along h, along both.
    """
    o_h = o_r // W
    o_uh = o_h * UP + d // 4 // UP
    o_uw = (o_r - o_h * W) * UP + d // 4 % UP
    o_th = o_uh + TOP
    o_tw = o_uw + LEFT
    m = m_r
    if d // 2 % 2 == 1:
        o_th, m_mirrored = _mirrored(o_uh, H * UP, TOP, BOTTOM, SKIP)
        m = m & m_mirrored
    if d % 2 == 1:
        o_tw, m_mirrored = _mirrored(o_uw, W * UP, LEFT, RIGHT, SKIP)
        m = m & m_mirrored
    return o_th * (W * UP + LEFT + RIGHT) + o_tw, m


@jit
def _near_top_or_bottom(first, last, H, W, UP: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr,
                        SKIP: tl.constexpr):  # fmt: skip
    """Whether a position from `first` to before `last` may have a mirror image in another row."""
    near_top = first // W * UP < TOP + SKIP
    return near_top | (H * UP - 1 - (last - 1) // W * UP < BOTTOM + SKIP + UP)


@jit
def store_upsample_pad(p_y, b_y, o_r, m_r, o_q, m_q, first, last, H, W, Q, UP: tl.constexpr, LEFT: tl.constexpr,
                       RIGHT: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr, SKIP: tl.constexpr,
                       ZEROS: tl.constexpr):  # fmt: skip
    """Write the rows `o_r` of z, all in [first, last), to all their copies in the plane at `p_y`."""
    near = _near_top_or_bottom(first, last, H, W, UP, TOP, BOTTOM, SKIP)
    for d in range(4 * UP * UP):
        if near | (d // 2 % 2 == 0):
            o_t, m_t = copy_positions(o_r, m_r, H, W, d, UP, LEFT, RIGHT, TOP, BOTTOM, SKIP)
            b_out = b_y
            if ZEROS:
                b_out = tl.where(d % 4 == 0, b_y, 0.0)
            tl.store(p_y + o_t[:, None] * Q + o_q[None, :], b_out, mask=m_t[:, None] & m_q[None, :])


@jit
def load_upsample_pad_adjoint(p_dy, o_r, m_r, o_q, m_q, first, last, H, W, Q, UP: tl.constexpr, LEFT: tl.constexpr,
                              RIGHT: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr, SKIP: tl.constexpr,
                              ZEROS: tl.constexpr):  # fmt: skip
    """Σ of dy over all copies of the rows `o_r` of z, fp32; loads of unmirrored copies are issued first."""
    b_g = tl.zeros([o_r.shape[0], o_q.shape[0]], tl.float32)
    for d in tl.static_range(UP * UP):
        o_t, m_t = copy_positions(o_r, m_r, H, W, 4 * d, UP, LEFT, RIGHT, TOP, BOTTOM, SKIP)
        m_dy = m_t[:, None] & m_q[None, :]
        b_g += tl.load(p_dy + o_t[:, None] * Q + o_q[None, :], mask=m_dy, other=0.0).to(tl.float32)
    if not ZEROS:
        near = _near_top_or_bottom(first, last, H, W, UP, TOP, BOTTOM, SKIP)
        for d in range(4 * UP * UP):
            if (d % 4 != 0) & (near | (d // 2 % 2 == 0)):
                o_t, m_t = copy_positions(o_r, m_r, H, W, d, UP, LEFT, RIGHT, TOP, BOTTOM, SKIP)
                m_dy = m_t[:, None] & m_q[None, :]
                b_g += tl.load(p_dy + o_t[:, None] * Q + o_q[None, :], mask=m_dy, other=0.0).to(tl.float32)
    return b_g
