"""From an image of any size to a training square, the same for all loaders.

Resizing the short side to `image_size` and then cropping is the same as resizing a square window of the image, as
wide as its short side; so each image is resampled once, and only where it is seen. A random crop begins at a whole
pixel of the resized image, so that what `fastnst.data.cache` has resized already gives the same squares. The filter
is the triangle (bilinear, widened by the scale when shrinking, which is what keeps it free of aliasing); beyond the
image's border the border pixel goes on.
"""

import math

import numpy as np
from PIL import Image

from fastnst.data.manifest import Entry, examine
from fastnst.data.sampler import Fit
from fastnst.images import TRAINING_FORMATS, UnusableImageError, decode, read_with_time

_FILTER = Image.Resampling.BILINEAR

CropBox = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the upright image."""


def crop_box(width: int, height: int, fit: Fit, crop: np.ndarray, size: int) -> CropBox:
    """The part of an image that becomes the square of `size` pixels; `crop` is its row of `SampleBatch.crop`."""
    if fit == "squash":
        return 0.0, 0.0, float(width), float(height)
    side = min(width, height)
    if fit == "center_crop":
        left, top = (width - side) / 2, (height - side) / 2
    else:
        left, top = (
            crop_offset(length, side, size, float(fraction)) * side / size
            for length, fraction in zip((width, height), crop, strict=True)
        )
    return left, top, left + side, top + side


def resized_length(length: int, side: int, size: int) -> int:
    """Whole pixels that a side of `length` has when the short one, `side`, is resized to `size`."""
    return length * size // side


def crop_offset(length: int, side: int, size: int, fraction: float) -> int:
    """Where a random crop begins on a side of `length`, in pixels of the resized image; `fraction` in [0, 1)."""
    return int(fraction * (resized_length(length, side, size) - size + 1))


def resize_crop(
    image: Image.Image, window: CropBox, size: int, flip: bool, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """The window of an RGB image as uint8 `[size, size, 3]`, mirrored left to right if `flip` is set.

    With `shape`, pixels in x and y, as `[y, x, 3]` instead of a square of `size`.
    """
    shape = shape or (size, size)
    left, top, right, bottom = window
    # Pillow leaves pixels beyond the border out of the mean instead of repeating the border; a margin makes it repeat.
    margins = [
        math.ceil((end - start) / pixels) if end - start > pixels else 0
        for start, end, pixels in ((left, right, shape[0]), (top, bottom, shape[1]))
    ]
    x0, y0 = math.floor(left) - margins[0], math.floor(top) - margins[1]
    x1, y1 = math.ceil(right) + margins[0], math.ceil(bottom) + margins[1]
    lacking = ((max(-y0, 0), max(y1 - image.height, 0)), (max(-x0, 0), max(x1 - image.width, 0)))
    if any(map(any, lacking)):
        inside = image.crop((max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)))
        image = Image.fromarray(np.pad(np.asarray(inside), (*lacking, (0, 0)), mode="edge"))
        left, top, right, bottom = left - x0, top - y0, right - x0, bottom - y0
    elif y0 > 1 or y1 < image.height - 1:
        # One more row than the margin, which is none where an image is enlarged.
        y0, y1 = max(y0 - 1, 0), min(y1 + 1, image.height)
        image = image.crop((0, y0, image.width, y1))
        top, bottom = top - y0, bottom - y0
    # Left to itself, Pillow begins with the direction that it takes to be quicker, and rounds in between: then a pixel
    # would depend on the shape of the window that it is cut out with.
    square = image.resize((shape[0], image.height), _FILTER, box=(left, 0, right, image.height))
    square = square.resize(shape, _FILTER, box=(0, top, shape[0], bottom))
    if flip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(square)


def read_image(path: str, entry: Entry) -> bytes:
    """An image's file, if it is still the one that was checked.

    A file with another modification time is checked again, wholly, so that both loaders refuse the same ones: DALI
    would take damaged pixels without a word.

    Raises:
        UnusableImageError: it changed or went away since the folder was checked.
    """
    data, mtime = read_with_time(path)
    if len(data) != entry.size:
        raise UnusableImageError(
            f"it has {len(data)} bytes, and had {entry.size} when the folder was checked; restore it"
        )
    if mtime != entry.mtime:
        now = examine(entry.path, data, mtime=entry.mtime)
        if now != entry:
            raise UnusableImageError(
                f"it is {_describe(now)}, and was {_describe(entry)} when the folder was checked; restore it"
            )
    return data


def read_crop(
    path: str, entry: Entry, window: CropBox, size: int, flip: bool, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """One image by Pillow, from file to uint8 `[size, size, 3]`, or as `shape` says; see `resize_crop`.

    Raises:
        UnusableImageError: see `read_image`.
    """
    image = decode(read_image(path, entry), formats=TRAINING_FORMATS)
    if image.size != (entry.width, entry.height):
        raise UnusableImageError(
            f"it is {image.width} × {image.height} px, and was {entry.width} × {entry.height} px "
            "when the folder was checked; restore it"
        )
    return resize_crop(image, window, size, flip, shape)


def _describe(entry: Entry) -> str:
    kind = "" if entry.plain else " of an unusual kind"
    return f"a {entry.format} of {entry.width} × {entry.height} px{kind}"
