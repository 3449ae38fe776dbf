"""Occlusion maps: the drop of a score when part of the image is covered (Zeiler & Fergus 2014, §4.2)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.errors import UserError
from fastnst.models.vgg19 import VGG19
from fastnst.visualize.attribution.targets import (
    Target,
    as_input,
    check_at_least_one,
    check_choice,
    check_target,
    is_whole,
    score,
)

FILLS = ("grey", "blur")

# Of the blur, in parts of the occluder's side: details of its size vanish, their mean colour stays.
_BLUR_DEVIATION = 0.25
_BLUR_REACH = 3.0


@dataclass(frozen=True)
class OcclusionMap:
    """Result of `occlusion`.

    Attributes:
        scores: `[N, rows, cols]`, the score with the occluder at each position, from the top left.
        base: `[N]`, the score of the whole image.
        heat: `[N, H, W]`, the mean drop base − score over the occluders that cover a pixel: positive where the pixel
            raises the score, negative where it lowers it.
    """

    scores: Tensor
    base: Tensor
    heat: Tensor


@torch.no_grad()
def occlusion(
    net: VGG19,
    images: Tensor,
    target: Target,
    *,
    size: int | tuple[int, int] = 32,
    stride: int | tuple[int, int] = 8,
    fill: str = "grey",
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> OcclusionMap:
    """Slide an occluder over each image and read the target's score at every position.

    The first occluder lies in the top left corner; those at the right and bottom are cut off by the image's edge, so
    that every pixel is covered: ⌈(side − size) / stride⌉ + 1 positions along each side. Only one batch of occluded
    copies is held at a time. The edges of a grey occluder excite edge detectors of shallow layers, which makes their
    heat negative; use `blur` there.

    Args:
        net: VGG19, loaded at least up to the target's layer.
        images: `[N, 3, H, W]`, RGB in [0, 1].
        target: see `targets.parse_target`.
        size: side of the occluder, or (height, width), in pixels.
        stride: pixels between two positions, or (down, across).
        fill: `grey` covers with the mean colour of ImageNet, `net.mean`, which is zero to the network; `blur` covers
            with a blurred copy of the image: Gaussian, with a quarter of the occluder's side as standard deviation and
            reflection at the image's edges (after Fong & Vedaldi 2017, arXiv:1704.03296, §4.1).
        batch_size: occluded copies in one forward pass.
        progress: called after each batch with the number of occluded copies done and in all.

    Raises:
        DataError: a class, and the net ends before fc8.
        UserError: unknown fill, layer or map, images that do not fit, a size or stride that is neither one nor two
            whole numbers, an occluder larger than the image, or a stride below 1 or above the occluder's side, which
            would leave pixels uncovered.
    """
    check_choice("fill", fill, FILLS)
    check_at_least_one("batch_size", batch_size)
    check_target(net, target)
    images = as_input(net, images)
    sizes, strides = _pair("size", size), _pair("stride", stride)
    rows, columns = map(_spans, images.shape[2:], sizes, strides)
    windows = [(slice(*row), slice(*column)) for row in rows for column in columns]
    covers = net.mean.expand_as(images) if fill == "grey" else _blurred(images, sizes)
    base = torch.cat([score(net, target, part) for part in images.split(batch_size)])
    scores = base.new_empty(len(images), len(windows))
    for index, (image, cover) in enumerate(zip(images, covers, strict=True)):
        for start in range(0, len(windows), batch_size):
            part = windows[start : start + batch_size]
            copies = image.expand(len(part), -1, -1, -1).clone(memory_format=torch.channels_last)
            for copy, (row, column) in zip(copies, part, strict=True):
                copy[:, row, column] = cover[:, row, column]
            scores[index, start : start + len(part)] = score(net, target, copies)
            if progress is not None:
                progress(index * len(windows) + start + len(part), scores.numel())
    scores = scores.reshape(-1, len(rows), len(columns))
    return OcclusionMap(scores, base, _mean_drop(base[:, None, None] - scores, rows, columns))


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = value if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(map(is_whole, pair)):
        raise UserError(f"{name} is {value!r}; give a whole number of pixels, or two: (height, width)")
    return pair[0], pair[1]


def _spans(side: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Return (first pixel, end) of each position of the occluder along one side."""
    if not 1 <= size <= side:
        raise UserError(f"an occluder of {size} pixels on a side of {side}; give a size of 1 … {side}")
    # One occluder that covers the whole side needs no stride.
    if stride < 1 or (stride > size and size < side):
        raise UserError(
            f"stride {stride} with an occluder of {size} pixels; give a stride of 1 … {size}, so that each pixel is "
            "covered"
        )
    return [
        (first, min(first + size, side)) for first in range(0, stride * (math.ceil((side - size) / stride) + 1), stride)
    ]


def _mean_drop(drops: Tensor, rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> Tensor:
    """Average `[N, rows, cols]` at each pixel over the windows that hold it, to `[N, H, W]`."""
    # In double: cheap here, and never rounded to TF32.
    down, across = (_membership(spans).to(drops.device) for spans in (rows, columns))
    total = down.T @ drops.double() @ across
    return (total / (down.sum(dim=0)[:, None] * across.sum(dim=0))).to(drops.dtype)


def _membership(spans: list[tuple[int, int]]) -> Tensor:
    """Return `[positions, side]`, 1 where a span holds a pixel."""
    held = torch.zeros(len(spans), spans[-1][1], dtype=torch.float64)
    for row, (first, end) in zip(held, spans, strict=True):
        row[first:end] = 1
    return held


def _blurred(images: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Blur `[N, 3, H, W]` along both sides, in proportion to the occluder."""
    for dim, size in zip((2, 3), sizes, strict=True):
        deviation = _BLUR_DEVIATION * size
        # Reflection padding is limited to the side minus 1.
        reach = min(math.ceil(_BLUR_REACH * deviation), images.shape[dim] - 1)
        offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device=images.device)
        bell = torch.exp(-0.5 * (offsets / deviation) ** 2)
        shape = (1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)
        kernel = (bell / bell.sum()).to(images.dtype).reshape(shape).expand(3, -1, -1, -1)
        margins = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
        images = F.conv2d(F.pad(images, margins, mode="reflect"), kernel, groups=3)
    return images
