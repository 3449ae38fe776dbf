"""The colour space of an image, and its conversion to sRGB.

What a file says about its colours, the first of: an embedded ICC profile (PNG's cICP chunk goes before it); in AVIF
and PNG the code points of ITU-T H.273 (`nclx`, cICP); PNG's gAMA and cHRM; Adobe RGB in EXIF. A file that says nothing
holds sRGB. LittleCMS converts (relative colorimetric, with black point compensation), in 8 bits. A profile that moves
no colour by more than one level is sRGB in effect and skipped, so that the common case stays exact and fast.

Not read: profiles in GIF and BMP; transfer functions of video (BT.709 and kin) count as sRGB's, as in browsers.
"""

import functools
import io
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageCms

from fastnst.images.files import UnusableImageError

MAX_PROFILE_BYTES = 1 << 22
"""Profiles of printers take up to 3 MB; larger ones are ignored, by name."""

_SRGB_PRIMARIES = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_D65 = (0.3127, 0.3290)
_PRIMARIES = {  # ITU-T H.273, table 2: red, green and blue; all with white point D65
    1: _SRGB_PRIMARIES,
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    7: (0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
_UNSPECIFIED = 2
_SRGB_CURVE = 0.0
"""Stands for sRGB's transfer function where others are an exponent."""
_CURVES = {1: _SRGB_CURVE, 4: 2.2, 5: 2.8, 6: _SRGB_CURVE, 8: 1.0, 13: _SRGB_CURVE, 14: _SRGB_CURVE, 15: _SRGB_CURVE}
_HDR = {16: "PQ", 18: "HLG"}
_ADOBE_RGB = ((0.64, 0.33, 0.21, 0.71, 0.15, 0.06), _D65, 563 / 256)
_ADOBE_RGB_IN_EXIF = (b"R03\0", bytes.fromhex("a001 0003 00000001 0002"), bytes.fromhex("01a0 0300 01000000 0200"))
"""The interoperability index; and the tag ColorSpace with value 2, in both byte orders."""

_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_SPACES = {"RGB": "RGB ", "RGBA": "RGB ", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}


@dataclass(frozen=True, slots=True)
class ColorSpace:
    """What has to be done to an image's colours."""

    profile: bytes | None = None
    """ICC profile to convert from; None: the colours are sRGB."""
    ignored: str = ""
    """Why a profile in the file is ignored, or nothing."""


def color_space(image: Image.Image, data: bytes) -> ColorSpace:
    """Return the colour space of an image that is opened, and neither loaded nor drafted.

    Args:
        image: the image.
        data: the whole file.

    Raises:
        UnusableImageError: it is HDR, which 8 bits of sRGB cannot hold.
    """
    codes = _code_points(image, data)
    profile = None if codes and image.format == "PNG" else _embedded(image, data)
    if isinstance(profile, str):
        return ColorSpace(ignored=profile)
    if profile is None:
        profile = _from_codes(codes) or _from_png_gamma(image) or _from_exif(image)
        if profile is None:
            return ColorSpace()
    try:
        needed = _transform(profile, _input_mode(_mode_of(image, data), profile)) is not None
    except _ProfileError as error:
        return ColorSpace(ignored=f"its colour profile {error}")
    return ColorSpace(profile if needed else None)


def to_srgb(image: Image.Image, space: ColorSpace) -> Image.Image:
    """Convert an image of 8 bits per channel to sRGB, in place where possible.

    Args:
        image: L, LA, RGB, RGBA, CMYK or LAB.
        space: its colour space.

    Returns:
        RGB or RGBA; or `image` itself where there is nothing to convert.
    """
    profile = space.profile
    if image.mode == "LAB" and profile is None:
        profile = _lab_profile()
    if profile is None:
        return image
    alpha = image.getchannel("A") if image.mode == "LA" else None
    mode = _input_mode(image.mode, profile)
    transform = _transform(profile, mode)
    if transform is None:
        return image
    if mode == "RGB":
        if image.mode in ("L", "LA"):
            image = image.convert("RGBA" if alpha else "RGB")
        if image.mode == "RGBA":
            transform = _transform(profile, "RGBA")
        assert transform is not None
        # LittleCMS works pixel by pixel, and leaves alpha.
        return transform.apply_in_place(image)
    converted = transform.apply(image.getchannel("L") if alpha else image)
    if alpha:
        converted.putalpha(alpha)
    return converted


class _ProfileError(Exception):
    """What is wrong with a profile, as the end of a sentence."""


def _mode_of(image: Image.Image, data: bytes) -> str:
    """Return the mode of an opened image; of a PNG of gray with alpha in 16 bits, which Pillow opens as RGBA, LA."""
    return "LA" if image.format == "PNG" and data[24:26] == b"\x10\4" else image.mode


def _input_mode(mode: str, profile: bytes) -> str:
    """Return the mode of the pixels that a profile is applied to, for an image of `mode`."""
    if mode in ("CMYK", "LAB"):
        return mode
    is_gray = mode in ("1", "L", "LA", "La") or mode.startswith("I")
    # Tools that make a photo gray keep its RGB profile: it holds for R = G = B.
    return "L" if is_gray and profile[16:20] == b"GRAY" else "RGB"


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion to sRGB of pixels of `mode`; None if it changes none.

    Raises:
        _ProfileError: the profile is damaged or of another colour space.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
    except Exception as error:  # Pillow raises OSError; whatever it is, the profile is of no use.
        raise _ProfileError("is damaged") from error
    if space != _SPACES[mode]:
        raise _ProfileError(f"is for {space.strip() or 'unknown'} colours, and the image is {_SPACES[mode].strip()}")
    try:
        target = "RGBA" if mode == "RGBA" else "RGB"
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, target, _INTENT, _FLAGS)
    except Exception as error:
        raise _ProfileError("is damaged") from error
    return transform if mode in ("RGBA", "CMYK", "LAB") or _moves_colors(transform, mode) else None


def _moves_colors(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a conversion changes any of a grid of colours, or any gray, by more than one level."""
    grays = np.arange(256, dtype=np.uint8)[:, None]
    grid = np.stack(np.meshgrid(*[np.linspace(0, 255, 9).astype(np.uint8)] * 3), -1).reshape(-1, 3)
    colors = grays if mode == "L" else np.concatenate([grid, grays.repeat(3, 1)])
    image = Image.fromarray(colors if mode == "L" else colors[None])
    converted = np.asarray(transform.apply(image)).reshape(-1, 3)
    return bool(np.abs(converted.astype(int) - colors).max() > 1)


@functools.cache
def _lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def _embedded(image: Image.Image, data: bytes) -> bytes | str | None:
    """Return the embedded profile, why it is ignored, or None without any."""
    profile = image.info.get("icc_profile")
    if image.format == "JPEG2000":
        profile = _jpeg2000_profile(data)
    elif profile is None and image.format in ("JPEG", "MPO"):
        # Pillow drops a profile with a missing segment, and one behind the frame's header.
        late = sorted(getattr(image, "icclist", []))
        complete = late and len(late[0]) > 13 and late[0][13] == len(late)
        if complete:
            profile = b"".join(segment[14:] for segment in late)
        elif late or "icc_profile" in image.info:
            return "its colour profile lacks a part"
    elif profile is None and image.format == "PNG" and b"iCCP" in _chunks_before_pixels(data):
        return "its colour profile is damaged"
    if not profile:
        return None
    if not isinstance(profile, bytes):
        return "its colour profile is damaged"
    if len(profile) > MAX_PROFILE_BYTES:
        return f"its colour profile of {len(profile) / 2**20:.1f} MiB is above {MAX_PROFILE_BYTES >> 20} MiB"
    return profile


def _code_points(image: Image.Image, data: bytes) -> tuple[int, int] | None:
    """Return primaries and transfer function as numbered by ITU-T H.273, of a PNG or AVIF that states them."""
    if image.format == "PNG":
        chunk = _chunks_before_pixels(data).get(b"cICP", b"")
        return (chunk[0], chunk[1]) if len(chunk) == 4 else None
    if image.format == "AVIF":
        for kind, start, end in _boxes(data, [b"meta", b"iprp", b"ipco"]):
            if kind == b"colr" and data[start : start + 4] == b"nclx" and end - start >= 8:
                primaries, curve = struct.unpack_from(">HH", data, start + 4)
                return primaries, curve
    return None


def _from_codes(codes: tuple[int, int] | None) -> bytes | None:
    if codes is None:
        return None
    primaries, curve = codes
    if curve in _HDR:
        raise UnusableImageError(
            f"it is an HDR image ({_HDR[curve]} transfer function), and 8 bits of sRGB are needed; export it as SDR"
        )
    if curve not in _CURVES or primaries not in _PRIMARIES:
        return None  # Mostly 2, unspecified.
    if (primaries, _CURVES[curve]) == (1, _SRGB_CURVE):
        return None
    return make_profile(_PRIMARIES[primaries], _D65, _CURVES[curve])


def _from_png_gamma(image: Image.Image) -> bytes | None:
    """Return the profile that PNG's gAMA and cHRM chunks describe; None if they do not, or for sRGB."""
    if image.format != "PNG" or "srgb" in image.info:
        return None
    gamma, chromaticity = image.info.get("gamma"), image.info.get("chromaticity")
    if gamma is None and chromaticity is None:
        return None
    exponent = 1 / gamma if gamma else 2.2
    if not 0.2 <= exponent <= 5:
        return None
    white, primaries = (chromaticity[:2], chromaticity[2:]) if chromaticity else (_D65, _SRGB_PRIMARIES)
    # Programs write 1 / 2.2 where they mean sRGB, and round.
    return make_profile(tuple(primaries), tuple(white), _SRGB_CURVE if abs(exponent - 2.2) < 0.05 else exponent)


def _from_exif(image: Image.Image) -> bytes | None:
    """Return Adobe RGB's profile if the tags of a camera say so (DCF 2.0: interoperability index R03)."""
    exif = image.info.get("exif") or b""
    # Cheap enough for every photo of a folder: the tags are parsed only if they may say so.
    if image.format not in ("JPEG", "MPO") or not any(sign in exif for sign in _ADOBE_RGB_IN_EXIF):
        return None
    try:
        tags = image.getexif()
        photo = tags.get_ifd(ExifTags.IFD.Exif)
        index = tags.get_ifd(ExifTags.IFD.Interop).get(1) if ExifTags.IFD.Interop in photo else None
    except Exception:  # The tags are damaged.
        return None
    is_adobe = photo.get(ExifTags.Base.ColorSpace) == 2 or str(index).strip("\0 ") == "R03"
    return make_profile(*_ADOBE_RGB) if is_adobe else None


def _jpeg2000_profile(data: bytes) -> bytes | None:
    for kind, start, end in _boxes(data, [b"jp2h"]):
        if kind == b"colr" and data[start : start + 1] in (b"\2", b"\3"):
            return data[start + 3 : end]
    return None


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start (at the name) and end (after the checksum) of each complete chunk of a PNG."""
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield data[at + 4 : at + 8], at + 4, end
        at = end


def _chunks_before_pixels(data: bytes) -> dict[bytes, bytes]:
    """Return the beginnings of a PNG's chunks that come before its pixels, of each name the last."""
    chunks = itertools.takewhile(lambda chunk: chunk[0] != b"IDAT", png_chunks(data))
    return {name: data[start + 4 : min(end - 4, start + MAX_PROFILE_BYTES)] for name, start, end in chunks}


def _boxes(data: bytes, path: list[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of the content of each box inside the boxes of `path` (ISO/IEC 14496-12)."""
    at, end = 0, len(data)
    while at + 8 <= end:
        size, header = int.from_bytes(data[at : at + 4], "big"), 8
        kind = data[at + 4 : at + 8]
        if size == 1:
            size, header = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        stop = end if size == 0 else min(at + size, end)
        if stop - at < header:
            return
        if not path:
            yield kind, at + header, stop
        elif kind == path[0]:
            # `meta` has a version before its boxes.
            at, end, path = at + header + (4 if kind == b"meta" else 0), stop, path[1:]
            continue
        at = stop


@functools.lru_cache(maxsize=16)
def make_profile(primaries: tuple[float, ...], white: tuple[float, ...], exponent: float) -> bytes | None:
    """Make an ICC profile of an RGB space; None if its primaries span none.

    Args:
        primaries: x and y of red, green and blue.
        white: x and y of the white point.
        exponent: of the transfer function; 0 stands for sRGB's.
    """
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1.0, 0.8249])
    try:
        x, y = np.array([*primaries, *white], float).reshape(4, 2).T
        columns = np.stack([x / y, np.ones(4), (1 - x - y) / y])
        with np.errstate(all="raise"):
            matrix = columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])
            adapted = np.linalg.solve(bradford, np.diag(bradford @ d50 / (bradford @ columns[:, 3])) @ bradford)
        colorants = adapted @ matrix
    except (ValueError, FloatingPointError, np.linalg.LinAlgError):
        return None
    if not (np.isfinite(colorants).all() and np.abs(colorants).max() < 100):
        return None
    parameters = [exponent] if exponent else [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045]
    curve = struct.pack(">4s4xHxx", b"para", 0 if exponent else 3) + _fixed(parameters)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(d50)}
    tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + _fixed(colorants[:, at]) for at, name in enumerate((b"r", b"g", b"b"))}
    tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(value))
        body += value
    version = struct.pack(">II4s4s4s", start + len(body), 0, b"\x04\x20\0\0", b"mntr", b"RGB ")
    header = version + b"XYZ " + bytes(12) + b"acsp" + bytes(28) + _fixed(d50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _fixed(numbers: np.ndarray | list[float]) -> bytes:
    return b"".join(struct.pack(">i", round(float(number) * 65536)) for number in np.ravel(numbers))
