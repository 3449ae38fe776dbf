"""One picture: read it from a file that may be anything, check it, and write it.

Reading always ends in upright, 8-bit RGB: the orientation tag is applied; grayscale, palette, CMYK and 16-bit
pictures are converted; transparency is dropped, or kept on request. Colour profiles are not applied. Only the formats
named here are ever tried, and Pillow's limit on the number of pixels is an error, because a file may come from
anywhere.
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
"""Pixels of the short side below which neither network has anything to work on."""
MAX_FILE_BYTES = 1 << 30
MAX_WEBP_PIXELS = 50_000_000
"""Pillow's WebP decoder takes some 20 bytes per pixel, twice as many as others: 34 bytes can ask for 1.7 GB."""

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
# Reentrant, because `quietly` nests; a lock at all, because the warning filters belong to the whole process.
_filters_lock = threading.RLock()


class UnusablePictureError(Exception):
    """Why a file cannot serve as a picture, and what to do; without the file's name, which the caller knows."""


def read_image(path: Path | str, *, alpha: bool = False, min_side: int = MIN_SIDE) -> np.ndarray:
    """One picture, upright, of any mode, from a JPEG, PNG, WebP, BMP or TIFF file; of an animation, the first frame.

    Args:
        path: the file; its suffix does not matter.
        alpha: keep transparency.
        min_side: pixels that the short side must have.

    Returns:
        uint8 `[H, W, 3]`; with `alpha`, `[H, W, 4]` if the file has transparency.

    Raises:
        DataError: missing, unreadable, not a picture, damaged, cut short, too small or too large.
    """
    path = Path(path)
    try:
        with quietly():
            picture = decode(read_bytes(path), formats=READABLE_FORMATS, alpha=alpha)
        check_size(picture.width, picture.height, min_side)
    except UnusablePictureError as error:
        raise DataError(f"cannot use {printable(path)} as a picture: {error}") from error
    return _to_array(picture)


def write_image(path: Path | str, array: np.ndarray) -> None:
    """Write a picture atomically; its suffix chooses JPEG, PNG or WebP.

    JPEG and WebP are written in quality 95, JPEG with colour at full resolution. JPEG knows no transparency: a
    picture with alpha is laid on white.

    Args:
        path: ends in .jpg, .jpeg, .png or .webp.
        array: uint8 `[H, W, 3]` or `[H, W, 4]`.

    Raises:
        DataError: another suffix or array, a side longer than the format allows, or storage that refuses.
    """
    path = Path(path)
    check_writable_suffix(path)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4) or array.size == 0:
        raise DataError(
            f"cannot write {printable(path)}: a picture is a uint8 array [H, W, 3 or 4], "
            f"not {array.dtype} {list(array.shape)}; see fastnst.images.to_array"
        )
    picture = Image.fromarray(np.ascontiguousarray(array))
    picture_format = SUFFIXES[path.suffix.lower()]
    options: dict[str, Any] = {}
    if picture_format == "JPEG":
        options = {"quality": 95, "subsampling": 0}
        if picture.mode == "RGBA":
            on_white = Image.new("RGBA", picture.size, "white")
            on_white.alpha_composite(picture)
            picture = on_white.convert("RGB")
    elif picture_format == "WEBP":
        options = {"quality": 95}
    encoded = io.BytesIO()
    try:
        picture.save(encoded, picture_format, **options)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot write {printable(path)}: {picture_format} refuses {picture.width} × {picture.height} px "
            f"({error}); choose a name that ends in .png"
        ) from error
    write_atomic(path, encoded.getvalue())


def check_writable_suffix(path: Path) -> None:
    """Raise DataError unless `write_image` knows the suffix of `path`: for use before long work, not after it."""
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"cannot write {printable(path)}: {path.suffix or 'no suffix'} names no format to write; "
            f"end the name in {', '.join(SUFFIXES)}"
        )


def to_tensor(array: np.ndarray) -> "torch.Tensor":
    """A uint8 picture `[H, W, 3]` as float32 `[1, 3, H, W]` in [0, 1], channels_last."""
    import torch

    assert array.dtype == np.uint8, array.dtype
    assert array.ndim == 3, array.shape
    assert array.shape[2] == 3, array.shape
    pixels = torch.tensor(array).permute(2, 0, 1).unsqueeze(0)
    return pixels.to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last)


