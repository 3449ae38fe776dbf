"""From every depth and layout of samples to 8 bits per channel.

Pillow decodes most layouts to 8 bits itself. The rest is here: gray of 12, 16 and 32 bits, scaled from black to white
by what the file says of its range; samples stored as negative (TIFF's WhiteIsZero); colours that stand for transparency
in shallow or deep PNGs; palettes of 8 bits in 16-bit fields. What has no certain value in 8 bits (signed and
floating-point samples, channels that use a part of their bits) is rejected with the reason.

A PNG's sBIT chunk changes nothing: its samples always use the full range.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, PpmImagePlugin, TiffImagePlugin

from fastnst.images.files import UnusableImageError

_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES = 254, 258, 259, 262, 277
_MAX_SAMPLE, _PLANAR, _COLOR_MAP, _EXTRA, _FORMAT = 281, 284, 320, 338, 339
_SMAX_SAMPLE, _YCBCR_COEFFICIENTS, _YCBCR_SUBSAMPLING, _REFERENCE_BLACK_WHITE = 341, 529, 530, 532
_PHOTOMETRICS = {
    **{0: "white is zero", 1: "gray", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELab"},
    **{9: "ICCLab", 10: "ITULab", 32803: "a sensor's raw data", 32844: "LogL", 32845: "LogLuv", 34892: "linear raw"},
}
_FIX = "save it with 8 or 16 unsigned bits per channel"
MAX_PYTHON_PIXELS = 4_000_000
"""Pillow decodes PPM as text, or with another number of levels than 256 and 65536, a pixel at a time in Python."""


def check_samples(image: Image.Image) -> None:
    """Check the samples of an image that is opened and not loaded.

    Raises:
        UnusableImageError: Pillow would decode them to wrong values, or nobody knows what is black and white.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image)
    elif isinstance(image, PpmImagePlugin.PpmImageFile) and (
        image.tile[0].codec_name != "raw" and image.width * image.height > MAX_PYTHON_PIXELS
    ):
        raise UnusableImageError(
            f"{image.width} × {image.height} px is above {MAX_PYTHON_PIXELS / 1e6:.0f} million pixels, the limit for "
            "a PPM that is text or of another number of levels than 256; convert it to PNG"
        )
    if image.mode == "F":
        raise UnusableImageError(f"its samples are floating-point numbers, without a fixed white; {_FIX}")


def explain_tiff(data: bytes) -> str | None:
    """Return the layout of a TIFF that Pillow cannot decode, with advice; None if its tags cannot be read."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if data[2] == 43 else data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits, kind = _values(tags.get(_BITS, 1)), tags.get(_PHOTOMETRIC, 0)
        samples = tags.get(_SAMPLES, len(bits))
        names = {2: "signed", 3: "floating-point"}
        formats = {names.get(each, "") for each in _values(tags.get(_FORMAT, 1))} - {""}
    except Exception:  # Its first directory is damaged.
        return None
    layout = f"{samples} {' '.join([*sorted(formats), 'samples'])} of {'/'.join(map(str, sorted(set(bits))))} bits"
    return f"its layout ({_PHOTOMETRICS.get(kind, f'photometric {kind}')}, {layout}) cannot be decoded; save it as PNG"


def to_8_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Convert a loaded image to L, LA, RGB, RGBA, CMYK or LAB, with the values that the file means.

    Args:
        image: as loaded.
        data: the whole file.
    """
    is_png = image.format == "PNG" and len(data) > 25
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        return _scaled_gray(image, key)
    if image.mode in ("P", "PA"):
        _mend_palette(image)
        return image.convert("RGBA" if image.mode == "PA" or key is not None else "RGB")
    if key is not None and image.mode in ("L", "RGB") and is_png:
        depth = data[24]
        if image.mode == "L":
            key = key * 255 // ((1 << depth) - 1)
        elif depth == 16:  # Pillow keeps the high bytes; colours that share them are one.
            key = tuple(value >> 8 for value in key)
        image.info["transparency"] = key
    if image.mode in ("1", "L"):
        return image if image.mode == "L" and key is None else image.convert("L" if key is None else "LA")
    if image.mode == "RGB" and key is not None:
        return image.convert("RGBA")
    if is_png and image.mode == "RGBA" and data[25] == 4:
        return image.convert("LA")  # 16-bit gray with alpha
    target = {"La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB"}.get(image.mode, image.mode)
    if target not in ("LA", "RGB", "RGBA", "CMYK", "LAB"):
        raise UnusableImageError(f"its colour mode {image.mode} cannot become RGB; convert it")
    return image if image.mode == target else image.convert(target)


