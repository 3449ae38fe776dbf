"""What a user asks to see: which maps, which activations, which squares of which images."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastnst.data.crop import resize_crop
from fastnst.errors import DataError, UserError
from fastnst.images import MIN_SIDE, printable, read_image, to_tensor
from fastnst.models.vgg19 import LAYERS, WEIGHT_SHAPES, check_layer
from fastnst.visualize.attribution.folder_batches import LARGEST_SIDE
from fastnst.visualize.attribution.top_activations import default_size
from fastnst.visualize.deconv.neurons import check_maps
from fastnst.visualize.deconv.receptive_field import receptive_field
from fastnst.visualize.sheets.render import number

Activation = str | tuple[int, int]
"""`strongest`, `all`, or the row and column of one."""

MAPS_FORMS = "numbers and ranges such as 0,5,17-20, the strongest such as top:16, or all"
_MANY = 10_000  # more maps than any layer has; keeps a mistyped range from being written out


@dataclass(frozen=True)
class MapChoice:
    """Maps of a layer, by number or by strength."""

    text: str
    """As the user wrote it."""
    numbers: tuple[int, ...] | None
    """In the user's order; None: by strength."""
    strongest: int | None
    """How many of the strongest, the very strongest first; None: all, by number."""

    def of(self, layer: str, strengths: Tensor) -> list[int]:
        """The chosen maps of a layer.

        Args:
            layer: for messages.
            strengths: `[C]`, of each map.

        Raises:
            UserError: a map that the layer does not have.
        """
        channels = len(strengths)
        if self.numbers is not None:
            check_maps(layer, self.numbers, channels)
            return list(self.numbers)
        if self.strongest is None:
            return list(range(channels))
        order = strengths.argsort(descending=True, stable=True)
        return order[: self.strongest].tolist()

    def count(self, channels: int) -> int:
        """How many maps are chosen in a layer of `channels`."""
        if self.numbers is not None:
            return len(self.numbers)
        return channels if self.strongest is None else min(self.strongest, channels)


