"""Crop and resize an image of any size to a training square, identically for all loaders.

Resizing the short side to `image_size` and then cropping equals resizing a square box of the image, as wide as its
short side; so each image is resampled once, inside the box only. A random crop starts at a whole pixel of the resized
image, so that `fastnst.data.cache`, which stores resized images, yields the same crops. The filter is the triangle
(bilinear, widened by the scale when shrinking, which avoids aliasing), with the border pixel repeated beyond the edge.
"""

import math

import numpy as np
from PIL import Image

from fastnst.data.manifest import ImageEntry, check_image
from fastnst.data.sampler import Fit
from fastnst.images import UnusableImageError, decode, read_with_mtime

_FILTER = Image.Resampling.BILINEAR

CropBox = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the upright image."""


def crop_box(width: int, height: int, fit: Fit, crop: np.ndarray, size: int) -> CropBox:
    """Return the box that is resized to `size` × `size`; `crop` is a row of `SampleBatch.crop`."""
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
    """Return the pixels of a side of `length` after the short side, `side`, is resized to `size`."""
    return length * size // side


def crop_offset(length: int, side: int, size: int, fraction: float) -> int:
    """Return where a random crop starts on a side of `length`, in resized pixels; `fraction` in [0, 1)."""
    return int(fraction * (resized_length(length, side, size) - size + 1))


def resize_crop(
    image: Image.Image, box: CropBox, size: int, flip: bool, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """Resize a box of an RGB image to uint8 `[size, size, 3]`, mirrored left to right if `flip` is set.

    With `shape` (width, height), return uint8 `[height, width, 3]` instead of a square.
    """
    shape = shape or (size, size)
    left, top, right, bottom = box
    # Pillow omits pixels beyond the border from the mean instead of repeating the border; so pad by a margin.
    margins = [
        math.ceil((end - start) / pixels) if end - start > pixels else 0
        for start, end, pixels in ((left, right, shape[0]), (top, bottom, shape[1]))
    ]
    x0, y0 = math.floor(left) - margins[0], math.floor(top) - margins[1]
    x1, y1 = math.ceil(right) + margins[0], math.ceil(bottom) + margins[1]
    padding = ((max(-y0, 0), max(y1 - image.height, 0)), (max(-x0, 0), max(x1 - image.width, 0)))
    if any(map(any, padding)):
        inside = image.crop((max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)))
        image = Image.fromarray(np.pad(np.asarray(inside), (*padding, (0, 0)), mode="edge"))
        left, top, right, bottom = left - x0, top - y0, right - x0, bottom - y0
    elif y0 > 1 or y1 < image.height - 1:
        # Keep one more row than the margin, which is 0 for an image that is enlarged.
        y0, y1 = max(y0 - 1, 0), min(y1 + 1, image.height)
        image = image.crop((0, y0, image.width, y1))
        top, bottom = top - y0, bottom - y0
    # In one call, Pillow picks the faster of the two directions first and rounds in between, so that a pixel's value
    # would depend on the shape of the box.
    crop = image.resize((shape[0], image.height), _FILTER, box=(left, 0, right, image.height))
    crop = crop.resize(shape, _FILTER, box=(0, top, shape[0], bottom))
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop)


def read_checked(path: str, entry: ImageEntry) -> bytes:
    """Return the bytes of an image's file if it still is the file that was checked.

    A file with another modification time is checked again in full, so that all loaders reject the same files: DALI
    would silently accept damaged pixels.

    Raises:
        UnusableImageError: the file changed or vanished since the folder was checked.
    """
    data, mtime = read_with_mtime(path)
    if len(data) != entry.size:
        raise UnusableImageError(
            f"it has {len(data)} bytes, and had {entry.size} when the folder was checked; restore it"
        )
    if mtime != entry.mtime:
        now, _ = check_image(entry.path, data, mtime=entry.mtime)
        if now != entry:
            raise UnusableImageError(
                f"it is {_describe(now)}, and was {_describe(entry)} when the folder was checked; restore it"
            )
    return data


def read_crop(
    path: str, entry: ImageEntry, box: CropBox, size: int, flip: bool, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """Read, decode and crop one image with Pillow; see `resize_crop`.

    Raises:
        UnusableImageError: see `read_checked`.
    """
    image = decode(read_checked(path, entry))
    if image.size != (entry.width, entry.height):
        raise UnusableImageError(
            f"it is {image.width} × {image.height} px, and was {entry.width} × {entry.height} px "
            "when the folder was checked; restore it"
        )
    return resize_crop(image, box, size, flip, shape)


def _describe(entry: ImageEntry) -> str:
    kind = "" if entry.dali_safe else " of an unusual kind"
    return f"a {entry.format} of {entry.width} × {entry.height} px{kind}"
