"""Stylize one image in strips of rows: the whole image's result in a fraction of its memory.

An instance norm needs the statistics of its whole input before it can compute its first row. So the network runs layer
by layer, each over all strips before the next begins, and what lies between two layers is either kept or computed
again (pass by pass):

    computed from    layers                    kept
    image            conv1                     statistics
    image            conv1, conv2              conv2's result, at half the resolution
    that             conv3                     x, at a quarter of the resolution
    x                a block's first layer     y
    y                a block's second layer    z
    x, z             x + norm(z)               the next x
    x                up1                       its result, at half the resolution
    that             up2                       statistics
    that             up2, out                  out's result, 3 channels at full resolution
    that             norm, output mapping      image

Blocks need two maps at a time, x and another, of 128 channels at a quarter of the resolution: 64 bytes per pixel of the
image in fp32. All else that is kept lies in the same memory, since a result is written over the map that it is computed
from, behind the rows that are still needed. conv1 and up2 are computed twice, a tenth of all multiplications. Norms
whose statistics are known (batch norm) save the passes that only measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastnst.models.transform_net import ConvLayer, InputLayout, ResidualBlock, TransformNet, UpLayer, at_least_fp32
from fastnst_kernels import batch_norm
from fastnst_kernels.conv.convolution import convolution
from fastnst_kernels.norm.upsample_pad import UpsamplePad, upsample_pad

_PAD_MODES = {"reflect": "reflect", "symmetric": "symmetric", "zeros": "constant"}
_AS_IT_IS = UpsamplePad()


class Strips:
    """A transform net's passes over the strips of one image; `len` is their number.

    Iterating computes them, without gradients, and yields each strip's first row in the image and the strip
    `[1, 3, h, W]` on [0, 1]'s scale, fp32 or wider, not clamped; None for strips of inner layers.

    Args:
        net: in evaluation mode; under autocast its convolutions compute in that type.
        pixels: uint8 `[H, W, 3]`, sides of 16 pixels or more.
        rows: of each layer's result at a time.
        dtype: of the convolutions' results, and so of what is kept between layers.
    """

    def __init__(self, net: TransformNet, pixels: np.ndarray, *, rows: int, dtype: torch.dtype) -> None:
        self._net, self._rows, self._size = net, rows, (pixels.shape[0], pixels.shape[1])
        self._workspace = _Workspace(net.conv1.weight.device, dtype)
        self._passes = self._plan(_Image(net, pixels))

    @property
    def workspace_bytes(self) -> int:
        """Size of the memory that is kept while iterating, beside a strip."""
        return self._workspace.elements * self._workspace.dtype.itemsize

    def __len__(self) -> int:
        return sum(math.ceil(each.height / each.rows) for each in self._passes)

    def __iter__(self) -> Iterator[tuple[int, Tensor] | None]:
        self._workspace.allocate()
        for each in self._passes:
            for first in range(0, each.height, each.rows):
                with torch.no_grad():
                    strip = each.compute(first, min(first + each.rows, each.height))
                yield None if strip is None else (first, strip)

    def _plan(self, image: _Image) -> list[_Pass]:
        """Give each result that is kept its place, and return the passes in order."""
        net, workspace, passes = self._net, self._workspace, list[_Pass]()

        def run(layer: _Layer, start: int | None = None) -> None:
            if start is not None:
                layer.kept = workspace.place(start, layer)
            if start is not None or layer.measures:
                passes.append(_Pass(layer.height, max(1, self._rows // layer.stride), layer.compute))

        conv1 = _Layer(net.conv1, image, padded=True)
        conv2 = _Layer(net.conv2, conv1)
        conv3 = _Layer(net.conv3, conv2)
        run(conv1)
        run(conv2, conv3.gap())
        run(conv3, 0)
        x: _Layer | _Sum = conv3
        blocks = [layer for layer in net.children() if isinstance(layer, ResidualBlock)]
        assert len(blocks) % 2 == 1, "the last block's result must lie in the upper half"
        sums = list[tuple[_Layer, _Layer, _Sum]]()
        for block in blocks:
            y = _Layer(block.conv1, x)
            z = _Layer(block.conv2, y)
            sums.append((y, z, x := _Sum(x, z)))
        up1 = _Layer(net.up1, x)
        up2 = _Layer(net.up2, up1)
        out = _Layer(net.out, up2)
        up1_start = out.gap(up1) if out.measures else 0
        half = max(up1_start + up1.gap(), *(z.gap() + y.size for y, z, _ in sums), conv3.size)
        for index, (y, z, total) in enumerate(sums):
            start = half if index % 2 == 0 else 0
            run(y, start + z.gap())
            run(z, start)
            passes.append(_Pass(total.height, self._rows, total.compute))
        run(up1, up1_start)
        run(up2)
        run(out, 0 if out.measures else None)
        passes.append(_Pass(self._size[0], self._rows, lambda first, last: self._image_rows(out, first, last)))
        return passes

    def _image_rows(self, out: _Layer, first: int, last: int) -> Tensor:
        (top, left, _, width), tanh, factor, offset = self._net.output_mapping((out.height, out.width), self._size)
        x = at_least_fp32(out.read(top + first, top + last)[..., left : left + width])
        x = factor * (x.tanh() if tanh else x)
        return x + offset if offset else x


class _Pass(NamedTuple):
    height: int
    rows: int
    compute: Callable[[int, int], Tensor | None]
    """From the first row to before the last one."""


class _Workspace:
    """Memory in which maps lie, also over each other."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.elements = device, dtype, 0
        self.memory = torch.empty(0)

    def place(self, start: int, layer: _Layer) -> _Map:
        self.elements = max(self.elements, start + layer.size)
        return _Map(self, start, layer.width, layer.channels)

    def allocate(self) -> None:
        self.memory = torch.empty(self.elements, dtype=self.dtype, device=self.device)


