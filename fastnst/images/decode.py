"""Decode an image to upright, 8-bit RGB: the same pixels for every command, loader and cache."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from fastnst.images.files import UnusableImageError
from fastnst.images.metadata import dpi_of, exif_to_keep
from fastnst.images.open import ignore_pillow_warnings, load, open_image

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


def decode(data: bytes, *, formats: tuple[str, ...], alpha: bool = False) -> Image.Image:
    """Decode a file's bytes to an upright RGB image, or RGBA if it has transparency and `alpha` is set.

    Raises:
        UnusableImageError: another format, damaged, truncated, or above Pillow's limit on the number of pixels.
    """
    return decode_with_metadata(data, formats=formats, alpha=alpha)[0]


def decode_with_metadata(
    data: bytes, *, formats: tuple[str, ...], alpha: bool = False
) -> tuple[Image.Image, bytes | None, tuple[float, float] | None]:
    """Decode as `decode` does; return the image, its EXIF tags and its resolution (see `fastnst.images.metadata`)."""
    image = open_image(data, formats=formats)
    load(image)
    orientation = orientation_of(image)
    exif = exif_to_keep(image, orientation)
    dpi = dpi_of(image, orientation)
    # One variable, so that each intermediate image is freed at once: the largest take 360 MB.
    image = _to_rgb(image, alpha=alpha)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image, exif, dpi


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


def _to_rgb(image: Image.Image, *, alpha: bool) -> Image.Image:
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    target = "RGBA" if alpha and transparent else "RGB"
    if image.mode == target:
        return image
    if image.mode.startswith("I"):
        # 16 bits per sample, which `convert` would clip at 255; so divide by 257 = 65535 / 255.
        gray = np.empty((image.height, image.width), np.uint8)
        for rows, strip in _strips(image):
            gray[rows] = (np.clip(strip.astype(np.int64), 0, 65535) + 128) // 257
        image = Image.fromarray(gray)
    elif image.mode == "F":
        raise UnusableImageError("its samples are floating-point numbers; convert it to 8 bits")
    elif image.mode in ("P", "PA", "La") and transparent:
        image = image.convert("RGBA" if image.mode != "La" else "LA")
    try:
        return image.convert(target)
    except ValueError as error:
        raise UnusableImageError(f"its colour mode {image.mode} cannot become RGB; convert it") from error


def to_pixels(image: Image.Image) -> np.ndarray:
    array = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    for rows, strip in _strips(image):
        array[rows] = strip
    return array


def _strips(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield rows and their samples, a few MB at a time; copies of the largest images take gigabytes."""
    height = max(1, (1 << 20) // image.width)
    for top in range(0, image.height, height):
        bottom = min(top + height, image.height)
        yield slice(top, bottom), np.asarray(image.crop((0, top, image.width, bottom)))
