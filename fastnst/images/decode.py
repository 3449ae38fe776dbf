"""Decode an image to upright sRGB of 8 bits: the same pixels for every command, loader and cache."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastnst.images.color import ColorSpace, color_space, to_srgb
from fastnst.images.files import UnusableImageError
from fastnst.images.metadata import dpi_of, exif_to_keep
from fastnst.images.open import MAX_PIXELS, ignore_pillow_warnings, load, open_image
from fastnst.images.samples import check_samples, strips, to_8_bits
from fastnst.images.transparency import fill_hidden, is_transparent

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass
class DecodedImage:
    """An image as it is stored: sRGB of 8 bits, its orientation tag not yet applied."""

    image: Image.Image
    """RGB, or RGBA if it is transparent and `alpha` was set; colours that cannot be seen are filled."""
    orientation: int
    """1 to 8; see `upright`."""
    exif: bytes | None
    """See `fastnst.images.metadata.exif_to_keep`."""
    dpi: tuple[float, float] | None
    """Of the upright image."""
    ignored: str
    """Why the file's colour profile is ignored, or nothing."""


def decode(data: bytes, *, alpha: bool = False) -> Image.Image:
    """Decode a file's bytes to an upright RGB image, or RGBA if it is transparent and `alpha` is set.

    Raises:
        UnusableImageError: another format, damaged, truncated, too many pixels, or samples without a certain value.
    """
    decoded = decode_opened(open_image(data), data, alpha=alpha)
    image = decoded.image
    return image.transpose(_UPRIGHT[decoded.orientation]) if decoded.orientation in _UPRIGHT else image


def decode_opened(
    image: Image.Image, data: bytes, *, alpha: bool = False, max_pixels: int = MAX_PIXELS
) -> DecodedImage:
    """Decode an image that was opened with the same `max_pixels`, and leave its orientation to the caller."""
    space = prepare(image, data)
    turned = image.format == "TIFF" and orientation_of(image) >= 5  # Pillow turns these while loading.
    load(image, max_pixels=max_pixels)
    orientation = orientation_of(image)
    exif, dpi = exif_to_keep(image, orientation), dpi_of(image, 6 if turned else orientation)
    # One variable, so that each intermediate image is freed at once: the largest take 360 MB.
    image = _to_rgb(image, data, space, alpha=alpha)
    return DecodedImage(image, orientation, exif, dpi, space.ignored)


def prepare(image: Image.Image, data: bytes) -> ColorSpace:
    """Check what an opened image is before it is loaded or drafted, and return its colour space.

    Raises:
        UnusableImageError: it has no certain values in 8 bits of sRGB.
    """
    check_samples(image)
    return color_space(image, data)


def orientation_of(image: Image.Image) -> int:
    """Return the orientation tag (1 to 8) that still has to be applied to a loaded image; 1: none.

    Only valid after loading: PNG may store the tag after the pixels, and TIFF is turned by Pillow while loading.
    """
    try:
        with ignore_pillow_warnings():
            value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # The tags are damaged, but the pixels may be intact.
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def to_pixels(image: Image.Image, orientation: int = 1) -> np.ndarray:
    """Copy an image to an upright array, uint8 `[H, W, 3 or 4]`."""
    size = image.size[::-1] if orientation >= 5 else image.size
    array = np.empty((size[1], size[0], len(image.getbands())), np.uint8)
    stored = _as_stored(array, orientation)
    for rows, strip in strips(image):
        stored[rows] = strip
    return array


def _as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of an upright array in the order in which an image of this orientation is stored."""
    turned = upright.swapaxes(0, 1) if orientation >= 5 else upright
    if orientation in (3, 4, 6, 7):
        turned = turned[::-1]
    if orientation in (2, 3, 7, 8):
        turned = turned[:, ::-1]
    return turned


def _to_rgb(image: Image.Image, data: bytes, space: ColorSpace, *, alpha: bool) -> Image.Image:
    image = to_srgb(_convert(image, data), space)
    if image.mode in ("LA", "RGBA"):
        if not is_transparent(image):
            return image.convert("RGB")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        fill_hidden(image)
        return image if alpha else image.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _convert(image: Image.Image, data: bytes) -> Image.Image:
    try:
        return to_8_bits(image, data)
    except (ValueError, OSError, TypeError) as error:
        raise UnusableImageError(f"its colours of mode {image.mode} cannot be converted; convert it to RGB") from error
