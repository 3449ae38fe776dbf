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
from fastnst.images.samples import explain_tiff

READABLE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of the formats that every command reads.

Others are left out: they run programs (EPS, WMF), have no signature (TGA), are decoded slowly in Python (QOI), or hold
layers or sizes of which one would have to be chosen (PSD, ICO).
"""
READABLE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
        *(".avif", ".avifs", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
"""Suffixes of the readable formats; the content decides."""
OTHER_SUFFIXES = frozenset(
    (
        *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".tga", ".psd", ".psb", ".ico", ".qoi", ".exr", ".hdr", ".pfm"),
        *(".pam", ".xcf", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
    )
)
"""Suffixes of images of other formats: named where a folder holds them, and read if the content is readable."""

MAX_PIXELS = 89_478_485
"""Limit for images of a folder: Pillow's own."""
MAX_PIXELS_OF_ONE = 1 << 28
"""Limit for an image that the user names."""
_DECODER_LIMITS = {"WEBP": 50_000_000, "AVIF": 50_000_000, "JPEG2000": 36_000_000}
"""Limits where Pillow's decoder takes 20 bytes per pixel and more, twice the others: a file of 34 bytes could take
gigabytes."""

_CUT_SHORT = "it is cut short; fetch it again"
# A lock, since warning filters are global to the process; reentrant, since `ignore_pillow_warnings` nests.
_filters_lock = threading.RLock()


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image without decoding it, and check its number of pixels.

    Args:
        data: the whole file.
        max_pixels: limit on the number of pixels; `_DECODER_LIMITS` may be lower.

    Raises:
        UnusableImageError: see `decode`.
    """
    if not data:
        raise UnusableImageError("the file is empty; fetch it again")
    try:
        with ignore_pillow_warnings(), _pillow_limit(max_pixels):
            image = Image.open(io.BytesIO(data), formats=READABLE_FORMATS)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise UnusableImageError(_too_many(int(pixels[0]) if pixels else None, None, max_pixels)) from error
    except UnidentifiedImageError as error:
        raise UnusableImageError(_explain_unidentified(data)) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise anything on a damaged header.
        if data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little"):
            raise UnusableImageError(_CUT_SHORT) from error
        raise UnusableImageError(f"its header is damaged ({_brief(error)}); fetch it again") from error
    limit = min(max_pixels, _DECODER_LIMITS.get(str(image.format), max_pixels))
    if image.width * image.height > limit:
        raise UnusableImageError(_too_many(image.width * image.height, image.size, limit))
    return image


def load(image: Image.Image, *, max_pixels: int = MAX_PIXELS) -> None:
    """Decode the pixels of an image opened with the same `max_pixels`.

    Raises:
        UnusableImageError: they are damaged or truncated.
        MemoryError: the image may be intact.
    """
    try:
        with _pillow_limit(max_pixels):
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # As above: decoders raise nearly anything.
        if "out of memory" in str(error).lower():
            raise MemoryError(str(error)) from error
        if "truncated" in str(error):
            raise UnusableImageError(_CUT_SHORT) from error
        raise UnusableImageError(f"its pixels are damaged ({_brief(error)}); fetch it again") from error


@contextlib.contextmanager
def ignore_pillow_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings: this module checks size and damage itself, and raises."""
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Lift Pillow's own limit on pixels, which is global to the process, where `max_pixels` is above it."""
    if max_pixels <= MAX_PIXELS:
        yield
        return
    with _filters_lock:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if before is None else max(before, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _too_many(pixels: int | None, size: tuple[int, int] | None, limit: int) -> str:
    count = f"{size[0]} × {size[1]} px" if size else f"{pixels / 1e6:.0f} million pixels" if pixels else "its size"
    return f"{count} is above the limit of {limit / 1e6:.0f} million pixels; scale it down"


def _explain_unidentified(data: bytes) -> str:
    """Explain from the first bytes of a file why Pillow cannot identify it."""
    allowed = "JPEG, PNG, WebP, TIFF, AVIF, JPEG 2000, GIF, BMP or PPM"
    kind, group = file_kind(data[:512]), file_group(data[:512])
    if kind == "a JPEG":
        return "it is a JPEG of a kind that cannot be decoded (lossless, 12-bit or damaged header); convert it"
    if group == "text":
        more = "" if kind == "a text" else f" ({kind})"
        return f"it holds text{more}, not an image; give {allowed}"
    if kind is None:
        return f"it is no image that can be read, or its first bytes are damaged; give {allowed}"
    if kind == "a TIFF" and (layout := explain_tiff(data)):
        return layout
    if kind.partition(" ")[2] in ("TIFF", "AVIF", "GIF", "BMP", "PNG", "WebP", "JPEG 2000"):
        return f"it is {kind} of a kind that cannot be decoded, or its header is damaged; convert it"
    if group != "image":
        return f"it is {kind}, not an image; give {allowed}"
    return f"it is {kind}; convert it to JPEG, PNG or TIFF"


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100] or type(error).__name__