def strips(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield rows and their samples, a few MB at a time; copies of the largest images take gigabytes."""
    height = max(1, (1 << 20) // image.width)
    for top in range(0, image.height, height):
        bottom = min(top + height, image.height)
        yield slice(top, bottom), np.asarray(image.crop((0, top, image.width, bottom)))


def _scaled_gray(image: Image.Image, key: object) -> Image.Image:
    """Scale gray of more than 8 bits to 255, rounding to nearest."""
    white, negative = 65535, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        white, negative = _white_level(image.tag_v2), image.tag_v2.get(_PHOTOMETRIC) == 0
    gray = np.empty((image.height, image.width), np.uint8)
    opaque = np.empty_like(gray) if isinstance(key, int) else None
    for rows, strip in strips(image):
        # Pillow holds 32 bits as signed.
        samples = np.minimum(strip.astype(np.int64) & 0xFFFFFFFF, white)
        scaled = (samples * 255 + white // 2) // white
        gray[rows] = 255 - scaled if negative else scaled
        if opaque is not None:
            opaque[rows] = np.where(strip == key, 0, 255)
    result = Image.fromarray(gray)
    if opaque is not None:
        result = result.convert("LA")
        result.putalpha(Image.fromarray(opaque))
    return result


def _white_level(tags: Any) -> int:
    """Return the sample value of white (of black where white is zero).

    Scanners and microscopes store 10, 12 or 14 bits in 16, and say so in MaxSampleValue or SMaxSampleValue; any other
    value there is the brightest pixel, which is no white.
    """
    bits: int = _values(tags.get(_BITS, 1))[0]
    return next((1 << used) - 1 for used in (_used_bits(tags, bits), bits) if used)


def _used_bits(tags: Any, bits: int) -> int | None:
    """Return how many of `bits` the samples use according to the tags, if fewer."""
    for tag in (_SMAX_SAMPLE, _MAX_SAMPLE):
        for value in _values(tags.get(tag, ())):
            used = int(value).bit_length()
            if 9 <= used < bits and int(value) == (1 << used) - 1:
                return used
    return None


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    tags = image.tag_v2
    bits, formats = _values(tags.get(_BITS, 1)), _values(tags.get(_FORMAT, 1))
    if int(tags.get(_SUBFILE, 0)) & 1:
        raise UnusableImageError("its first image is a thumbnail, as in a camera's raw files; export it as JPEG")
    if 2 in formats:
        raise UnusableImageError(f"its samples are signed numbers, without a fixed black and white; {_FIX}")
    used = _used_bits(tags, bits[0])
    if used and not image.mode.startswith("I"):
        raise UnusableImageError(f"its channels use {used} of {bits[0]} bits and would be nearly black; {_FIX}")
    compressed = image.use_load_libtiff
    if tags.get(_PLANAR, 1) == 2 and len(bits) > 1 and max(bits) > 8:
        raise UnusableImageError(f"its channels of {max(bits)} bits are stored in separate planes; save it interleaved")
    if image.mode == "YCbCr" and not compressed:
        usual = {
            _YCBCR_SUBSAMPLING: ((1, 1), (2, 2)),
            _YCBCR_COEFFICIENTS: ((0.299, 0.587, 0.114),) * 2,
            _REFERENCE_BLACK_WHITE: ((0, 255, 128, 255, 128, 255),) * 2,
        }
        for tag, (wanted, default) in usual.items():
            if not np.allclose([float(value) for value in _values(tags.get(tag, default))], wanted, atol=1e-3):
                raise UnusableImageError(f"its YCbCr samples are subsampled or of an unusual range; {_FIX} as RGB")


def _mend_palette(image: Image.Image) -> None:
    """Undo Pillow's division of a TIFF's palette by 256 where its 16-bit fields hold 8 bits."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        palette = image.tag_v2.get(_COLOR_MAP, ())
        if palette and max(palette) < 256:
            image.putpalette(bytes(np.reshape(palette, (3, -1)).T.astype(np.uint8)))


def _values(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
