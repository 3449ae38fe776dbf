# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""Where a norm writes its result: enlarged, with a border, ready for the next convolution.

Legend: z `[N, C, H, W]` what the norm computes, s the enlargement (1 or 2, nearest neighbour), (left, right, top,
bottom) the border in pixels of the enlarged picture, y `[N, C, s·H + top + bottom, s·W + left + right]`.

    u = enlarge(z):  u[h, w] = z[⌊h/s⌋, ⌊w/s⌋]        y = border(u)

    border   reflect    y[top − 1 − i] = u[i + 1]     mirrored about the border pixel, which is not repeated
             symmetric  y[top − 1 − i] = u[i]         mirrored with it; by one pixel: PyTorch's "replicate"
             zeros      y[top − 1 − i] = 0

(and likewise at the other three sides). Both steps copy, so their adjoint adds: dz[h, w] is the sum of dy over all
places that z[h, w] was copied to. A pixel has s² own places, and each of them at most one mirror image per direction
where the mirrored strips of a side do not overlap, s·H ≥ top + bottom + 2·skip; so the kernels ask for that. Smaller
pictures go the long way: the norm, then `place`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.runtime import jit, tl

# How many pixels at the border a mirror image leaves out.
_SKIP = {"reflect": 1, "symmetric": 0, "zeros": 0}


@dataclass(frozen=True)
class Placement:
    """Enlargement and border; `border` is (left, right, top, bottom), as in `torch.nn.functional.pad`."""

    upsample: int = 1
    border: tuple[int, ...] = (0, 0, 0, 0)
    mode: str = "reflect"

    @property
    def trivial(self) -> bool:
        return self.upsample == 1 and self.border == (0, 0, 0, 0)

    @property
    def skip(self) -> int:
        return _SKIP[self.mode]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what is written."""
        left, right, top, bottom = self.border
        return self.upsample * height + top + bottom, self.upsample * width + left + right

    def shape(self, x: Tensor) -> tuple[int, int, int, int]:
        return (x.shape[0], x.shape[1], *self.size(x.shape[2], x.shape[3]))

    def fits_kernels(self, height: int, width: int) -> bool:
        """Whether no pixel has two mirror images in one direction."""
        left, right, top, bottom = self.border
        rows, columns = self.upsample * height, self.upsample * width
        return rows >= top + bottom + 2 * self.skip and columns >= left + right + 2 * self.skip

    def constants(self) -> dict[str, int | bool]:
        """The compile-time parameters of the kernels that place."""
        left, right, top, bottom = self.border
        return {
            "PLACED": not self.trivial,
            "UP": self.upsample,
            "LEFT": left,
            "RIGHT": right,
            "TOP": top,
            "BOTTOM": bottom,
            "SKIP": self.skip,
            "ZEROS": self.mode == "zeros",
        }


def parse(
    x: Tensor, upsample: int, padding: int | Sequence[int], padding_mode: str
) -> tuple[int, tuple[int, ...], str]:
    """The arguments of a `Placement`, checked against `x [N, C, H, W]`.

    Raises:
        ValueError: unknown mode, an enlargement other than 1 or 2, or a border that is negative, not one or four
            numbers, or wider than what it mirrors.
    """
    if upsample not in (1, 2):
        raise ValueError(f"upsample is {upsample}, expected 1 or 2")
    border = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    if len(border) != 4 or min(border) < 0:
        raise ValueError(f"padding is {padding}, expected a number or (left, right, top, bottom), none negative")
    if padding_mode not in _SKIP:
        raise ValueError(f"padding_mode is {padding_mode!r}, expected one of {', '.join(map(repr, _SKIP))}")
    if padding_mode != "zeros":
        left, right, top, bottom = border
        height, width = upsample * x.shape[2], upsample * x.shape[3]
        skip = _SKIP[padding_mode]
        if max(top, bottom) > height - skip or max(left, right) > width - skip:
            raise ValueError(
                f"padding is {border} (left, right, top, bottom), but mode {padding_mode!r} can mirror at most "
                f"{max(0, height - skip)} rows and {max(0, width - skip)} columns of a picture of {height} × {width}"
            )
    return upsample, border, padding_mode


def place(z: Tensor, placement: Placement) -> Tensor:
    """y of the module's docstring by PyTorch's copies, in z's memory format; z itself where there is nothing to do."""
    if placement.trivial:
        return z
    s, skip = placement.upsample, placement.skip
    left, right, top, bottom = placement.border
    height, width = s * z.shape[2], s * z.shape[3]
    y = runtime.allocate_like(z, placement.shape(z))
    rows = y[:, :, top : top + height]
    inside = rows[..., left : left + width]
    for i in range(s):
        for j in range(s):
            inside[:, :, i::s, j::s] = z
    if placement.mode == "zeros":
        for strip in _strips(y, placement):
            strip.zero_()
        return y
    rows[..., :left] = inside[..., skip : skip + left].flip(3)
    rows[..., left + width :] = inside[..., width - skip - right : width - skip].flip(3)
    y[:, :, :top] = rows[:, :, skip : skip + top].flip(2)
    y[:, :, top + height :] = rows[:, :, height - skip - bottom : height - skip].flip(2)
    return y


