"""Read an image's file."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastnst.errors import DataError
from fastnst.images.decode import decode_opened, to_pixels
from fastnst.images.files import UnusableImageError, check_size, printable, read_bytes
from fastnst.images.open import MAX_PIXELS_OF_ONE, ignore_pillow_warnings, open_image
from fastnst.memory import available_host_memory
from fastnst.progress import byte_count

_CHECKED_PIXELS = 4_000_000
"""Smaller images always fit."""
_BYTES_PER_PIXEL = {"JPEG": 13, "MPO": 13, "WEBP": 24, "AVIF": 24, "JPEG2000": 32, "TIFF": 16}
_BYTES_PER_PIXEL_OF_OTHERS = 12
"""Measured peaks of decoding and converting."""
MIN_SIDE = 16
"""Minimum of the short side in pixels; both networks need that much."""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceImage:
    """An image, and what its file says besides."""

    pixels: np.ndarray
    """uint8 `[H, W, 3]`, or `[H, W, 4]` with transparency; upright."""
    exif: bytes | None
    """EXIF tags that hold for `pixels`, as Pillow's `save(exif=…)` takes them: orientation 1, no thumbnail."""
    dpi: tuple[float, float] | None
    """Pixels per inch, across and down."""


def read_image(
    path: Path | str, *, alpha: bool = False, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS_OF_ONE
) -> np.ndarray:
    """Read an image of any format in `READABLE_FORMATS`, upright and in sRGB; of an animation, the first frame.

    Colours are converted through the embedded profile; a damaged profile is logged and ignored. Colours that cannot be
    seen are replaced, see `fastnst.images.transparency`.

    Args:
        path: the file, with any suffix.
        alpha: keep transparency.
        min_side: minimum of the short side, in pixels.
        max_pixels: limit on the number of pixels.

    Returns:
        uint8 `[H, W, 3]`; with `alpha`, `[H, W, 4]` if any pixel is transparent.

    Raises:
        DataError: the file is missing, unreadable, not an image, damaged, truncated, too small or too large, for the
            memory that is left, too.
    """
    return read_with_metadata(path, alpha=alpha, min_side=min_side, max_pixels=max_pixels).pixels


def read_with_metadata(
    path: Path | str, *, alpha: bool = False, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS_OF_ONE
) -> SourceImage:
    """Read an image with its EXIF tags and resolution; see `read_image`."""
    path = Path(path)
    try:
        with ignore_pillow_warnings():
            data = read_bytes(path)
            image = open_image(data, max_pixels=max_pixels)
            check_size(*image.size, min_side)
            _check_memory(image)
            decoded = decode_opened(image, data, alpha=alpha, max_pixels=max_pixels)
    except UnusableImageError as error:
        raise DataError(f"cannot use {printable(path)} as an image: {error}") from error
    del data
    if decoded.ignored:
        log.warning("%s: %s, and is ignored; its colours are read as sRGB", printable(path), decoded.ignored)
    return SourceImage(to_pixels(decoded.image, decoded.orientation), decoded.exif, decoded.dpi)


def _check_memory(image: Image.Image) -> None:
    """Raise UnusableImageError if decoding an opened image takes more memory than is left."""
    pixels = image.width * image.height
    if pixels < _CHECKED_PIXELS:
        return
    per_pixel = _BYTES_PER_PIXEL.get(str(image.format), _BYTES_PER_PIXEL_OF_OTHERS)
    needed, free = pixels * per_pixel, available_host_memory()
    if needed > free:
        scale = math.sqrt(free / needed) * 0.95
        raise UnusableImageError(
            f"decoding its {image.width} × {image.height} px takes {byte_count(needed)}, and {byte_count(free)} are "
            f"free; scale it down, about {int(image.width * scale)} × {int(image.height * scale)} px would fit"
        )
