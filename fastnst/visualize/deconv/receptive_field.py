"""Receptive fields of VGG19's layers, and crops that hold them."""

from dataclasses import dataclass

from fastnst.errors import UserError
from fastnst.images import MIN_SIDE
from fastnst.models.vgg19_layers import LAYERS, check_layer

LARGEST_SIDE = 2048
"""Of a crop, in pixels, as for training."""


@dataclass(frozen=True)
class ReceptiveField:
    """A square of pixels per position of a layer's map, alike for rows and columns.

    The activation at position p depends on the pixels [start + p·jump, start + p·jump + size); those outside the image
    are zero padding. Derived in Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning".

    Attributes:
        size: side of the square, in pixels.
        jump: pixels between the squares of neighbouring positions.
        start: first pixel of position 0, 0 or negative.
    """

    size: int
    jump: int
    start: int


def receptive_field(layer: str) -> ReceptiveField:
    """Compute a layer's receptive field; raise UserError for an unknown or fully connected layer."""
    check_layer(layer)
    depth = LAYERS.index(layer)
    if depth >= LAYERS.index("fc6"):
        raise UserError(
            f"{layer} depends on the whole image and has no receptive field of a fixed size; choose a layer up to pool5"
        )
    size, jump, start = 1, 1, 0
    for name in LAYERS[: depth + 1]:
        if name.startswith("conv"):
            size, start = size + 2 * jump, start - jump
        elif name.startswith("pool"):
            size, jump = size + jump, 2 * jump
    return ReceptiveField(size, jump, start)


def crop_size(layer: str, size: int | None) -> int:
    """Return `size`, or a default, after checking that it holds the layer's receptive field."""
    field = receptive_field(layer).size
    if size is None:
        return max(224, -(-field // 32) * 32)
    if size < field:
        raise UserError(
            f"a crop size of {size} px is smaller than the receptive field of {layer}, {field} px; give {field} px or "
            "more, or a shallower layer"
        )
    return size


def check_size(size: int) -> int:
    """Return the side of a crop in pixels; raise UserError if it is out of range."""
    if not MIN_SIDE <= size <= LARGEST_SIDE:
        raise UserError(f"a crop size of {size} px is out of range; give {MIN_SIDE} … {LARGEST_SIDE} px")
    return size