def place_adjoint(dy: Tensor, placement: Placement) -> Tensor:
    """dz of the module's docstring by PyTorch's additions, dense in dy's memory format."""
    if placement.trivial:
        return dy
    s, skip = placement.upsample, placement.skip
    left, right, top, bottom = placement.border
    height, width = dy.shape[2] - top - bottom, dy.shape[3] - left - right
    memory_format = runtime.memory_format_of(dy)
    rows = dy[:, :, top : top + height]
    if placement.mode == "zeros":
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


def place_reference(z: Tensor, placement: Placement) -> Tensor:
    """y of the module's docstring in differentiable PyTorch."""
    left, right, top, bottom = placement.border
    u = z.repeat_interleave(placement.upsample, 2).repeat_interleave(placement.upsample, 3)
    if placement.mode == "zeros":
        return torch.nn.functional.pad(u, placement.border)
    skip = placement.skip
    rows, columns = (
        torch.cat([inner[skip : skip + low].flip(0), inner, inner[side - skip - high : side - skip].flip(0)])
        for side, low, high in ((u.shape[2], top, bottom), (u.shape[3], left, right))
        for inner in [torch.arange(side, device=z.device)]
    )
    return u[:, :, rows[:, None], columns]


def own_places(y: Tensor, placement: Placement, size: Sequence[int]) -> Tensor:
    """z out of y, as a view; `size` is z's height and width."""
    left, _, top, _ = placement.border
    s = placement.upsample
    return y[:, :, top : top + s * size[0] : s, left : left + s * size[1] : s]


def border_around(outer: Tensor, inner: Tensor) -> int:
    """How much larger `outer` is at each side."""
    return (outer.shape[2] - inner.shape[2]) // 2


def inside(outer: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of `outer`, of height and width `size`, as a view."""
    border = (outer.shape[2] - size[0]) // 2
    return outer[:, :, border : border + size[0], border : border + size[1]]


def _strips(y: Tensor, placement: Placement) -> tuple[Tensor, ...]:
    left, right, top, bottom = placement.border
    bottom, right = y.shape[2] - bottom, y.shape[3] - right
    return y[:, :, :top], y[:, :, bottom:], y[:, :, top:bottom, :left], y[:, :, top:bottom, right:]


@jit
def _mirrored(o_u, size, LOW: tl.constexpr, HIGH: tl.constexpr, SKIP: tl.constexpr):
    """Where the mirror images of the places `o_u` < `size` lie along one direction, and which have one."""
    o_v = size - 1 - o_u
    m_low = (o_u >= SKIP) & (o_u < LOW + SKIP)
    m_high = (o_v >= SKIP) & (o_v < HIGH + SKIP)
    return tl.where(m_low, LOW - 1 + SKIP - o_u, LOW + size + o_v - SKIP), m_low | m_high


@jit
def image(o_r, m_r, H, W, d, UP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TOP: tl.constexpr,
          BOTTOM: tl.constexpr, SKIP: tl.constexpr):  # fmt: skip
    """Positions in y of the d-th image of the positions `o_r` of z, d < 4·UP², and which of them have it.

    d counts the UP² own places by four: itself, mirrored along w, along h, along both.
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
def store_placed(p_y, b_y, o_r, m_r, o_q, m_q, first, last, H, W, Q, UP: tl.constexpr, LEFT: tl.constexpr,
                 RIGHT: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr, SKIP: tl.constexpr,
                 ZEROS: tl.constexpr):  # fmt: skip
    """Writes the rows `o_r` of z, all in [first, last), to all their places in the plane at `p_y`."""
    near = _near_top_or_bottom(first, last, H, W, UP, TOP, BOTTOM, SKIP)
    for d in range(4 * UP * UP):
        if near | (d // 2 % 2 == 0):
            o_t, m_t = image(o_r, m_r, H, W, d, UP, LEFT, RIGHT, TOP, BOTTOM, SKIP)
            b_out = b_y
            if ZEROS:
                b_out = tl.where(d % 4 == 0, b_y, 0.0)
            tl.store(p_y + o_t[:, None] * Q + o_q[None, :], b_out, mask=m_t[:, None] & m_q[None, :])


@jit
def load_placed_adjoint(p_dy, o_r, m_r, o_q, m_q, first, last, H, W, Q, UP: tl.constexpr, LEFT: tl.constexpr,
                        RIGHT: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr, SKIP: tl.constexpr,
                        ZEROS: tl.constexpr):  # fmt: skip
    """Σ of dy over all places of the rows `o_r` of z, fp32. The own places' loads are all under way before a sum."""
    b_g = tl.zeros([o_r.shape[0], o_q.shape[0]], tl.float32)
    for d in tl.static_range(UP * UP):
        o_t, m_t = image(o_r, m_r, H, W, 4 * d, UP, LEFT, RIGHT, TOP, BOTTOM, SKIP)
        m_dy = m_t[:, None] & m_q[None, :]
        b_g += tl.load(p_dy + o_t[:, None] * Q + o_q[None, :], mask=m_dy, other=0.0).to(tl.float32)
    if not ZEROS:
        near = _near_top_or_bottom(first, last, H, W, UP, TOP, BOTTOM, SKIP)
        for d in range(4 * UP * UP):
            if (d % 4 != 0) & (near | (d // 2 % 2 == 0)):
                o_t, m_t = image(o_r, m_r, H, W, d, UP, LEFT, RIGHT, TOP, BOTTOM, SKIP)
                m_dy = m_t[:, None] & m_q[None, :]
                b_g += tl.load(p_dy + o_t[:, None] * Q + o_q[None, :], mask=m_dy, other=0.0).to(tl.float32)
    return b_g