class _Map(NamedTuple):
    """A map `[1, C, H, W]` in the workspace, channels_last."""

    workspace: _Workspace
    start: int
    width: int
    channels: int

    def address(self, row: int) -> int:
        return self.start + row * self.width * self.channels

    def write(self, first: int, rows: Tensor) -> None:
        self.rows(first, first + rows.shape[2]).copy_(rows)

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows `[1, C, last - first, W]` as a view."""
        flat = self.workspace.memory[self.address(first) : self.address(last)]
        return flat.view(1, last - first, self.width, self.channels).permute(0, 3, 1, 2)


class _Source(Protocol):
    """Where a layer's input comes from, before its `input_layout`."""

    height: int
    width: int
    channels: int

    def read(self, first: int, last: int, columns: UpsamplePad = _AS_IT_IS) -> Tensor:
        """Return rows `[1, C, last - first, W]`, laid out by `columns`."""


class _Image:
    """The image with its reflected border, scaled for the first layer."""

    channels = 3

    def __init__(self, net: TransformNet, pixels: np.ndarray) -> None:
        self._pixels, self._scale, self._like = pixels, net.spec.input_scale, net.conv1.weight
        border = net.spec.border + max(net.conv1.input_layout(self._like).padding)
        self._rows, self._columns = (np.pad(np.arange(side), border, mode="reflect") for side in pixels.shape[:2])
        self.height, self.width = len(self._rows), len(self._columns)

    def read(self, first: int, last: int, columns: UpsamplePad = _AS_IT_IS) -> Tensor:
        rows = self._pixels[self._rows[first:last]][:, self._columns]
        x = torch.from_numpy(rows).to(self._like.device).to(self._like.dtype).div_(255)
        return upsample_pad((x if self._scale == 1.0 else x * self._scale).permute(2, 0, 1)[None], columns)


