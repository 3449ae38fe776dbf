"""What an image's file tells without being decoded: its size, and whether fastnst wrote it."""

from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from fastnst import __version__
from fastnst.images.open import MAX_PIXELS_OF_ONE, READABLE_FORMATS, _pillow_limit, ignore_pillow_warnings
from fastnst.storage import open_nonblocking

SOFTWARE = f"fastnst {__version__}"
"""EXIF tag Software of every image that `write_image` writes."""


class Header(NamedTuple):
    """The header of an image's file."""

    width: int
    """Pixels, before the orientation tag is applied."""
    height: int
    software: str
    """EXIF tag Software; empty if absent."""


def read_header(path: Path) -> Header | None:
    """Read the header of an image; None if it cannot be read. Never blocks, and decodes nothing."""
    try:
        with (
            ignore_pillow_warnings(),
            _pillow_limit(MAX_PIXELS_OF_ONE),
            open(path, "rb", opener=open_nonblocking) as file,
            Image.open(file, formats=READABLE_FORMATS) as image,
        ):
            tags = Image.Exif()
            # Not `getexif`, which decodes a PNG whose tags may follow its pixels.
            tags.load(image.info.get("exif") or b"")
            return Header(*image.size, str(tags.get(ExifTags.Base.Software, "")))
    except Exception:  # Pillow's parsers raise anything on a damaged header.
        return None


def is_own_image(path: Path) -> bool:
    """Return whether fastnst wrote the image at `path`. A link is nobody's result: it is what a user made."""
    if path.is_symlink():
        return False
    header = read_header(path)
    return header is not None and header.software.startswith("fastnst ")