def parse_maps(text: str) -> MapChoice:
    """`0,5,17-20`, `top:16` or `all`; a map that is named twice counts once.

    Raises:
        UserError: anything else.
    """
    text = text.strip()
    if text == "all":
        return MapChoice(text, None, None)
    if match := re.fullmatch(r"top:0*(\d{1,6})", text):
        if int(match[1]) < 1:
            raise UserError(f"--maps {text} chooses no map; give top:1 or more")
        return MapChoice(text, None, int(match[1]))
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*0*(\d{1,6})\s*(?:-\s*0*(\d{1,6})\s*)?", part)
        if match is None:
            raise UserError(f"--maps {text!r} is not understood at {part.strip()!r}; give {MAPS_FORMS}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= _MANY:
            raise UserError(f"--maps {text!r}: {part.strip()} is no range; give it from low to high, such as 17-20")
        numbers += range(first, last + 1)
    return MapChoice(text, tuple(dict.fromkeys(numbers)), None)


def parse_activation(text: str) -> Activation:
    """`strongest`, `all`, or `ROW,COL` as two numbers.

    Raises:
        UserError: anything else.
    """
    text = text.strip()
    if text in ("strongest", "all"):
        return text
    match = re.fullmatch(r"\(?\s*0*(\d{1,6})\s*,\s*0*(\d{1,6})\s*\)?", text)
    if match is None:
        raise UserError(f"--activation {text!r} is not understood; give strongest, all, or ROW,COL such as 14,9")
    return int(match[1]), int(match[2])


def check_vgg_layers(layers: Sequence[str], maps: MapChoice | None = None) -> list[str]:
    """The layers without repetition, front to back.

    Raises:
        UserError: an unknown one, or one that lacks a map that was chosen by number.
    """
    for layer in layers:
        check_layer(layer)
        if maps is not None and maps.numbers is not None:
            check_maps(layer, maps.numbers, channels_of(layer))
    return sorted(set(layers), key=LAYERS.index)


def channels_of(layer: str) -> int:
    """How many maps a layer of VGG19 has."""
    below = LAYERS[: LAYERS.index(layer) + 1]
    return WEIGHT_SHAPES[next(name for name in reversed(below) if name in WEIGHT_SHAPES)][0]


def vgg_size(layers: Sequence[str], size: int | None) -> int:
    """The side of the squares for VGG19, in pixels: as asked, or what suits the deepest layer.

    Raises:
        UserError: smaller than the receptive field of a layer, or out of any range.
    """
    fields = {layer: field for layer in layers if (field := field_of(layer)) is not None}
    if size is None:
        return max([224, *(default_size(layer) for layer in fields)])
    for layer, field in fields.items():
        if size < field:
            raise UserError(
                f"--size {size} is smaller than the receptive field of {layer}, {field}×{field} pixels; give --size "
                f"{field} or more, or a shallower layer"
            )
    return check_size(size)


def check_size(size: int) -> int:
    """UserError unless `size` is a side that the networks and the memory can do with."""
    if not MIN_SIDE <= size <= LARGEST_SIDE:
        raise UserError(f"--size {size} cannot be used; give {MIN_SIDE} … {LARGEST_SIDE} pixels")
    return size


def field_of(layer: str) -> int | None:
    """Side of a VGG19 layer's receptive field in pixels; None where that is the whole image."""
    return None if layer.startswith("fc") or layer in ("relu6", "relu7") else receptive_field(layer).size


def read_crops(paths: Sequence[Path], size: int, layers: Sequence[str] = ()) -> list[Tensor]:
    """The middle square of each image, resized: `[1, 3, size, size]` in [0, 1] on the CPU.

    Args:
        paths: the files.
        size: side of the squares, in pixels.
        layers: of VGG19; an image must be as large as what they see of it.

    Raises:
        UserError: no image is named.
        DataError: a file cannot be read as an image, or its short side is smaller than a receptive field.
    """
    if not paths:
        raise UserError("no image was named; give one or more files")
    field, layer = max(((field_of(layer) or 0, layer) for layer in layers), default=(0, ""))
    squares = []
    for path in paths:
        pixels = read_image(path)
        height, width = pixels.shape[:2]
        if min(height, width) < field:
            raise DataError(
                f"{printable(path)} is {width} × {height} px, smaller than the receptive field of {layer}, "
                f"{field} × {field} px; give a larger image or choose a shallower layer"
            )
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        window = (left, top, left + side, top + side)
        squares.append(to_tensor(np.array(resize_crop(Image.fromarray(pixels), window, size, False))))
    return squares


def columns_for(cells: int) -> int:
    """Columns of a sheet of so many images: wider than high, with few empty places."""
    low, high = math.ceil(math.sqrt(cells)), math.ceil(math.sqrt(2 * cells))
    return min(range(low, high + 1), key=lambda columns: (-cells % columns, columns))


def strengths(layer: str, activations: Tensor, activation: Activation) -> Tensor:
    """How strongly each map of one image answers, by the activation that is to be projected.

    Args:
        layer: for messages.
        activations: `[1, C, H, W]` or `[1, C]`.
        activation: `strongest`, `all` (ranked by the strongest as well), or the row and column.

    Returns:
        `[C]`.

    Raises:
        UserError: the position lies outside the map.
    """
    maps = activations[0] if activations.ndim == 4 else activations[0, :, None, None]
    if isinstance(activation, str):
        return maps.flatten(1).amax(1)
    (row, column), (height, width) = activation, maps.shape[1:]
    if row >= height or column >= width:
        raise UserError(
            f"--activation {row},{column} lies outside the maps of {layer}, which have {height} rows and {width} "
            f"columns here; give rows 0 … {height - 1} and columns 0 … {width - 1}"
        )
    return maps[:, row, column]


def describe_choice(activation: Activation) -> str:
    """For people: `strongest`, `all`, or `row 14, column 9`."""
    return activation if isinstance(activation, str) else f"row {activation[0]}, column {activation[1]}"


def describe_activation(chosen: Tensor, position: Sequence[int] | None) -> str:
    """`12.3 @ (14, 9)`; where a whole map `[H, W]` is projected, how much of it is active."""
    if position is None:
        return f"{float((chosen > 0).double().mean()):.0%} active, up to {number(float(chosen.amax()))}"
    if chosen.ndim == 0:
        return number(float(chosen))
    row, column = position
    return f"{number(float(chosen[row, column]))} @ ({row}, {column})"
