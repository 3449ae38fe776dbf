"""Depths and layouts of samples: the right values, or the reason why not."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastnst.errors import DataError
from fastnst.images import read_image
from helpers.bad_image_fixtures import chunk, encoded, png
from helpers.lookalike_images import COLORS, GRAY, HEIGHT, WIDTH, packed_12_bits, tiff

DEEP = GRAY.astype(np.uint16) * 257
RGB16 = COLORS.astype(np.uint16) * 257


def packed(values: np.ndarray, depth: int) -> bytes:
    bits = (values[..., None] >> np.arange(depth)[::-1]) & 1
    return np.packbits(bits.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def read(folder: Path, data: bytes) -> np.ndarray:
    (folder / "image").write_bytes(data)
    return read_image(folder / "image")


def scaled(depth: int) -> np.ndarray:
    """GRAY with `depth` bits, in 8."""
    return ((GRAY >> (8 - depth)).astype(int) * 255 // ((1 << depth) - 1)).astype(np.uint8)


def gray(data: bytes, **tags: Any) -> bytes:
    return tiff(data, GRAY.shape, **tags)


def colour(data: bytes | list[bytes], bits: int = 8, samples: int = 3, **tags: Any) -> bytes:
    return tiff(data, GRAY.shape, **{"photometric": 2, "samples": samples, "bits": (bits,) * samples} | tags)


SHALLOW = (1, 2, 4, 8)
RIGHT = {
    **{f"{depth} bits": (gray(packed(GRAY >> (8 - depth), depth), bits=depth), scaled(depth)) for depth in SHALLOW},
    **{
        f"{depth} bits, white is zero": (
            gray(packed((GRAY >> (8 - depth)) ^ ((1 << depth) - 1), depth), bits=depth, photometric=0),
            scaled(depth),
        )
        for depth in SHALLOW
    },
    "12 bits": (gray(packed_12_bits(np.rint(GRAY / 255 * 4095)), bits=12), GRAY),
    "16 bits": (gray(DEEP.astype("<u2").tobytes(), bits=16), GRAY),
    "16 bits, big-endian": (gray(DEEP.astype(">u2").tobytes(), bits=16, order=">"), GRAY),
    "16 bits, white is zero": (gray((65535 - DEEP).astype("<u2").tobytes(), bits=16, photometric=0), GRAY),
    **{
        f"{used} in 16 bits by {tag}": (
            gray(np.rint(GRAY / 255 * ((1 << used) - 1)).astype("<u2").tobytes(), bits=16, **{tag: (1 << used) - 1}),
            GRAY,
        )
        for used in (10, 12, 14)
        for tag in ("max_sample", "smax_sample")
    },
    "12 in 16 bits, white is zero": (
        gray((4095 - np.rint(GRAY / 255 * 4095)).astype("<u2").tobytes(), bits=16, photometric=0, max_sample=4095),
        GRAY,
    ),
    # The brightest pixel is no white.
    "16 bits with a statistic": (
        gray((DEEP // 3).astype("<u2").tobytes(), bits=16, max_sample=21845),
        np.rint(GRAY / 3).astype(np.uint8),
    ),
    "32 bits": (gray((GRAY.astype(np.uint64) * 0x1010101).astype("<u4").tobytes(), bits=32), GRAY),
    "RGB": (colour(COLORS.tobytes()), COLORS),
    "RGB in planes": (colour([COLORS[..., at].tobytes() for at in range(3)], planar=2), COLORS),
    "RGB of 16 bits": (colour(RGB16.astype("<u2").tobytes(), 16), COLORS),
    "RGB of 16 bits, big-endian": (colour(RGB16.astype(">u2").tobytes(), 16, order=">"), COLORS),
    "RGB and something else": (colour(np.dstack([COLORS, GRAY]).tobytes(), samples=4, extra=0), COLORS),
    "gray and something else": (
        gray(np.dstack([GRAY, COLORS[..., 0]]).tobytes(), samples=2, bits=(8, 8), extra=0),
        GRAY,
    ),
    "palette": (gray((GRAY >> 4).tobytes(), photometric=3, color_map=(*range(0, 65536, 257),) * 3), GRAY >> 4),
    "palette of 4 bits": (
        gray(packed(GRAY >> 4, 4), bits=4, photometric=3, color_map=(*range(0, 65536, 4369),) * 3),
        scaled(4),
    ),
    "palette of 8 bits in 16": (gray(GRAY.tobytes(), photometric=3, color_map=(*range(256),) * 3), GRAY),
}


@pytest.mark.parametrize("name", RIGHT)
def test_read_image_tiff_layouts(tmp_path: Path, name: str) -> None:
    data, expected = RIGHT[name]
    expected = np.dstack([expected] * 3) if expected.ndim == 2 else expected
    np.testing.assert_array_equal(read(tmp_path, data), expected)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_read_image_compressed_tiff(tmp_path: Path, compression: str) -> None:
    for array in (DEEP, GRAY, COLORS):
        data = encoded(Image.fromarray(array), "TIFF", compression=compression)
        np.testing.assert_array_equal(read(tmp_path, data), COLORS if array is COLORS else np.dstack([GRAY] * 3))


def test_read_image_compressed_tiff_layouts(tmp_path: Path) -> None:
    deep = gray(zlib.compress((65535 - DEEP).astype("<u2").tobytes()), bits=16, photometric=0, compression=8)
    np.testing.assert_array_equal(read(tmp_path, deep), np.dstack([GRAY] * 3))
    planes = [zlib.compress(COLORS[..., at].tobytes()) for at in range(3)]
    np.testing.assert_array_equal(read(tmp_path, colour(planes, planar=2, compression=8)), COLORS)
    shallow = gray(zlib.compress(packed_12_bits(np.rint(GRAY / 255 * 4095))), bits=12, compression=8)
    np.testing.assert_array_equal(read(tmp_path, shallow), np.dstack([GRAY] * 3))


REJECTED = {
    "signed": (gray(GRAY.tobytes(), format=2), "signed"),
    "signed, 16 bits": (gray(DEEP.astype("<i2").tobytes(), bits=16, format=2), "signed"),
    "signed, 32 bits": (gray(DEEP.astype("<i4").tobytes(), bits=32, format=2), "signed"),
    "float": (gray((GRAY / 255).astype("<f4").tobytes(), bits=32, format=3), "floating-point"),
    "double": (gray((GRAY / 255).astype("<f8").tobytes(), bits=64, format=3), "floating-point samples of 64 bits"),
    "half": (gray((GRAY / 255).astype("<f2").tobytes(), bits=16, format=3), "floating-point samples of 16 bits"),
    "64 bits": (gray(DEEP.astype("<u8").tobytes(), bits=64), "gray, 1 samples of 64 bits"),
    "16 bits, white is zero, big-endian": (
        gray((65535 - DEEP).astype(">u2").tobytes(), bits=16, photometric=0, order=">"),
        "white is zero",
    ),
    "RGB of 32 bits": (colour(COLORS.astype("<u4").tobytes(), 32), "RGB, 3 samples of 32 bits"),
    "RGB of 12 in 16 bits": (colour((RGB16 >> 4).astype("<u2").tobytes(), 16, max_sample=(4095,) * 3), "12 of 16 bits"),
    "RGB of 16 bits in planes": (
        colour([RGB16[..., at].astype("<u2").tobytes() for at in range(3)], 16, planar=2),
        "separate planes",
    ),
    "YCbCr, subsampled": (colour(COLORS.tobytes()[: HEIGHT * WIDTH * 3 // 2], photometric=6), "subsampled"),
    "ICCLab": (colour(COLORS.tobytes(), photometric=9), "ICCLab"),
    "sensor": (gray(GRAY.tobytes(), photometric=32803), "a sensor's raw data"),
    "thumbnail": (colour(COLORS.tobytes(), subfile=1), "thumbnail"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_read_image_rejects_tiff_layouts_by_name(tmp_path: Path, name: str) -> None:
    data, reason = REJECTED[name]
    with pytest.raises(DataError, match=f"{reason}.*; (save|export)"):
        read(tmp_path, data)


def test_read_image_ycbcr_tiff(tmp_path: Path) -> None:
    image = Image.fromarray(COLORS).convert("YCbCr")
    for compression in ("raw", "tiff_lzw"):
        found = read(tmp_path, encoded(image, "TIFF", compression=compression))
        assert np.abs(found.astype(int) - COLORS).max() <= 3


def test_read_image_cmyk_tiff_of_16_bits(tmp_path: Path) -> None:
    inks = np.dstack([255 - COLORS, np.zeros_like(GRAY)])
    for bits in (8, 16):
        data = inks.tobytes() if bits == 8 else (inks.astype("<u2") * 257).tobytes()
        np.testing.assert_array_equal(read(tmp_path, colour(data, bits, 4, photometric=5)), COLORS)


def test_read_image_png_depths(tmp_path: Path) -> None:
    for depth in (1, 2, 4, 8, 16):
        rows = packed(GRAY >> (8 - depth), depth) if depth <= 8 else DEEP.astype(">u2").tobytes()
        lines = np.frombuffer(rows, np.uint8).reshape(HEIGHT, -1)
        compressed = zlib.compress(np.pad(lines, ((0, 0), (1, 0))).tobytes())
        # sBIT says how many bits are significant, and does not change what the samples mean.
        for extra in ((), (chunk(b"sBIT", bytes([max(1, depth - 1)])),)):
            found = read(tmp_path, png(WIDTH, HEIGHT, depth, 0, compressed, *extra))
            np.testing.assert_array_equal(found[..., 0], scaled(min(depth, 8)))


def test_read_image_pnm_depths(tmp_path: Path) -> None:
    for white in (255, 1023, 65535):
        values = np.rint(GRAY / 255 * white).astype(np.uint8 if white == 255 else ">u2")
        found = read(tmp_path, f"P5 {WIDTH} {HEIGHT} {white}\n".encode() + values.tobytes())
        np.testing.assert_array_equal(found[..., 0], GRAY)
    big = b"P5 3000 2000 1023\n" + bytes(3000 * 2000 * 2)
    with pytest.raises(DataError, match=r"3000 × 2000 px is above 4 million pixels.*; convert it to PNG"):
        read(tmp_path, big)
    with pytest.raises(DataError, match="floating-point"):
        read(tmp_path, f"Pf {WIDTH} {HEIGHT} -1.0\n".encode() + np.zeros(GRAY.shape, "<f4").tobytes())
