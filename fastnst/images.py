"""Read, check and write single images.

Reading always returns upright, 8-bit RGB: the orientation tag is applied; grayscale, palette, CMYK and 16-bit images
are converted; transparency is dropped, or kept on request. Colour profiles are not applied. Files are untrusted: only
the formats listed here are tried, and Pillow's limit on the number of pixels is an error.
"""

import contextlib
import errno
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastnst.errors import DataError
from fastnst.storage import write_atomic

if TYPE_CHECKING:
    import torch

TRAINING_FORMATS = ("JPEG", "PNG", "WEBP")
READABLE_FORMATS = (*TRAINING_FORMATS, "BMP", "TIFF")
SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
MIN_SIDE = 16
"""Minimum of the short side in pixels; both networks need that much."""
MAX_FILE_BYTES = 1 << 30
MAX_WEBP_PIXELS = 50_000_000
"""Pillow's WebP decoder needs about 20 bytes per pixel, twice the others: a 34-byte file could take 1.7 GB."""

_CUT_SHORT = "it is cut short; fetch it again"
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
# A lock, since warning filters are global to the process; reentrant, since `ignore_pillow_warnings` nests.
_filters_lock = threading.RLock()


class UnusableImageError(Exception):
    """Why a file cannot be used as an image, and what to do. The caller adds the file's name."""


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
    path = Path(path)
    try:
        with ignore_pillow_warnings():
            image = decode(read_bytes(path), formats=READABLE_FORMATS, alpha=alpha)
        check_size(image.width, image.height, min_side)
    except UnusableImageError as error:
        raise DataError(f"cannot use {printable(path)} as an image: {error}") from error
    return _to_array(image)


def write_image(path: Path | str, array: np.ndarray) -> None:
    """Write an image atomically, as JPEG, PNG or WebP by the path's suffix.

    JPEG and WebP are written with quality 95, JPEG without chroma subsampling. JPEG has no transparency: an image with
    alpha is composited onto white.

    Args:
        path: ends in .jpg, .jpeg, .png or .webp.
        array: uint8 `[H, W, 3]` or `[H, W, 4]`.

    Raises:
        DataError: wrong suffix, dtype or shape; a side longer than the format allows; or the file cannot be written.
    """
    path = Path(path)
    check_writable_suffix(path)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4) or array.size == 0:
        raise DataError(
            f"cannot write {printable(path)}: an image is a uint8 array [H, W, 3 or 4], "
            f"not {array.dtype} {list(array.shape)}; see fastnst.images.to_array"
        )
    image = Image.fromarray(np.ascontiguousarray(array))
    image_format = SUFFIXES[path.suffix.lower()]
    options: dict[str, Any] = {}
    if image_format == "JPEG":
        options = {"quality": 95, "subsampling": 0}
        if image.mode == "RGBA":
            on_white = Image.new("RGBA", image.size, "white")
            on_white.alpha_composite(image)
            image = on_white.convert("RGB")
    elif image_format == "WEBP":
        options = {"quality": 95}
    encoded = io.BytesIO()
    try:
        image.save(encoded, image_format, **options)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot write {printable(path)}: {image_format} refuses {image.width} × {image.height} px "
            f"({error}); choose a name that ends in .png"
        ) from error
    write_atomic(path, encoded.getvalue())


def check_writable_suffix(path: Path) -> None:
    """Raise DataError unless `write_image` supports the suffix of `path`; call it before long work."""
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"cannot write {printable(path)}: {path.suffix or 'no suffix'} is not a supported format; "
            f"end the name in {', '.join(SUFFIXES)}"
        )


def to_tensor(array: np.ndarray) -> "torch.Tensor":
    """Convert a uint8 image `[H, W, 3]` to float32 `[1, 3, H, W]` in [0, 1], channels_last."""
    import torch

    assert array.dtype == np.uint8, array.dtype
    assert array.ndim == 3, array.shape
    assert array.shape[2] == 3, array.shape
    pixels = torch.tensor(array).permute(2, 0, 1).unsqueeze(0)
    return pixels.to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last)


def to_array(tensor: "torch.Tensor") -> np.ndarray:
    """Convert a float image `[3, H, W]` or `[1, 3, H, W]` in [0, 1], on any device, to uint8 `[H, W, 3]`.

    Values are clamped, then rounded to the nearest of the 256 levels.

    Raises:
        DataError: it holds NaN.
    """
    import torch

    image = tensor.detach()
    if image.ndim == 4:
        assert image.shape[0] == 1, image.shape
        image = image[0]
    assert image.ndim == 3, image.shape
    assert image.shape[0] == 3, image.shape
    image = image.to(torch.float32)
    if bool(torch.isnan(image).any()):
        raise DataError("the image holds NaN; the model has diverged or its precision overflows, try fp32")
    return image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def read_bytes(path: Path | str) -> bytes:
    """Read a regular file; see `read_with_mtime`."""
    return read_with_mtime(path)[0]


