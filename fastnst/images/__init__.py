"""Read, check and write single images.

Reading always returns upright sRGB of 8 bits: the orientation tag and the colour profile are applied; grayscale,
palette, CMYK, CIELab and deep images are converted; colours under transparency, which nobody sees, are filled from the
visible ones, and transparency is dropped, or kept on request.
"""

from fastnst.images.color import png_chunks
from fastnst.images.decode import decode, orientation_of, prepare
from fastnst.images.files import (
    UnusableImageError,
    check_size,
    explain_os_error,
    printable,
    read_bytes,
    read_with_mtime,
)
from fastnst.images.header import SOFTWARE, Header, is_own_image, read_header
from fastnst.images.open import (
    OTHER_SUFFIXES,
    READABLE_FORMATS,
    READABLE_SUFFIXES,
    ignore_pillow_warnings,
    load,
    open_image,
)
from fastnst.images.read import MIN_SIDE, SourceImage, read_image, read_with_metadata
from fastnst.images.tensors import to_array, to_tensor
from fastnst.images.transparency import is_transparent
from fastnst.images.write import (
    SUFFIXES,
    check_replaceable,
    check_writable_name,
    check_writable_size,
    write_image,
)

__all__ = [
    "MIN_SIDE",
    "OTHER_SUFFIXES",
    "READABLE_FORMATS",
    "READABLE_SUFFIXES",
    "SOFTWARE",
    "SUFFIXES",
    "Header",
    "SourceImage",
    "UnusableImageError",
    "check_replaceable",
    "check_size",
    "check_writable_name",
    "check_writable_size",
    "decode",
    "explain_os_error",
    "ignore_pillow_warnings",
    "is_own_image",
    "is_transparent",
    "load",
    "open_image",
    "orientation_of",
    "png_chunks",
    "prepare",
    "printable",
    "read_bytes",
    "read_header",
    "read_image",
    "read_with_metadata",
    "read_with_mtime",
    "to_array",
    "to_tensor",
    "write_image",
]
