"""Files that look alike on a screen and differ in their bytes: profiles, hidden colours, depths, formats.

Profiles are made from the formulas of ICC.1:2010, TIFFs by hand, so that nothing here depends on the reader.
"""

import struct
from typing import Any

import numpy as np
from PIL import Image

from helpers.bad_image_fixtures import encoded

HEIGHT, WIDTH = 40, 56
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
COLORS = np.stack([60 + X * 2, 170 - Y * 2, 80 + X + Y], -1).astype(np.uint8)
"""A gradient, sRGB, inside the gamut of all the spaces below."""
GRAY = (X * 4 + Y // 2).astype(np.uint8)

SRGB_MATRIX = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
"""RGB to XYZ, adapted to D50, as in every profile of the space."""
P3_MATRIX = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE_MATRIX = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
ADOBE_GAMMA = 563 / 256


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    v = values / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def to_space(colors: np.ndarray, matrix: np.ndarray, gamma: float) -> np.ndarray:
    """Encode sRGB colours, uint8 `[H, W, 3]`, in another space with a power as transfer function; 0: sRGB's."""
    linear = np.clip(srgb_to_linear(colors) @ (np.linalg.inv(matrix) @ SRGB_MATRIX).T, 0, 1)
    if gamma:
        encoded_values = linear ** (1 / gamma)
    else:
        encoded_values = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded_values).astype(np.uint8)


def rgb_profile(matrix: np.ndarray, gamma: float, spare: int = 0) -> bytes:
    """A profile of an RGB space, longer by `spare` bytes."""
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)
    tags = {name: b"XYZ \0\0\0\0" + _s15(*column) for name, column in columns}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _gamma(gamma))
    return _profile(b"RGB ", b"XYZ ", tags | ({b"priv": b"text\0\0\0\0" + bytes(spare)} if spare else {}))


def gray_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _gamma(gamma)})