def read_with_mtime(path: Path | str) -> tuple[bytes, int]:
    """Read a regular file; return its bytes and its modification time in ns.

    Raises:
        UnusableImageError: it is missing, unreadable, above 1 GiB, or not a regular file (a pipe would block).
    """
    try:
        # Unbuffered and with `fstat`, for speed: this runs for every image of every batch.
        with open(path, "rb", buffering=0, opener=open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnusableImageError("it is not a regular file; give an image's file")
            if status.st_size > MAX_FILE_BYTES:
                raise UnusableImageError(f"its {status.st_size / 2**30:.1f} GiB are above 1 GiB; store it smaller")
            return file.readall(), status.st_mtime_ns
    except OSError as error:
        raise UnusableImageError(explain_os_error(error)) from error


def decode(data: bytes, *, formats: tuple[str, ...], alpha: bool = False) -> Image.Image:
    """Decode a file's bytes to an upright RGB image, or RGBA if it has transparency and `alpha` is set.

    Raises:
        UnusableImageError: another format, damaged, truncated, or above Pillow's limit on the number of pixels.
    """
    image = open_image(data, formats=formats)
    load(image)
    orientation = orientation_of(image)
    # One variable, so that each intermediate image is freed at once: the largest take 360 MB.
    image = _to_rgb(image, alpha=alpha)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


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


def check_size(width: int, height: int, min_side: int) -> None:
    """Raise UnusableImageError if the short side has fewer than `min_side` pixels."""
    if min(width, height) < min_side:
        raise UnusableImageError(f"{width} × {height} px is too small; the short side needs at least {min_side} px")


def printable(path: Path | str) -> str:
    """Return a path as text that can be encoded as UTF-8, with other bytes escaped."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def explain_os_error(error: OSError) -> str:
    """Return the operating system's message, with advice."""
    advice = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check its permissions",
        errno.EPERM: "check its permissions",
        errno.EISDIR: "give a file",
    }.get(error.errno or 0, "check the disk")
    return f"{(error.strerror or str(error)).lower()}; {advice}"


@contextlib.contextmanager
def ignore_pillow_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings: this module checks size and damage itself, and raises."""
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def _to_array(image: Image.Image) -> np.ndarray:
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


def _too_many(pixels: int | None, size: tuple[int, int] | None = None, limit: int | None = None) -> str:
    limit = limit or Image.MAX_IMAGE_PIXELS
    count = f"{size[0]} × {size[1]} px" if size else f"{pixels / 1e6:.0f} million pixels" if pixels else "its size"
    return f"{count} is above the limit of {limit / 1e6:.0f} million pixels; scale it down" if limit else count


def _explain_unidentified(data: bytes, formats: tuple[str, ...]) -> str:
    """Explain from the first bytes of a file why Pillow cannot identify it."""
    names = [name.replace("WEBP", "WebP") for name in formats]
    allowed = f"{', '.join(names[:-1])} or {names[-1]}"
    if data.startswith(b"\xff\xd8"):
        return "it is a JPEG of a kind that cannot be decoded (lossless, 12-bit or damaged header); convert it"
    signatures = {
        b"GIF8": "a GIF",
        b"BM": "a BMP",
        b"II*\0": "a TIFF",
        b"MM\0*": "a TIFF",
        b"%PDF": "a PDF",
        b"\0\0\0\x0cjP  ": "a JPEG 2000",
    }
    name = next((name for start, name in signatures.items() if data.startswith(start)), None)
    if data[4:8] == b"ftyp":
        name = {b"avif": "an AVIF", b"avis": "an AVIF"}.get(data[8:12], "a HEIF image or a video")
    if name is not None and name.removeprefix("a ") in formats:
        return f"it is {name} of a kind that cannot be decoded, or its header is damaged; convert it"
    if name is not None:
        return f"it is {name}; convert it to {allowed}"
    text = data[:512].strip()
    if text and all(byte >= 32 or byte in b"\t\r\n\f" for byte in text) and b"\x7f" not in text:
        return f"it holds text, not an image; give {allowed}"
    return f"it is no image that can be read, or its first bytes are damaged; give {allowed}"


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100] or type(error).__name__


def open_nonblocking(path: str, flags: int) -> int:
    """Opener for `open` that does not block on a pipe."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
