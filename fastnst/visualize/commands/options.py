"""Options that `fastnst visualize` commands share: maps, activations, layers, sizes, images, weights.

Each command checks its options first, then reads images, then weights: cheap errors come first. What needs torch, whose
import takes seconds, imports it itself: `check_vgg_command` comes before.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastnst.errors import DataError, DeviceError, UserError
from fastnst.images import printable, read_image, to_tensor
from fastnst.models.files.early_checks import check_vgg19
from fastnst.models.vgg19_layers import LAYERS, check_layer, deepest_layer
from fastnst.visualize.attribution.targets import CLASS_LAYER, Target, channels_of, check_choice
from fastnst.visualize.deconv.maps import Activation, check_maps
from fastnst.visualize.deconv.receptive_field import check_size, crop_size, receptive_field

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastnst.models.vgg19 import VGG19
    from fastnst.visualize.deconv.neurons import Neurons

MAPS_FORMS = "numbers and ranges such as 0,5,17-20, the strongest such as top:16, or all"
_OTHER_TARGET = "or a target layer:map, such as relu3_4:17"
_MAX_RANGE = 10_000  # more maps than any layer has; a mistyped range shall not be expanded


@dataclass(frozen=True)
class MapChoice:
    """Maps of a layer, by number or by strength."""

    text: str
    """The option as given."""
    numbers: tuple[int, ...] | None
    """In the order given; None: by strength."""
    strongest: int | None
    """How many of the strongest, in descending order; None: all, by number."""

    def of(self, layer: str, strengths: "Tensor") -> list[int]:
        """Choose maps by their `strengths` `[C]`; raise UserError for a map that `layer` does not have."""
        channels = len(strengths)
        if self.numbers is not None:
            check_maps(layer, self.numbers, channels)
            return list(self.numbers)
        if self.strongest is None:
            return list(range(channels))
        order = strengths.argsort(descending=True, stable=True)
        return order[: self.strongest].tolist()

    def count(self, channels: int) -> int:
        """Count the chosen maps of a layer of `channels`."""
        if self.numbers is not None:
            return len(self.numbers)
        return channels if self.strongest is None else min(self.strongest, channels)

    def neurons(self, layer: str, activations: "Tensor", activation: Activation) -> "Neurons":
        """Select the chosen maps of one image, `[1, C, H, W]` or `[1, C]`, with a position each.

        Raises:
            UserError: a map that the layer does not have, or a position outside the maps.
        """
        from fastnst.visualize.deconv.neurons import Neurons

        maps = self.of(layer, _strengths(layer, activations, activation))
        return Neurons.select(activations, [0] * len(maps), maps, activation)


def parse_maps(text: str) -> MapChoice:
    """Parse `0,5,17-20`, `top:16` or `all`, or raise UserError; a map given twice counts once."""
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
        if last < first or last - first >= _MAX_RANGE:
            raise UserError(f"--maps {text!r}: {part.strip()} is no range; give it from low to high, such as 17-20")
        numbers += range(first, last + 1)
    return MapChoice(text, tuple(dict.fromkeys(numbers)), None)


def parse_activation(text: str) -> Activation:
    """Parse `strongest`, `all` or `ROW,COL`, or raise UserError."""
    text = text.strip()
    if text in ("strongest", "all"):
        return text
    match = re.fullmatch(r"\(?\s*0*(\d{1,6})\s*,\s*0*(\d{1,6})\s*\)?", text)
    if match is None:
        raise UserError(f"--activation {text!r} is not understood; give strongest, all, or ROW,COL such as 14,9")
    return int(match[1]), int(match[2])


def check_vgg_layers(layers: Sequence[str], maps: MapChoice | None = None) -> list[str]:
    """Sort layers front to back; raise UserError for an unknown one, or one that lacks a map of `maps`."""
    for layer in layers:
        check_layer(layer)
        if maps is not None and maps.numbers is not None:
            check_maps(layer, maps.numbers, channels_of(layer))
    return sorted(set(layers), key=LAYERS.index)


def check_vgg_command(
    layers: Sequence[str],
    *,
    vgg: str,
    maps: str = "all",
    activation: str = "strongest",
    size: int | None = None,
    target: Target | None = None,
) -> None:
    """Check the options of a command on VGG19 as the command itself does, before torch is imported."""
    parse_activation(activation)
    vgg_size(check_vgg_layers(layers, parse_maps(maps)), size)
    check_vgg19(vgg)
    if target is not None:
        check_class_weights(vgg, target)


def check_transform_layers(layers: Sequence[str]) -> None:
    """Raise UserError, with the nearest name, unless the transform net has these layers."""
    from fastnst.config import TRANSFORM_LAYERS

    for layer in layers:
        check_choice("layer of the transform net", layer, TRANSFORM_LAYERS)


def vgg_size(layers: Sequence[str], size: int | None) -> int:
    """Return the side of VGG19's crops in pixels: `size`, if it suits the layers, or a default."""
    sizes = [crop_size(layer, size) for layer in layers if field_of(layer) is not None]
    return max([224, *sizes]) if size is None else check_size(size)