class _Layer:
    """Rows of a layer's result: before its norm as computed or kept, after it as the next layer reads them."""

    def __init__(self, layer: ConvLayer | UpLayer, source: _Source, *, padded: bool = False) -> None:
        self._layer, self._source = layer, source
        self.kept: _Map | None = None
        self._moments = _Moments()
        # Has the shape and device of the whole input, but no memory.
        whole = layer.weight.new_empty(1).expand(1, source.channels, source.height, source.width)
        self._layout = layout = InputLayout() if padded else layer.input_layout(whole)
        if isinstance(layer, ConvLayer) and layer.zero_padding:
            self._layout = layout = InputLayout(padding=(layer.zero_padding,) * 4, padding_mode="zeros")
        left, right, top, bottom = layout.padding
        inside = np.arange(layout.upsample * source.height)
        fill = {"constant_values": -1} if layout.padding_mode == "zeros" else {}
        self._index: np.ndarray = np.pad(inside, (top, bottom), mode=_PAD_MODES[layout.padding_mode], **fill)  # type: ignore[call-overload]
        self._columns = UpsamplePad(layout.upsample, (left, right, 0, 0), layout.padding_mode)
        transposed = isinstance(layer, UpLayer) and not layer.nearest
        self.channels = layer.weight.shape[1 if transposed else 0]
        if isinstance(layer, UpLayer):
            self.stride, self.height, self.width = 1, 2 * source.height, 2 * source.width
        else:
            self.stride, kernel = layer.stride, layer.weight.shape[-1]
            self.height = (len(self._index) - kernel) // self.stride + 1
            self.width = (layout.upsample * source.width + left + right - kernel) // self.stride + 1

    @property
    def size(self) -> int:
        """Elements of the whole result."""
        return self.height * self.width * self.channels

    @property
    def measures(self) -> bool:
        """Whether the norm's statistics are known only after a pass over all strips."""
        return self._layer.norm == "instance"

    def compute(self, first: int, last: int) -> None:
        """Compute rows before the norm, measure them, and keep them if they have a place."""
        z = self._convolved(first, last)
        if self.measures:
            self._moments.add(z)
        if self.kept is not None:
            self._check_overwrites_nothing_needed(last)
            self.kept.write(first, z)

    def read(self, first: int, last: int, columns: UpsamplePad = _AS_IT_IS, residual: Tensor | None = None) -> Tensor:
        """Return rows after norm, residual and ReLU; see `_Source`."""
        z = self._convolved(first, last) if self.kept is None else self.kept.rows(first, last)
        layer = self._layer
        if layer.norm is None:
            return upsample_pad(z, columns)
        mean, var = self._moments.statistics(z) if self.measures else (layer.running_mean, layer.running_var)
        return batch_norm(
            z,
            layer.scale,
            layer.shift,
            mean,
            var,
            training=False,
            eps=layer.eps,
            residual=residual,
            relu=layer.relu,
            upsample=columns.upsample,
            padding=columns.padding,
            padding_mode=columns.mode,
        )

    def gap(self, source: _Layer | None = None) -> int:
        """Return how far behind the result's start its source must begin, if the one is written over the other.

        In elements; `source` is an earlier layer if those between are not kept.
        """
        from_ = source or self._source
        # Both sides grow linearly with the row, but for rounding and the border: the extremes are at the ends.
        rows = [*range(1, min(self.height, 64)), *range(max(1, self.height - 64), self.height)]
        written, read = self.width * self.channels, from_.width * from_.channels
        gap: int = max(row * written - self._needed(row, from_) * read for row in rows)
        return max(0, gap)

    def _needed(self, row: int, of: _Source) -> int:
        """Return the first row of an earlier result that this result's rows from `row` on are computed from."""
        inputs: np.ndarray = self._index[self._input_rows(row, row + 1)[0] :]
        first = int(inputs[inputs >= 0].min()) // self._layout.upsample
        if self._source is of:
            return first
        assert isinstance(self._source, _Layer)
        return self._source._needed(first, of)

    def _check_overwrites_nothing_needed(self, last: int) -> None:
        source: _Source = self._source
        while isinstance(source, _Layer) and source.kept is None:
            source = source._source
        if last == self.height or not isinstance(source, _Layer | _Sum):
            return
        assert self.kept is not None
        assert source.kept is not None
        needed, end = source.kept.address(self._needed(last, source)), source.kept.address(source.height)
        assert self.kept.address(last) <= needed or self.kept.start >= end, "a row would be overwritten before its use"

    def _convolved(self, first: int, last: int) -> Tensor:
        begin, end, skip = self._input_rows(first, last)
        x = self._input(begin, end)
        layer = self._layer
        if isinstance(layer, UpLayer):
            z = layer.convolve(x)
        else:
            z = convolution(x, layer.weight, layer.bias, stride=layer.stride)
        return z[:, :, skip : skip + last - first]

    def _input_rows(self, first: int, last: int) -> tuple[int, int, int]:
        """Return the rows of the padded input (from, to before) of some rows of the result, and how many to skip."""
        if not isinstance(self._layer, UpLayer):
            return first * self.stride, (last - 1) * self.stride + self._layer.weight.shape[-1], 0
        if not self._layer.nearest:  # Row r of the input adds to rows 2r … 2r + 2 of the result.
            begin = max(first // 2 - 1, 0)
            return begin, (last - 1) // 2 + 1, first - 2 * begin
        if self._layout.upsample == 2:
            return first, last + 2, 0
        return first // 2, (last + 1) // 2 + 2, first % 2  # Row r of the padded input adds to rows 2r - 3 … 2r.

    def _input(self, begin: int, end: int) -> Tensor:
        """Return rows of the padded input."""
        index, upsample = self._index[begin:end], self._layout.upsample
        inside = index[index >= 0]
        first, last = int(inside.min()) // upsample, int(inside.max()) // upsample + 1
        x = self._source.read(first, last, self._columns)
        index = np.where(index < 0, -1, index - upsample * first)
        if np.array_equal(index, np.arange(index[0], index[0] + len(index))) and index[0] >= 0:
            return x[:, :, index[0] : index[0] + len(index)]
        chosen = torch.from_numpy(index.clip(0)).to(x.device)
        rows = x.permute(0, 2, 3, 1)[:, chosen]
        rows[:, torch.from_numpy(index < 0).to(x.device)] = 0
        return rows.permute(0, 3, 1, 2)


class _Sum:
    """A residual block's result x + norm(z), with x cropped to the size of z, over z."""

    def __init__(self, residual: _Layer | _Sum, z: _Layer) -> None:
        self.residual, self._z = residual, z
        self.height, self.width, self.channels = z.height, z.width, z.channels
        self._margin = (residual.height - z.height) // 2

    @property
    def kept(self) -> _Map | None:
        return self._z.kept

    @property
    def size(self) -> int:
        return self._z.size

    def compute(self, first: int, last: int) -> None:
        assert self.kept is not None
        x = self.residual.read(first, last + 2 * self._margin)
        self.kept.write(first, self._z.read(first, last, residual=x))

    def read(self, first: int, last: int, columns: UpsamplePad = _AS_IT_IS) -> Tensor:
        assert self.kept is not None
        return upsample_pad(self.kept.rows(first, last), columns)


class _Moments:
    """Mean and biased variance per channel, merged strip by strip in fp64 (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self._count = 0
        self._pivot = self._mean = self._squares = torch.empty(0)

    def add(self, z: Tensor) -> None:
        """Add a strip `[1, C, h, W]`."""
        z = at_least_fp32(z)
        if not self._count:
            self._pivot = z[:, :, :1, :1].clone()
            self._mean = self._squares = z.new_zeros(z.shape[1], dtype=torch.float64)
        # Of what a channel's values differ by from one of them: exact for a constant, accurate for a large mean.
        z = z - self._pivot
        count = z.shape[2] * z.shape[3]
        mean = z.mean((0, 2, 3))
        # The kernel's own mean is added up naively: its sum of squares is moved to the accurate one.
        rough_mean, rough_var = torch.batch_norm_update_stats(z, None, None, 0.0)
        squares = count * (rough_var.double() - (rough_mean - mean).double().square()).clamp_min(0)
        difference = mean.double() - self._mean
        total = self._count + count
        self._squares = self._squares + squares + difference.square() * (self._count * count / total)
        self._mean = self._mean + difference * (count / total)
        self._count = total

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance `[C]` in fp32, or the wider type of `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return (self._pivot.flatten().double() + self._mean).to(dtype), (self._squares / self._count).to(dtype)
