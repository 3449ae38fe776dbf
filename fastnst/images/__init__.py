"""Read, check and write single images.

Reading always returns upright, 8-bit RGB: the orientation tag is applied; grayscale, palette, CMYK and 16-bit images
are converted; transparency is dropped, or kept on request. Colour profiles are not applied.
"""

from fastnst.images.decode import decode, orientation_of
from fastnst.images.files import (
    UnusableImageError,
    check_size,
    explain_os_error,
    open_nonblocking,
    printable,
    read_bytes,
    read_with_mtime,
)
from fastnst.images.header import SOFTWARE, Header, is_own_image, read_header
from fastnst.images.open import READABLE_FORMATS, TRAINING_FORMATS, ignore_pillow_warnings, load, open_image
from fastnst.images.read import MIN_SIDE, SourceImage, read_image, read_with_metadata
from fastnst.images.suffixes import IMAGE_SUFFIXES
from fastnst.images.tensors import to_array, to_tensor
from fastnst.images.write import (
    SUFFIXES,
    check_replaceable,
    check_writable_size,
    check_writable_suffix,
    write_image,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "MIN_SIDE",
    "READABLE_FORMATS",
    "SOFTWARE",
    "SUFFIXES",
    "TRAINING_FORMATS",
    "Header",
    "SourceImage",
    "UnusableImageError",
    "check_replaceable",
    "check_size",
    "check_writable_size",
    "check_writable_suffix",
    "decode",
    "explain_os_error",
    "ignore_pillow_warnings",
    "is_own_image",
    "load",
    "open_image",
    "open_nonblocking",
    "orientation_of",
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
