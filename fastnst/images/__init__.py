"""Read, check and write single images.

Reading always returns upright, 8-bit RGB: the orientation tag is applied; grayscale, palette, CMYK and 16-bit images
are converted; transparency is dropped, or kept on request. Colour profiles are not applied.
"""

from fastnst.images.decode import decode, orientation_of
from fastnst.images.files import (
    UnusableImageError,
    check_size,
    explain_os_error,
    printable,
    read_bytes,
    read_with_mtime,
)
from fastnst.images.open import READABLE_FORMATS, TRAINING_FORMATS, ignore_pillow_warnings, load, open_image
from fastnst.images.read import MIN_SIDE, read_image
from fastnst.images.tensors import to_array, to_tensor
from fastnst.images.write import SUFFIXES, check_writable_suffix, write_image

__all__ = [
    "MIN_SIDE",
    "READABLE_FORMATS",
    "SUFFIXES",
    "TRAINING_FORMATS",
    "UnusableImageError",
    "check_size",
    "check_writable_suffix",
    "decode",
    "explain_os_error",
    "ignore_pillow_warnings",
    "load",
    "open_image",
    "orientation_of",
    "printable",
    "read_bytes",
    "read_image",
    "read_with_mtime",
    "to_array",
    "to_tensor",
    "write_image",
]
