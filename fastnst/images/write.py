"""Write an image's file. Every result says that fastnst wrote it, and only such files are replaced unasked."""

import errno
import functools
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

from fastnst.errors import DataError
from fastnst.images.files import printable
from fastnst.images.header import SOFTWARE, is_own_image
from fastnst.images.metadata import MAX_EXIF_BYTES, exact_text
from fastnst.images.open import ignore_pillow_warnings
from fastnst.storage import ForeignFileError, storage_error, write_atomic

log = logging.getLogger(__name__)

SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383}
"""Pixels. JPEG's own limit is 65535; libjpeg's is a little lower."""

_MAX_NAME_BYTES = 255
_INCH = 2  # EXIF's ResolutionUnit
# Offsets into the source's file, wrong in any other.
_POINTERS = (ExifTags.Base.MakerNote, ExifTags.Base.ExifInteroperabilityOffset)


def write_image(
    path: Path | str,
    array: np.ndarray,
    *,
    exif: bytes | None = None,
    dpi: tuple[float, float] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an image atomically, as JPEG, PNG or WebP by the path's suffix.

    JPEG and WebP are written with quality 95, JPEG without chroma subsampling. JPEG has no transparency: an image with
    alpha is composited onto white. The file says that it is sRGB, by an embedded profile, and that fastnst wrote it, by
    the EXIF tag Software.

    Args:
        path: ends in .jpg, .jpeg, .png or .webp.
        array: uint8 `[H, W, 3]` or `[H, W, 4]`, in sRGB and upright.
        exif: tags to keep, as `read_with_metadata` returns them. Those about pixels are set to the array's.
        dpi: pixels per inch, across and down.
        overwrite: also replace a file that fastnst did not write, or a link (not what it leads to). By default only
            images are replaced that fastnst wrote.

    Raises:
        DataError: wrong suffix, dtype or shape; a side longer than the format allows; or the file cannot be written.
        ForeignFileError: a file that fastnst did not write is in the way.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"cannot write {printable(path)}: {path.suffix or 'no suffix'} is not a supported format; "
            f"end the name in {', '.join(SUFFIXES)}"
        )
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4) or array.size == 0:
        raise DataError(
            f"cannot write {printable(path)}: an image is a uint8 array [H, W, 3 or 4], "
            f"not {array.dtype} {list(array.shape)}; see fastnst.images.to_array"
        )
    check_writable_size(path, array.shape[1], array.shape[0])
    check_replaceable(path, overwrite=overwrite)
    image = Image.fromarray(np.ascontiguousarray(array))
    image_format = SUFFIXES[path.suffix.lower()]
    options: dict[str, Any] = {"icc_profile": _srgb_profile(), "exif": _tags(path, image.size, exif, dpi)}
    if dpi is not None and image_format != "WEBP":  # which has the EXIF tags only
        options["dpi"] = tuple(min(value, 65535.0) for value in dpi)
    if image_format == "JPEG":
        options |= {"quality": 95, "subsampling": 0}
        if image.mode == "RGBA":
            on_white = Image.new("RGBA", image.size, "white")
            on_white.alpha_composite(image)
            image = on_white.convert("RGB")
    elif image_format == "WEBP":
        options["quality"] = 95
    encoded = io.BytesIO()
    try:
        image.save(encoded, image_format, **options)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot write {printable(path)}: {image_format} refuses {image.width} × {image.height} px "
            f"({error}); choose a name that ends in .png"
        ) from error
    write_atomic(path, encoded.getvalue(), may_replace=None if overwrite else is_own_image)


def check_writable_name(name: str) -> None:
    """Raise DataError if a result's name, made from that of an image, is too long for a file system."""
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:
        raise DataError(f"{printable(name)} is too long for a file's name; rename the image")


def check_writable_size(path: Path, width: int, height: int) -> None:
    """Raise DataError if a side is longer than the format of the path's suffix holds; call it before long work."""
    image_format = SUFFIXES[path.suffix.lower()]
    limit = MAX_SIDE.get(image_format)
    if limit is not None and max(width, height) > limit:
        raise DataError(
            f"cannot write {printable(path)}: a side of a {image_format} has at most {limit:,} px, and the image "
            f"is {width} × {height} px; choose a name that ends in .png"
        )


def check_replaceable(path: Path, *, overwrite: bool = False) -> None:
    """Check that `write_image` would write to `path`; call it before long work.

    Raises:
        ForeignFileError: a file is there that fastnst did not write, and `overwrite` is not set.
        StorageError: a folder is there.
    """
    if path.is_dir() and not path.is_symlink():
        raise storage_error(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if not overwrite and os.path.lexists(path) and not is_own_image(path):
        raise ForeignFileError(path)


def _tags(path: Path, size: tuple[int, int], source: bytes | None, dpi: tuple[float, float] | None) -> bytes:
    """Return the EXIF tags of a result: what the source says of the photo, and what the result's file is."""
    if source is not None:
        try:
            with ignore_pillow_warnings():
                encoded = _merged(size, source, dpi)
            if len(encoded) <= MAX_EXIF_BYTES:
                return encoded
            reason = f"{len(encoded)} bytes are above the limit of {MAX_EXIF_BYTES}"
        except Exception as error:  # Tags of a wrong type raise anything.
            reason = f"they are damaged: {error}"
        log.warning("%s: written without the EXIF tags of its source; %s", printable(path), reason)
    return _merged(size, b"", dpi)


def _merged(size: tuple[int, int], source: bytes, dpi: tuple[float, float] | None) -> bytes:
    tags = Image.Exif()
    tags.load(source)
    photo = exact_text(tags.get_ifd(ExifTags.IFD.Exif))
    if places := exact_text(tags.get_ifd(ExifTags.IFD.GPSInfo)):
        tags[ExifTags.IFD.GPSInfo] = places
    tags.update(exact_text({tag: value for tag, value in tags.items() if isinstance(value, str)}))
    for pointer in _POINTERS:
        photo.pop(pointer, None)
    tags[ExifTags.IFD.Exif] = photo | {
        ExifTags.Base.ColorSpace: 1,  # sRGB
        ExifTags.Base.ExifImageWidth: size[0],
        ExifTags.Base.ExifImageHeight: size[1],
    }
    tags[ExifTags.Base.Software] = SOFTWARE
    tags[ExifTags.Base.Orientation] = 1
    if dpi is not None:
        tags[ExifTags.Base.XResolution], tags[ExifTags.Base.YResolution] = dpi
        tags[ExifTags.Base.ResolutionUnit] = _INCH
    return tags.tobytes()


@functools.cache
def _srgb_profile() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # Bytes 24 to 35 hold the time of its making; results must not depend on when they are written.
    return profile[:24] + b"\x07\xd0\0\x01\0\x01\0\0\0\0\0\0" + profile[36:]