def to_array(tensor: "torch.Tensor") -> np.ndarray:
    """A float picture `[3, H, W]` or `[1, 3, H, W]` in [0, 1], on any device, as uint8 `[H, W, 3]`.

    Values are clamped, then rounded to the nearest of the 256 levels.

    Raises:
        DataError: it holds NaN, which has no colour.
    """
    import torch

    picture = tensor.detach()
    if picture.ndim == 4:
        assert picture.shape[0] == 1, picture.shape
        picture = picture[0]
    assert picture.ndim == 3, picture.shape
    assert picture.shape[0] == 3, picture.shape
    picture = picture.to(torch.float32)
    if bool(torch.isnan(picture).any()):
        raise DataError("the picture holds NaN; the model has diverged or its precision overflows, try fp32")
    return picture.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def read_bytes(path: Path | str) -> bytes:
    """Everything in a regular file.

    Raises:
        UnusablePictureError: it is missing, unreadable, above 1 GiB, or no regular file (a pipe would block).
    """
    return read_with_time(path)[0]


def read_with_time(path: Path | str) -> tuple[bytes, int]:
    """Everything in a regular file, and its modification time in ns; see `read_bytes`."""
    try:
        # Unbuffered, and by descriptor: this runs for every picture of every batch.
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnusablePictureError("it is not a regular file; give a picture's file")
            if status.st_size > MAX_FILE_BYTES:
                raise UnusablePictureError(f"its {status.st_size / 2**30:.1f} GiB are above 1 GiB; store it smaller")
            return file.readall(), status.st_mtime_ns
    except OSError as error:
        raise UnusablePictureError(explain_os_error(error)) from error


def decode(data: bytes, *, formats: tuple[str, ...], alpha: bool = False) -> Image.Image:
    """The upright picture in an encoded file's bytes, in mode RGB, or RGBA if it has transparency and `alpha` is set.

    Raises:
        UnusablePictureError: another format, damaged, cut short, or above Pillow's limit on the number of pixels.
    """
    picture = open_picture(data, formats=formats)
    load(picture)
    orientation = orientation_of(picture)
    # One name: what it was before each step is given back, where the largest pictures have 360 MB.
    picture = _to_rgb(picture, alpha=alpha)
    return _make_upright(picture, orientation)


def open_picture(data: bytes, *, formats: tuple[str, ...]) -> Image.Image:
    """The picture, its pixels not yet decoded, and known to be not too many.

    Raises:
        UnusablePictureError: see `decode`.
    """
    if not data:
        raise UnusablePictureError("the file is empty; fetch it again")
    try:
        with quietly():
            picture = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise UnusablePictureError(_too_many(int(pixels[0]) if pixels else None)) from error
    except UnidentifiedImageError as error:
        raise UnusablePictureError(_what_it_is(data, formats)) from error
    except Exception as error:  # Pillow's parsers raise whatever a damaged header leads them to.
        if data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little"):
            raise UnusablePictureError(_CUT_SHORT) from error
        raise UnusablePictureError(f"its header is damaged ({_brief(error)}); fetch it again") from error
    pixels_of_picture = picture.width * picture.height
    if Image.MAX_IMAGE_PIXELS is not None and pixels_of_picture > Image.MAX_IMAGE_PIXELS:
        raise UnusablePictureError(_too_many(pixels_of_picture, picture.size))
    if picture.format == "WEBP" and pixels_of_picture > MAX_WEBP_PIXELS:
        raise UnusablePictureError(_too_many(pixels_of_picture, picture.size, MAX_WEBP_PIXELS))
    return picture


def load(picture: Image.Image) -> None:
    """Decode the pixels.

    Raises:
        UnusablePictureError: they are damaged or cut short.
    """
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # As above: decoders and their plugins raise nearly anything.
        if "truncated" in str(error):
            raise UnusablePictureError(_CUT_SHORT) from error
        raise UnusablePictureError(f"its pixels are damaged ({_brief(error)}); fetch it again") from error