def cmyk_profile() -> bytes:
    """Ink that darkens: a table of 2⁴ colours in 8-bit CIELab, lightness 255 · (1 - K) · (1 - (C + M + Y) / 3)."""
    inks = np.array(list(np.ndindex(2, 2, 2, 2)))
    lightness = 255 * (1 - inks[:, 3]) * (1 - inks[:, :3].mean(1))
    table = np.stack([lightness, np.full(16, 128), np.full(16, 128)], 1).round().astype(np.uint8)
    ramp = bytes(range(256))
    lut = (
        b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + table.tobytes() + ramp * 3
    )
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut, b"A2B1": lut}, b"prtr")


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    name = b"of a test\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)
    tags = {
        b"desc": description,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + _s15(0.9642, 1, 0.8249),
    } | tags
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        table += struct.pack(">4sII", tag, start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(body), b"test", 0x02100000, kind, space, connection, b"", b"acsp"
    )
    header = header.ljust(68, b"\0") + _s15(0.9642, 1, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _s15(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def tiff(rows: bytes | list[bytes], shape: tuple[int, int], *, order: str = "<", **tags: Any) -> bytes:
    """A TIFF from its raw strips.

    Args:
        rows: the strip, or the strips (one per plane where the samples are stored apart).
        shape: height and width.
        order: `<` or `>`.
        tags: `photometric`, `bits`, `samples` and others of `_TAGS`; numbers or tuples of them.
    """
    strips = [rows] if isinstance(rows, bytes) else rows
    values = {"compression": 1, "bits": 8, "photometric": 1, "samples": 1} | tags
    values |= {"width": shape[1], "height": shape[0], "rows": shape[0], "counts": tuple(map(len, strips))}
    entries = sorted((_TAGS[name], value if isinstance(value, tuple) else (value,)) for name, value in values.items())
    entries.append((273, tuple(0 for _ in strips)))
    entries.sort()
    start = 8 + 2 + 12 * len(entries) + 4
    spare = sum(4 * len(value) for _, value in entries)
    offsets = [start + spare + sum(map(len, strips[:at])) for at in range(len(strips))]
    directory, extra = b"", b""
    for tag, value in entries:
        numbers = tuple(offsets) if tag == 273 else value
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        kind = 4
        if tag in _SHORT:
            kind, packed = 3, struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(packed) > 4:
            directory += struct.pack(f"{order}HHII", tag, kind, len(numbers), start + len(extra))
            extra += packed
        else:
            directory += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    head += struct.pack(f"{order}H", len(entries)) + directory + bytes(4)
    return head + extra.ljust(spare, b"\0") + b"".join(strips)


_TAGS = {
    **{"subfile": 254, "width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262},
    **{"fill_order": 266, "samples": 277, "rows": 278, "counts": 279, "max_sample": 281, "planar": 284},
    **{"color_map": 320, "extra": 338, "format": 339, "smax_sample": 341, "subsampling": 530},
}
_SHORT = {258, 259, 262, 266, 277, 281, 284, 320, 338, 339, 341, 530}


def packed_12_bits(values: np.ndarray) -> bytes:
    """Pack rows of an even number of 12-bit values, the first in the high bits."""
    first, second = values[:, ::2].astype(np.uint16), values[:, 1::2].astype(np.uint16)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()


def hidden_colors() -> dict[str, bytes]:
    """A disc, feathered; what is under full transparency is black, white, magenta, or another format's."""
    distance = np.hypot(Y - HEIGHT / 2, X - WIDTH / 2)
    alpha = (np.clip(18 - distance, 0, 4) / 4 * 255).astype(np.uint8)
    files = {}
    for name, hidden in (("black", (0, 0, 0)), ("white", (255, 255, 255)), ("magenta", (255, 0, 255))):
        rgba = np.dstack([np.where(alpha[..., None] == 0, np.uint8(hidden), COLORS), alpha])
        files[f"{name}.png"] = encoded(Image.fromarray(rgba), "PNG")
        files[f"{name}.webp"] = encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)
        files[f"{name}.tif"] = encoded(Image.fromarray(rgba), "TIFF")
    return files


def profiles() -> dict[str, bytes]:
    """The same colours in three spaces."""
    files = {"srgb.png": encoded(Image.fromarray(COLORS), "PNG")}
    for name, matrix, gamma in (("p3", P3_MATRIX, 2.2), ("adobe", ADOBE_MATRIX, ADOBE_GAMMA)):
        image, profile = Image.fromarray(to_space(COLORS, matrix, gamma)), rgb_profile(matrix, gamma)
        files[f"{name}.png"] = encoded(image, "PNG", icc_profile=profile)
        files[f"{name}.tif"] = encoded(image, "TIFF", icc_profile=profile)
        files[f"{name}.webp"] = encoded(image, "WEBP", icc_profile=profile, lossless=True)
        files[f"{name}.jpg"] = encoded(image, "JPEG", icc_profile=profile, quality=100, subsampling=0)
    return files


def depths() -> dict[str, bytes]:
    """The same grays in 8, 12 and 16 bits, and stored as negative."""
    deep, shallow = GRAY.astype(np.uint16) * 257, np.rint(GRAY / 255 * 4095).astype(np.uint16)
    return {
        "8.png": encoded(Image.fromarray(GRAY), "PNG"),
        "16.png": encoded(Image.fromarray(deep), "PNG"),
        "16_white_is_zero.tif": tiff((65535 - deep).astype("<u2").tobytes(), GRAY.shape, bits=16, photometric=0),
        "12.tif": tiff(packed_12_bits(shallow), GRAY.shape, bits=12),
        "12_in_16.tif": tiff(shallow.astype("<u2").tobytes(), GRAY.shape, bits=16, smax_sample=4095),
    }


def formats() -> dict[str, bytes]:
    """The same colours in every format that is read; JPEG, AVIF and JPEG 2000 nearly so."""
    image = Image.fromarray(COLORS)
    lossless = {name: encoded(image, name) for name in ("PNG", "BMP", "TIFF", "PPM")}
    lossless["JPEG2000"] = encoded(image, "JPEG2000", irreversible=False)
    lossless["AVIF"] = encoded(image, "AVIF", quality=100, subsampling="4:4:4")
    lossless["GIF"] = encoded(_few_colors(), "GIF")
    suffixes = {
        "PNG": "png",
        "BMP": "bmp",
        "TIFF": "tif",
        "PPM": "ppm",
        "JPEG2000": "jp2",
        "AVIF": "avif",
        "GIF": "gif",
    }
    return {f"image.{suffixes[name]}": data for name, data in lossless.items()}


def _few_colors() -> Image.Image:
    """COLORS with a palette of 256, within a few levels."""
    return Image.fromarray(COLORS).quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


LOOKALIKES = {"hidden": (hidden_colors, 0), "profiles": (profiles, 8), "depths": (depths, 0), "formats": (formats, 8)}
"""By kind: a function that makes the files, and how many levels the first may differ from the others."""
