"""From a picture of any size to a training square, the same for all loaders.

Resizing the short side to `image_size` and then cropping is the same as resizing a square window of the picture, as
wide as its short side; so each picture is resampled once, and only where it is seen. A random crop begins at a whole
pixel of the resized picture, so that what `fastnst.data.cache` has resized already gives the same squares. The filter
is the triangle (bilinear, widened by the scale when shrinking, which is what keeps it free of aliasing); beyond the
picture's border the border pixel goes on.
"""

import math

import numpy as np
from PIL import Image

from fastnst.data.manifest import Entry, examine
from fastnst.data.sampler import Fit
from fastnst.images import TRAINING_FORMATS, UnusablePictureError, decode, read_with_time

_FILTER = Image.Resampling.BILINEAR

Window = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the upright picture."""


def window_of(width: int, height: int, fit: Fit, crop: np.ndarray, size: int) -> Window:
    """The part of a picture that becomes the square of `size` pixels; `crop` is its row of `Samples.crop`."""
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
    """Where a random crop begins on a side of `length`, in pixels of the resized picture; `fraction` in [0, 1)."""
    return int(fraction * (resized_length(length, side, size) - size + 1))


def resize_window(
    picture: Image.Image, window: Window, size: int, flip: bool, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """The window of an RGB picture as uint8 `[size, size, 3]`, mirrored left to right if `flip` is set.

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
    lacking = ((max(-y0, 0), max(y1 - picture.height, 0)), (max(-x0, 0), max(x1 - picture.width, 0)))
    if any(map(any, lacking)):
        inside = picture.crop((max(x0, 0), max(y0, 0), min(x1, picture.width), min(y1, picture.height)))
        picture = Image.fromarray(np.pad(np.asarray(inside), (*lacking, (0, 0)), mode="edge"))
        left, top, right, bottom = left - x0, top - y0, right - x0, bottom - y0
    elif y0 > 1 or y1 < picture.height - 1:
        # One more row than the margin, which is none where a picture is enlarged.
        y0, y1 = max(y0 - 1, 0), min(y1 + 1, picture.height)
        picture = picture.crop((0, y0, picture.width, y1))
        top, bottom = top - y0, bottom - y0
    # Left to itself, Pillow begins with the direction that it takes to be quicker, and rounds in between: then a pixel
    # would depend on the shape of the window that it is cut out with.
    square = picture.resize((shape[0], picture.height), _FILTER, box=(left, 0, right, picture.height))
    square = square.resize(shape, _FILTER, box=(0, top, shape[0], bottom))
    if flip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(square)


def read_picture(path: str, entry: Entry) -> bytes:
    """A picture's file, if it is still the one that was checked.

    A file with another modification time is checked again, wholly, so that both loaders refuse the same ones: DALI
    would take damaged pixels without a word.

    Raises:
        UnusablePictureError: it changed or went away since the folder was checked.
    """
    data, mtime = read_with_time(path)
    if len(data) != entry.size:
        raise UnusablePictureError(
            f"it has {len(data)} bytes, and had {entry.size} when the folder was checked; restore it"
        )
    if mtime != entry.mtime:
        now = examine(entry.path, data, mtime=entry.mtime)
        if now != entry:
            raise UnusablePictureError(
                f"it is {_describe(now)}, and was {_describe(entry)} when the folder was checked; restore it"
            )
    return data


def read_square(
    path: str, entry: Entry, window: Window, size: int, flip: bool, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """One picture by Pillow, from file to uint8 `[size, size, 3]`, or as `shape` says; see `resize_window`.

    Raises:
        UnusablePictureError: see `read_picture`.
    """
    picture = decode(read_picture(path, entry), formats=TRAINING_FORMATS)
    if picture.size != (entry.width, entry.height):
        raise UnusablePictureError(
            f"it is {picture.width} × {picture.height} px, and was {entry.width} × {entry.height} px "
            "when the folder was checked; restore it"
        )
    return resize_window(picture, window, size, flip, shape)


def _describe(entry: Entry) -> str:
    kind = "" if entry.plain else " of an unusual kind"
    return f"a {entry.format} of {entry.width} × {entry.height} px{kind}"