def orientation_of(picture: Image.Image) -> int:
    """How a picture, already loaded, still has to be turned, as its tag says: 1 (not at all) to 8.

    Before loading, the tag may not be known (PNG), or not yet heeded by Pillow itself (TIFF).
    """
    try:
        with quietly():
            value = picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # A damaged tag block says nothing about the pixels, which may be whole.
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def check_size(width: int, height: int, min_side: int) -> None:
    """Raise UnusablePictureError if the short side has fewer than `min_side` pixels."""
    if min(width, height) < min_side:
        raise UnusablePictureError(f"{width} × {height} px is too small; the short side needs at least {min_side} px")


def printable(path: Path | str) -> str:
    """A path that can be printed and written as UTF-8 even if its name's bytes are not."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def explain_os_error(error: OSError) -> str:
    """What the operating system said, and what to do."""
    advice = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check its permissions",
        errno.EPERM: "check its permissions",
        errno.EISDIR: "give a file",
    }.get(error.errno or 0, "check the disk")
    return f"{(error.strerror or str(error)).lower()}; {advice}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence Pillow's warnings: what matters among them (size, damage) is checked, and is an error, here."""
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_rgb(picture: Image.Image, *, alpha: bool) -> Image.Image:
    transparent = picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info
    target = "RGBA" if alpha and transparent else "RGB"
    if picture.mode == target:
        return picture
    if picture.mode.startswith("I"):
        # 16 bits per sample, which `convert` would clip at 255. 65535 / 257 = 255.
        gray = np.empty((picture.height, picture.width), np.uint8)
        for rows, strip in _strips(picture):
            gray[rows] = (np.clip(strip.astype(np.int64), 0, 65535) + 128) // 257
        picture = Image.fromarray(gray)
    elif picture.mode == "F":
        raise UnusablePictureError("its samples are floating-point numbers; convert it to 8 bits")
    elif picture.mode in ("P", "PA", "La") and transparent:
        picture = picture.convert("RGBA" if picture.mode != "La" else "LA")
    try:
        return picture.convert(target)
    except ValueError as error:
        raise UnusablePictureError(f"its colour mode {picture.mode} cannot become RGB; convert it") from error


def _to_array(picture: Image.Image) -> np.ndarray:
    array = np.empty((picture.height, picture.width, len(picture.getbands())), np.uint8)
    for rows, strip in _strips(picture):
        array[rows] = strip
    return array


def _strips(picture: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows and their samples, a few megabytes at a time: whole, the largest pictures would take gigabytes of copies."""
    height = max(1, (1 << 20) // picture.width)
    for top in range(0, picture.height, height):
        bottom = min(top + height, picture.height)
        yield slice(top, bottom), np.asarray(picture.crop((0, top, picture.width, bottom)))


def _make_upright(picture: Image.Image, orientation: int) -> Image.Image:
    """The picture as the camera was held, given its orientation tag."""
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _too_many(pixels: int | None, size: tuple[int, int] | None = None, limit: int | None = None) -> str:
    limit = limit or Image.MAX_IMAGE_PIXELS
    count = f"{size[0]} × {size[1]} px" if size else f"{pixels / 1e6:.0f} million pixels" if pixels else "its size"
    return f"{count} is above the limit of {limit / 1e6:.0f} million pixels; scale it down" if limit else count


def _what_it_is(data: bytes, formats: tuple[str, ...]) -> str:
    """Why Pillow knows nothing of a file, from its first bytes."""
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
        name = {b"avif": "an AVIF", b"avis": "an AVIF"}.get(data[8:12], "a HEIF picture or a video")
    if name is not None and name.removeprefix("a ") in formats:
        return f"it is {name} of a kind that cannot be decoded, or its header is damaged; convert it"
    if name is not None:
        return f"it is {name}; convert it to {allowed}"
    text = data[:512].strip()
    if text and all(byte >= 32 or byte in b"\t\r\n\f" for byte in text) and b"\x7f" not in text:
        return f"it holds text, not a picture; give {allowed}"
    return f"it is no picture that can be read, or its first bytes are damaged; give {allowed}"


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100] or type(error).__name__


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
