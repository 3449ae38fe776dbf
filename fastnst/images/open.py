"""Open and decode the bytes of an image with Pillow, and explain what is wrong with them.

Files are untrusted: only the formats that the caller lists are tried, and a limit on the number of pixels is an error.
"""

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from fastnst.file_kind import file_group, file_kind
from fastnst.images.files import UnusableImageError

TRAINING_FORMATS = ("JPEG", "PNG", "WEBP")
READABLE_FORMATS = (*TRAINING_FORMATS, "BMP", "TIFF")
MAX_WEBP_PIXELS = 50_000_000
"""Pillow's WebP decoder needs about 20 bytes per pixel, twice the others: a 34-byte file could take 1.7 GB."""

_CUT_SHORT = "it is cut short; fetch it again"
# A lock, since warning filters are global to the process; reentrant, since `ignore_pillow_warnings` nests.
_filters_lock = threading.RLock()


def open_image(data: bytes, *, formats: tuple[str, ...]) -> Image.Image:
    """Open an image without decoding it, and check its number of pixels.

    Raises:
        UnusableImageError: see `decode`.
    """
    if not data:
        raise UnusableImageError("the file is empty; fetch it again")
    try:
        with ignore_pillow_warnings():
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise UnusableImageError(_too_many(int(pixels[0]) if pixels else None)) from error
    except UnidentifiedImageError as error:
        raise UnusableImageError(_explain_unidentified(data, formats)) from error
    except Exception as error:  # Pillow's parsers raise anything on a damaged header.
        if data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little"):
            raise UnusableImageError(_CUT_SHORT) from error
        raise UnusableImageError(f"its header is damaged ({_brief(error)}); fetch it again") from error
    pixels_of_image = image.width * image.height
    if Image.MAX_IMAGE_PIXELS is not None and pixels_of_image > Image.MAX_IMAGE_PIXELS:
        raise UnusableImageError(_too_many(pixels_of_image, image.size))
    if image.format == "WEBP" and pixels_of_image > MAX_WEBP_PIXELS:
        raise UnusableImageError(_too_many(pixels_of_image, image.size, MAX_WEBP_PIXELS))
    return image


def load(image: Image.Image) -> None:
    """Decode the pixels.

    Raises:
        UnusableImageError: they are damaged or truncated.
    """
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # As above: decoders raise nearly anything.
        if "truncated" in str(error):
            raise UnusableImageError(_CUT_SHORT) from error
        raise UnusableImageError(f"its pixels are damaged ({_brief(error)}); fetch it again") from error


@contextlib.contextmanager
def ignore_pillow_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings: this module checks size and damage itself, and raises."""
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _too_many(pixels: int | None, size: tuple[int, int] | None = None, limit: int | None = None) -> str:
    limit = limit or Image.MAX_IMAGE_PIXELS
    count = f"{size[0]} × {size[1]} px" if size else f"{pixels / 1e6:.0f} million pixels" if pixels else "its size"
    return f"{count} is above the limit of {limit / 1e6:.0f} million pixels; scale it down" if limit else count


def _explain_unidentified(data: bytes, formats: tuple[str, ...]) -> str:
    """Explain from the first bytes of a file why Pillow cannot identify it."""
    names = [name.replace("WEBP", "WebP") for name in formats]
    allowed = f"{', '.join(names[:-1])} or {names[-1]}"
    kind, group = file_kind(data[:512]), file_group(data[:512])
    if kind == "a JPEG":
        return "it is a JPEG of a kind that cannot be decoded (lossless, 12-bit or damaged header); convert it"
    if group == "text":
        more = "" if kind == "a text" else f" ({kind})"
        return f"it holds text{more}, not an image; give {allowed}"
    if kind is None:
        return f"it is no image that can be read, or its first bytes are damaged; give {allowed}"
    if kind.removeprefix("a ") in formats:
        return f"it is {kind} of a kind that cannot be decoded, or its header is damaged; convert it"
    if group != "image":
        return f"it is {kind}, not an image; give {allowed}"
    return f"it is {kind}; convert it to {allowed}"


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100] or type(error).__name__