def field_of(layer: str) -> int | None:
    """Return the side of a VGG19 layer's receptive field in pixels; None for the whole image."""
    return None if layer.startswith("fc") or layer in ("relu6", "relu7") else receptive_field(layer).size


def read_crops(paths: Sequence[Path], size: int, layers: Sequence[str] = ()) -> "list[Tensor]":
    """Read the center crop of each image, resized to `[1, 3, size, size]` in [0, 1] on the CPU.

    Raises:
        UserError: no image is given.
        DataError: no image, or its short side is smaller than the receptive field of one of the `layers` of VGG19.
    """
    import numpy as np
    from PIL import Image

    from fastnst.data.crop import resize_crop

    if not paths:
        raise UserError("no image was given; give one or more files")
    field, layer = max(((field_of(layer) or 0, layer) for layer in layers), default=(0, ""))
    crops = []
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
        box = (left, top, left + side, top + side)
        crops.append(to_tensor(np.array(resize_crop(Image.fromarray(pixels), box, size, False))))
    return crops


def load_vgg(spec: str, layers: Sequence[str], device: "torch.device") -> "VGG19":
    """Load VGG19 (`auto`, `random` or a file) up to the deepest of `layers`, or raise DataError."""
    from fastnst.models.weights import load_vgg19

    return load_vgg19(spec, last_layer=deepest_layer(layers)).to(device)


def load_vgg_for_target(spec: str, target: Target, device: "torch.device") -> "VGG19":
    """Load VGG19 up to the target's layer; a class needs trained weights with the classifier."""
    if target.layer != CLASS_LAYER:
        return load_vgg(spec, [target.layer], device)
    check_class_weights(spec, target)
    try:
        return load_vgg(spec, [target.layer], device)
    except DataError as error:
        raise DataError(f"{target.name} needs VGG19 with its classifier: {error}; {_OTHER_TARGET}") from error


def check_class_weights(spec: str, target: Target) -> None:
    """Raise DataError for a class with random weights."""
    if target.layer == CLASS_LAYER and spec == "random":
        raise DataError(
            f"random weights know no classes, and the target is {target.name}; give --vgg auto or FILE, {_OTHER_TARGET}"
        )


def weights_setting(spec: str, net: "VGG19") -> dict[str, str]:
    """Describe the weights, for the page."""
    return {"VGG19": f"{printable(spec)}, {net.flavour} flavour"}


def size_setting(crop: "Tensor") -> dict[str, str]:
    """Describe the crops, for the page."""
    return {"size": f"{crop.shape[3]} × {crop.shape[2]} px, center crop"}


@contextlib.contextmanager
def memory_errors(device: "torch.device", options: str) -> Iterator[None]:
    """Raise DeviceError, with the advice to lower `options`, when the device runs out of memory."""
    from fastnst.device import ran_out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        other = ", or use --device cpu" if device.type == "cuda" else ""
        raise DeviceError(f"out of memory; lower {options}{other}") from error


def _strengths(layer: str, activations: "Tensor", activation: Activation) -> "Tensor":
    """Return the strength of each map of one image: `[1, C, H, W]` or `[1, C]` → `[C]`."""
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
