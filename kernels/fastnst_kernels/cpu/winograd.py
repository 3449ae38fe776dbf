"""3×3 convolutions at stride 1 on a CPU with a quarter of the multiplications: Winograd's F(4×4, 3×3).

It is part of this library because `conv.convolution` and the loss network's layers call it when they train on a CPU,
which spends most of its time in such convolutions.

Source: Lavin, Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4, in PyTorch's matrix products.
A tile y of 4×4 results comes from a tile d of 6×6 pixels, and neighbouring tiles of pixels overlap by 2:

    u = G g Gᵀ       v = Bᵀ d B       m = Σ_c u ⊙ v       y = Aᵀ m A

so that each of the 36 positions is one matrix product over channels, `[tiles, C] × [C, K]`: 36 multiplications per tile
and pair of channels instead of 144. The gradient of x is a convolution of the gradient of y with g turned by 180° and
its channels swapped, which reverses G's columns; that of g is y's transpose:

    ∂L/∂m = A (∂L/∂y) Aᵀ       ∂L/∂u = Σ_tiles v ⊙ ∂L/∂m       ∂L/∂g = Gᵀ (∂L/∂u) G

The matrices follow from six points at which polynomials are multiplied (Toom, Cook): 0, 1, −1, ½, −2 and ∞.
Intermediate values are larger than the result and cost some of its last bits, so it takes fp32 and fp64 only. A NaN or
an infinity spreads over the tiles that contain it.

No state outlives a call. v and m are computed for as many tiles as fit the cache together (a band), u for all channels
if several bands share it, else for as many channels of the result as fit the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
_TILE, _WINDOW = 4, 6
# Bytes of v and m, and of u, computed at a time. Found by trial on one machine with two cores.
_BAND_BYTES = 24 * 2**20
_FILTER_BYTES = 8 * 2**20


def is_faster(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 1) -> bool:
    """Whether `convolve` supports this convolution and is likely to be faster than PyTorch's.

    Not with few channels, whose transforms cost more than they save, few tiles, since u is computed for each call, or
    tiles that lie to a large part beyond the edge. Fake tensors and other subclasses take PyTorch's op, which counters
    of FLOPs and memory know.

    Args:
        x: `[N, C, H, W]`.
        weight: `[K, C, kh, kw]`.
        stride: of the convolution.
        padding: zeros around x.
    """
    if stride != 1 or padding > 2 or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    if x.device.type != "cpu" or x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64):
        return False
    outputs, inputs, *kernel = weight.shape
    height, width = (size + 2 * padding - 2 for size in x.shape[2:])
    if kernel != [3, 3] or min(inputs, outputs) < 64 or inputs * outputs < 64 * 128 or min(height, width) < 1:
        return False
    tiles = -(-height // _TILE) * -(-width // _TILE)
    return x.shape[0] * tiles >= 32 and 4 * tiles * _TILE**2 <= 5 * height * width


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 1, relu: bool = False) -> Tensor:
    """`conv2d` at stride 1, with an optional ReLU, without a gradient.

    Args:
        x: `[N, C, H, W]` on the CPU, fp32 or fp64.
        weight: `[K, C, 3, 3]` of x's type.
        bias: `[K]` of x's type.
        padding: zeros around x.
        relu: whether negative results become 0.

    Returns:
        `[N, K, H + 2·padding − 2, W + 2·padding − 2]`, channels_last.
    """
    return _convolve(x, weight, bias, padding, relu=relu, backward=False)


def input_gradient(gradient: Tensor, weight: Tensor, *, padding: int = 1) -> Tensor:
    """∂L/∂x of `convolve`, `[N, C, H + 2 − 2·padding, W + 2 − 2·padding]`, channels_last.

    `gradient` is ∂L/∂(its result) `[N, K, H, W]`; weight and padding are as there, the latter at most 2.
    """
    return _convolve(gradient, weight, None, 2 - padding, relu=False, backward=True)


def weight_gradient(x: Tensor, gradient: Tensor, *, padding: int = 1) -> Tensor:
    """∂L/∂weight of `convolve`, `[K, C, 3, 3]`, channels_last.

    `gradient` is ∂L/∂(its result) `[N, K, H + 2·padding − 2, W + 2·padding − 2]`; x and padding are as there.
    """
    matrices = _matrices(x.dtype)
    pixels, gradients = _pixels(x), _pixels(gradient)
    inputs, outputs = pixels.shape[3], gradients.shape[3]
    du = x.new_zeros(_WINDOW**2, outputs, inputs)
    for band in _bands(gradients.shape, inputs + outputs, x.element_size()):
        v = _both_ways(matrices.b, _windows(pixels, band, padding))
        dm = _both_ways(matrices.a, _tiles(gradients, band))
        du.baddbmm_(dm.view(_WINDOW**2, -1, outputs).mT, v.view(_WINDOW**2, -1, inputs))
    dg = _both_ways(matrices.g.t(), du.view(_WINDOW, _WINDOW, -1)).view(3, 3, outputs, inputs)
    return dg.permute(2, 0, 1, 3).contiguous().permute(0, 3, 1, 2)


class _Matrices(NamedTuple):
    """A `[6, 4]`, Bᵀ `[6, 6]` and G `[6, 3]` of Lavin and Gray's equations."""

    a: Tensor
    b: Tensor
    g: Tensor


