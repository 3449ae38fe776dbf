"""What a photographer wants to keep of a file besides its pixels: EXIF tags and resolution.

Tags that describe how the source stored its pixels are dropped, since the result stores other pixels: orientation,
thumbnail, colour space, embedded profiles, TIFF's strips, and maker notes, whose offsets point into the old file.
"""

import math
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image

from fastnst.images.open import ignore_pillow_warnings

MAX_EXIF_BYTES = 65533 - len(b"Exif\0\0")
"""What one segment of a JPEG holds."""

_CENTIMETRE = 3
_KEPT = frozenset(
    tag.value
    for tag in (
        ExifTags.Base.ImageDescription,
        ExifTags.Base.Make,
        ExifTags.Base.Model,
        ExifTags.Base.XResolution,
        ExifTags.Base.YResolution,
        ExifTags.Base.ResolutionUnit,
        ExifTags.Base.Software,
        ExifTags.Base.DateTime,
        ExifTags.Base.Artist,
        ExifTags.Base.HostComputer,
        ExifTags.Base.Copyright,
        ExifTags.Base.Rating,
        ExifTags.Base.RatingPercent,
        ExifTags.Base.XPTitle,
        ExifTags.Base.XPComment,
        ExifTags.Base.XPAuthor,
        ExifTags.Base.XPKeywords,
        ExifTags.Base.XPSubject,
    )
)
"""Tags of the main directory that are about the photo; all others are about how its pixels are stored."""
_DROPPED_BY_EXIF = frozenset(
    tag.value
    for tag in (
        ExifTags.Base.MakerNote,
        ExifTags.Base.ColorSpace,
        ExifTags.Base.ExifImageWidth,
        ExifTags.Base.ExifImageHeight,
        ExifTags.Base.ExifInteroperabilityOffset,
        ExifTags.Base.ComponentsConfiguration,
        ExifTags.Base.CompressedBitsPerPixel,
        ExifTags.Base.Gamma,
    )
)


class _ExactText(str):
    """Text that Pillow writes in the bytes that it was read from.

    Tags are ASCII by the standard, but programs write names and `©` as UTF-8; Pillow would put `?` for them.
    """

    __slots__ = ()

    def encode(self, *_: str) -> bytes:
        return super().encode("latin-1", "replace")


def exact_text(tags: Mapping[int, Any]) -> dict[int, Any]:
    """Return tags as Pillow reads them with texts that keep their bytes when Pillow writes them."""
    return {tag: _ExactText(value) if isinstance(value, str) else value for tag, value in tags.items()}


def exif_to_keep(image: Image.Image, orientation: int) -> bytes | None:
    """Return the EXIF tags of a loaded image that hold for its upright pixels in sRGB; None without any.

    Args:
        image: as loaded, before any conversion.
        orientation: the orientation tag that still has to be applied.

    Returns:
        Bytes that begin with `Exif\\0\\0`, as Pillow's `save(exif=…)` takes them: orientation 1, no thumbnail.
    """
    try:
        with ignore_pillow_warnings():
            source = image.getexif()
            kept = Image.Exif()
            for tag, value in exact_text(source).items():
                if tag in _KEPT:
                    kept[tag] = value
            photo = exact_text(source.get_ifd(ExifTags.IFD.Exif))
            photo = {tag: value for tag, value in photo.items() if tag not in _DROPPED_BY_EXIF}
            places = exact_text(source.get_ifd(ExifTags.IFD.GPSInfo))
            if not (len(kept) or photo or places):
                return None
            width, height = image.size[::-1] if orientation >= 5 else image.size
            photo |= {ExifTags.Base.ColorSpace: 1}  # sRGB
            photo |= {ExifTags.Base.ExifImageWidth: width, ExifTags.Base.ExifImageHeight: height}
            kept[ExifTags.Base.Orientation] = 1
            kept[ExifTags.IFD.Exif] = photo
            if places:
                kept[ExifTags.IFD.GPSInfo] = places
            if orientation >= 5 and ExifTags.Base.XResolution in kept and ExifTags.Base.YResolution in kept:
                across, down = kept[ExifTags.Base.XResolution], kept[ExifTags.Base.YResolution]
                kept[ExifTags.Base.XResolution], kept[ExifTags.Base.YResolution] = down, across
            encoded = kept.tobytes()
    except Exception:  # The tags are damaged, but the pixels may be intact.
        return None
    return encoded if len(encoded) <= MAX_EXIF_BYTES else None


def dpi_of(image: Image.Image, orientation: int) -> tuple[float, float] | None:
    """Return a loaded image's resolution in pixels per inch, across and down the upright image; None if unknown."""
    try:
        if "dpi" in image.info:
            across, down = (float(value) for value in image.info["dpi"])
        else:  # WebP and AVIF have no field of their own.
            with ignore_pillow_warnings():
                tags = image.getexif()
                per_inch = 2.54 if tags.get(ExifTags.Base.ResolutionUnit) == _CENTIMETRE else 1.0
                across, down = (
                    float(tags[tag]) * per_inch for tag in (ExifTags.Base.XResolution, ExifTags.Base.YResolution)
                )
    except Exception:  # As above: absent or damaged.
        return None
    if not all(math.isfinite(value) and 1 <= value < 65536 for value in (across, down)):
        return None
    return (down, across) if orientation >= 5 else (across, down)
