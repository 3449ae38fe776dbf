"""Write an image's file."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastnst.errors import DataError
from fastnst.images.files import printable
from fastnst.storage import write_atomic

SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}


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