class _Band(NamedTuple):
    """Some rows of tiles of some samples."""

    samples: slice
    first: int
    rows: int
    columns: int


@cache
def _matrices(dtype: torch.dtype) -> _Matrices:
    """Toom and Cook's matrices: values at the points, and Lagrange interpolation from them, transposed."""
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    points = torch.tensor(_POINTS, **exact)
    a, b, g = (torch.zeros(_WINDOW, columns, **exact) for columns in (_TILE, _WINDOW, 3))
    a[:-1], a[-1, -1] = points[:, None] ** torch.arange(_TILE, **exact), 1
    for i, point in enumerate(points):
        others = torch.cat([points[:i], points[i + 1 :]])
        b[i, : len(points)] = _coefficients(others)
        g[i] = point ** torch.arange(3, **exact) / (point - others).prod()
    b[-1], g[-1, -1] = _coefficients(points), 1
    return _Matrices(a.to(dtype), b.to(dtype), g.to(dtype))


def _coefficients(roots: Tensor) -> Tensor:
    """Coefficients of the monic polynomial with these roots, lowest power first."""
    result = torch.ones_like(roots[:1])
    for root in roots:
        result = F.pad(result, (1, 0)) - root * F.pad(result, (0, 1))
    return result


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, *, relu: bool, backward: bool) -> Tensor:
    matrices = _matrices(x.dtype)
    pixels = _pixels(x)
    samples, height, width, inputs = pixels.shape
    outputs = weight.shape[1] if backward else weight.shape[0]
    result = x.new_empty(samples, height + 2 * padding - 2, width + 2 * padding - 2, outputs)
    bands = list(_bands(result.shape, inputs + outputs, x.element_size()))
    slab = outputs
    if len(bands) == 1:
        slab = min(outputs, max(32, _FILTER_BYTES // (_WINDOW**2 * inputs * x.element_size()) // 32 * 32))
    whole = _filters(matrices.g, weight, slice(None), backward=backward) if slab == outputs else None
    for band in bands:
        v = _both_ways(matrices.b, _windows(pixels, band, padding)).view(_WINDOW**2, -1, inputs)
        for start in range(0, outputs, slab):
            channels = slice(start, min(start + slab, outputs))
            u = _filters(matrices.g, weight, channels, backward=backward) if whole is None else whole
            m = torch.bmm(v, u)
            y = _both_ways(matrices.a.t(), m.view(_WINDOW, _WINDOW, -1))
            _write(y, band, result[..., channels], None if bias is None else bias[channels], relu=relu)
    return result.permute(0, 3, 1, 2)


def _pixels(x: Tensor) -> Tensor:
    """`[N, H, W, C]`, contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _bands(size: torch.Size, channels: int, element_size: int) -> Iterator[_Band]:
    """The bands of a result `[N, H, W, K]`, if v and m have `channels` together."""
    samples, rows, columns = size[0], -(-size[1] // _TILE), -(-size[2] // _TILE)
    at_once = max(1, _BAND_BYTES // (_WINDOW**2 * columns * channels * element_size))
    if at_once >= rows:
        group = at_once // rows
        for start in range(0, samples, group):
            yield _Band(slice(start, min(start + group, samples)), 0, rows, columns)
        return
    for sample in range(samples):
        for first in range(0, rows, at_once):
            yield _Band(slice(sample, sample + 1), first, min(at_once, rows - first), columns)


def _both_ways(matrix: Tensor, tiles: Tensor) -> Tensor:
    """matrix · tile · matrixᵀ, for matrix `[p, q]` and tiles `[q, q, …]` → `[p, p, R]`.

    One product with their Kronecker product: more multiplications than two products, but half the passes over memory,
    and half the parallel regions, at whose ends threads wait for one another.
    """
    p, q = matrix.shape
    return torch.mm(torch.kron(matrix, matrix), tiles.reshape(q * q, -1)).view(p, p, -1)


def _filters(g: Tensor, weight: Tensor, channels: slice, *, backward: bool) -> Tensor:
    """u `[36, inputs, outputs]` for some channels of the result, from `weight [K, C, 3, 3]`."""
    g = g.flip(1) if backward else g
    weight = weight[:, channels] if backward else weight[channels]
    u = torch.mm(torch.kron(g, g), weight.permute(2, 3, 0, 1).reshape(9, -1)).view(-1, *weight.shape[:2])
    return u if backward else u.mT


def _windows(pixels: Tensor, band: _Band, padding: int) -> Tensor:
    """A band's tiles of pixels `[6, 6, samples, rows, columns, C]`, zero-padded, as a view of a copy."""
    _, height, width, channels = pixels.shape
    top = _TILE * band.first - padding
    bottom = top + _TILE * band.rows + 2
    inside = slice(max(top, 0), min(bottom, height))
    across = min(width, _TILE * band.columns + 2 - padding)
    some = pixels[band.samples, inside, :across]
    around = (0, 0, padding, _TILE * band.columns + 2 - padding - across, inside.start - top, bottom - inside.stop)
    some = F.pad(some, around).contiguous()
    sample, row, column, channel = some.stride()
    return some.as_strided(
        (_WINDOW, _WINDOW, some.shape[0], band.rows, band.columns, channels),
        (row, column, sample, _TILE * row, _TILE * column, channel),
    )


def _tiles(pixels: Tensor, band: _Band) -> Tensor:
    """A band's tiles `[4, 4, samples, rows, columns, C]`, which do not overlap, zeros beyond the edge."""
    width, channels = pixels.shape[2:]
    top = _TILE * band.first
    some = pixels[band.samples, top : top + _TILE * band.rows]
    some = F.pad(some, (0, 0, 0, _TILE * band.columns - width, 0, _TILE * band.rows - some.shape[1]))
    return some.view(-1, band.rows, _TILE, band.columns, _TILE, channels).permute(2, 4, 0, 1, 3, 5)


def _write(y: Tensor, band: _Band, result: Tensor, bias: Tensor | None, *, relu: bool) -> None:
    """Write tiles `y [4, 4, …]` into `result [N, H, W, K]`."""
    samples = band.samples.stop - band.samples.start
    y = y.view(_TILE, _TILE, samples, band.rows, band.columns, -1).permute(2, 3, 0, 4, 1, 5)
    target = result[band.samples, _TILE * band.first : _TILE * (band.first + band.rows)]
    height, width = target.shape[1:3]
    if (height, width) == (_TILE * band.rows, _TILE * band.columns):
        target = target.unflatten(2, (band.columns, _TILE)).unflatten(1, (band.rows, _TILE))
    else:
        y = y.reshape(samples, _TILE * band.rows, _TILE * band.columns, -1)
        y = y[:, :height, :width]
    if bias is None:
        target.copy_(y)
    else:
        torch.add(y, bias, out=target)
    if relu:
        target.relu_()
