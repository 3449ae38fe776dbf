"""Read an image's file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastnst.errors import DataError
from fastnst.images.decode import decode_with_metadata, to_pixels
from fastnst.images.files import UnusableImageError, check_size, printable, read_bytes
from fastnst.images.open import READABLE_FORMATS, ignore_pillow_warnings

MIN_SIDE = 16
"""Minimum of the short side in pixels; both networks need that much."""


@dataclass(frozen=True)
class SourceImage:
    """An image, and what its file says besides."""

    pixels: np.ndarray
    """uint8 `[H, W, 3]`, or `[H, W, 4]` with transparency; upright."""
    exif: bytes | None
    """EXIF tags that hold for `pixels`, as Pillow's `save(exif=…)` takes them: orientation 1, no thumbnail."""
    dpi: tuple[float, float] | None
    """Pixels per inch, across and down."""


def read_image(path: Path | str, *, alpha: bool = False, min_side: int = MIN_SIDE) -> np.ndarray:
    """Read a JPEG, PNG, WebP, BMP or TIFF file as an upright image; of an animation, the first frame.

    Args:
        path: the file, with any suffix.
        alpha: keep transparency.
        min_side: minimum of the short side, in pixels.

    Returns:
        uint8 `[H, W, 3]`; with `alpha`, `[H, W, 4]` if the file has transparency.

    Raises:
        DataError: the file is missing, unreadable, not an image, damaged, truncated, too small or too large.
    """
    return read_with_metadata(path, alpha=alpha, min_side=min_side).pixels


def read_with_metadata(path: Path | str, *, alpha: bool = False, min_side: int = MIN_SIDE) -> SourceImage:
    """Read an image with its EXIF tags and resolution; see `read_image`."""
    path = Path(path)
    try:
        with ignore_pillow_warnings():
            image, exif, dpi = decode_with_metadata(read_bytes(path), formats=READABLE_FORMATS, alpha=alpha)
        check_size(image.width, image.height, min_side)
    except UnusableImageError as error:
        raise DataError(f"cannot use {printable(path)} as an image: {error}") from error
    return SourceImage(to_pixels(image), exif, dpi)
