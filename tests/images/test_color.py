"""Colour profiles and what stands in for them: converted to sRGB, or ignored by name."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastnst.data.manifest import build_manifest
from fastnst.errors import DataError
from fastnst.images import read_image
from helpers import lookalike_images as alike
from helpers.bad_image_fixtures import chunk, encoded, png
from helpers.lookalike_images import COLORS, GRAY

P3 = alike.rgb_profile(alike.P3_MATRIX, 2.2)
IN_P3 = alike.to_space(COLORS, alike.P3_MATRIX, 2.2)
IN_ADOBE = alike.to_space(COLORS, alike.ADOBE_MATRIX, alike.ADOBE_GAMMA)
SRGB = alike.rgb_profile(alike.SRGB_MATRIX, 2.2)


def read(folder: Path, data: bytes, **options: Any) -> np.ndarray:
    file = folder / "image"
    file.write_bytes(data)
    return read_image(file, **options)


def save(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(pixels)
    return encoded(image.convert(mode) if mode else image, kind, **options)


def assert_near(found: np.ndarray, expected: np.ndarray, levels: int = 3) -> None:
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= levels
    assert difference.mean() <= levels / 3


def png_with(pixels: np.ndarray, *chunks: bytes) -> bytes:
    data = encoded(Image.fromarray(pixels), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_read_image_converts_through_the_profile(tmp_path: Path, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"}
    options = {} if kind in ("PNG", "TIFF") else options
    assert np.abs(IN_P3.astype(int) - COLORS).max() > 15
    assert_near(read(tmp_path, save(IN_P3, kind, icc_profile=P3, **options)), COLORS, 6 if options else 3)


def test_read_image_converts_transparent_deep_and_gray_images(tmp_path: Path) -> None:
    alpha = np.where(GRAY > 99, 255, 128).astype(np.uint8)
    found = read(tmp_path, save(np.dstack([IN_P3, alpha]), icc_profile=P3), alpha=True)
    np.testing.assert_array_equal(found[..., 3], alpha)
    assert_near(found[..., :3][alpha == 255], COLORS[alpha == 255])
    light = 255 * (GRAY / 255) ** 1.0
    linear = alike.srgb_to_linear(light)
    gray = np.rint(255 * linear ** (1 / 1.8)).astype(np.uint8)
    profile = alike.gray_profile(1.8)
    assert_near(read(tmp_path, save(gray, icc_profile=profile)), np.dstack([GRAY] * 3))
    assert_near(read(tmp_path, save(gray.astype(np.uint16) * 257, icc_profile=profile)), np.dstack([GRAY] * 3))
    with_alpha = np.dstack([gray, gray, gray, alpha])
    assert_near(
        read(tmp_path, save(with_alpha, "PNG", "LA", icc_profile=profile))[alpha == 255][:, 0], GRAY[alpha == 255]
    )
    deep = b"".join(b"\0" + row.tobytes() for row in np.dstack([gray, alpha]).astype(">u2") * np.uint16(257))
    named = chunk(b"iCCP", b"gray\0\0" + zlib.compress(profile))
    found = read(tmp_path, png(*GRAY.shape[::-1], 16, 4, zlib.compress(deep), named))
    assert_near(found[alpha == 255][:, 0], GRAY[alpha == 255])
    # A tool made a photo gray and kept its profile.
    assert_near(read(tmp_path, save(gray, icc_profile=alike.rgb_profile(alike.P3_MATRIX, 1.8))), np.dstack([GRAY] * 3))
    palette = Image.fromarray(IN_P3).quantize(64)
    expected = read(tmp_path, encoded(palette.convert("RGB"), "PNG", icc_profile=P3))
    np.testing.assert_array_equal(read(tmp_path, encoded(palette, "PNG", icc_profile=P3)), expected)


def test_read_image_converts_cmyk_through_its_profile(tmp_path: Path) -> None:
    inks = np.zeros((*GRAY.shape, 4), np.uint8)
    inks[..., 3] = 255 - GRAY
    image = Image.frombytes("CMYK", (GRAY.shape[1], GRAY.shape[0]), inks.tobytes())
    found = read(tmp_path, encoded(image, "TIFF", icc_profile=alike.cmyk_profile()))
    # The profile's lightness is linear in black; middle gray of CIELab is 119 in sRGB.
    assert np.abs(np.diff(found.astype(int), axis=2)).max() <= 2
    assert abs(int(found[np.abs(GRAY.astype(int) - 128) < 2].mean()) - 119) <= 2
    assert np.abs(found[..., 0].astype(int) - GRAY).max() > 8, "as without a profile"


def test_read_image_cielab(tmp_path: Path) -> None:
    lab = np.stack([GRAY, np.full_like(GRAY, 0), np.full_like(GRAY, 0)], -1)
    found = read(tmp_path, alike.tiff(lab.tobytes(), GRAY.shape, photometric=8, samples=3, bits=(8, 8, 8)))
    assert np.abs(np.diff(found.astype(int), axis=2)).max() <= 2
    assert abs(int(found[np.abs(GRAY.astype(int) - 128) < 2].mean()) - 119) <= 2


def test_read_image_leaves_srgb_exact(tmp_path: Path) -> None:
    made = read(tmp_path, save(COLORS))
    np.testing.assert_array_equal(made, COLORS)

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(read(tmp_path, save(COLORS, icc_profile=profile)), COLORS)
    (tmp_path / "image.jpg").write_bytes(save(COLORS, "JPEG", icc_profile=profile))
    (tmp_path / "p3.jpg").write_bytes(save(COLORS, "JPEG", icc_profile=P3))
    safe = {entry.path: entry.dali_safe for entry in build_manifest(tmp_path, cache=False).images}
    assert safe == {"image.jpg": True, "p3.jpg": False}


def test_read_image_takes_a_profile_in_several_segments(tmp_path: Path) -> None:
    long = alike.rgb_profile(alike.P3_MATRIX, 2.2, spare=150_000)
    data = save(IN_P3, "JPEG", icc_profile=long, quality=100, subsampling=0)
    assert data.count(b"ICC_PROFILE\0") == 3
    assert_near(read(tmp_path, data), COLORS, 6)


DAMAGED = {
    "cut": P3[:200],
    "rubbish": b"rubbish" * 99,
    "CMYK": alike.cmyk_profile(),
    "GRAY": alike.gray_profile(2.2),
    "above 4 MiB": P3 + bytes(5 << 20),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_read_image_names_and_ignores_a_damaged_profile(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = save(COLORS, "TIFF", icc_profile=DAMAGED[name])
    np.testing.assert_array_equal(read(tmp_path, data), COLORS)
    (record,) = caplog.records
    assert str(tmp_path / "image") in record.getMessage()
    assert "profile" in record.getMessage()
    assert name in record.getMessage() or "damaged" in record.getMessage()
    # In a folder they are named in one line, from the cache of results, too.
    for number in range(3):
        (tmp_path / f"{number}.tif").write_bytes(data)
    for _ in range(2):
        caplog.clear()
        assert len(build_manifest(tmp_path).images) == 3
        (record,) = caplog.records
        assert "3 images" in record.getMessage()
        assert "0.tif" in record.getMessage()


def test_read_image_names_a_profile_that_lacks_a_segment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = save(COLORS, "JPEG", icc_profile=P3)
    at = data.index(b"ICC_PROFILE\0") + 12
    read(tmp_path, data[:at] + b"\1\2" + data[at + 2 :])
    assert "lacks a part" in caplog.text


def test_read_image_adobe_rgb_of_a_camera(tmp_path: Path) -> None:
    """No profile, but the interoperability index R03, or the colour space 2."""
    profile = alike.rgb_profile(alike.ADOBE_MATRIX, alike.ADOBE_GAMMA)
    with_profile = read(tmp_path, save(IN_ADOBE, "JPEG", icc_profile=profile, quality=100, subsampling=0))
    assert np.abs(with_profile.astype(int) - IN_ADOBE).max() > 30
    for photo in ({0xA001: 0xFFFF, 0xA005: {1: "R03"}}, {0xA001: 2}):
        tags = Image.Exif()
        tags[0x8769] = photo
        data = save(IN_ADOBE, "JPEG", exif=tags.tobytes(), quality=100, subsampling=0)
        assert_near(read(tmp_path, data), with_profile, 1)
    (tmp_path / "image.jpg").write_bytes(data)
    assert not build_manifest(tmp_path, cache=False).images[0].dali_safe


def test_read_image_png_gamma_and_chromaticities(tmp_path: Path) -> None:
    def chromaticities(*xy: float) -> bytes:
        return chunk(b"cHRM", struct.pack(">8I", *[round(value * 100_000) for value in xy]))

    linear = np.rint(255 * alike.srgb_to_linear(COLORS)).astype(np.uint8)
    assert_near(read(tmp_path, png_with(linear, chunk(b"gAMA", struct.pack(">I", 100_000)))), COLORS, 4)
    usual = chunk(b"gAMA", struct.pack(">I", 45_455))
    np.testing.assert_array_equal(read(tmp_path, png_with(COLORS, usual)), COLORS)
    srgb = chromaticities(0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
    np.testing.assert_array_equal(read(tmp_path, png_with(COLORS, usual, srgb)), COLORS)
    gamma = chunk(b"gAMA", struct.pack(">I", round(100_000 / alike.ADOBE_GAMMA)))
    adobe = chromaticities(0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
    # Programs mean sRGB's curve where they write 1 / 2.2.
    assert_near(read(tmp_path, png_with(IN_ADOBE, gamma, adobe)), COLORS, 5)
    np.testing.assert_array_equal(read(tmp_path, png_with(COLORS, chromaticities(*[0] * 8))), COLORS)


def test_read_image_code_points(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PNG's cICP and AVIF's nclx: Display P3 is converted, HDR rejected."""
    p3 = alike.to_space(COLORS, alike.P3_MATRIX, 0)
    assert_near(read(tmp_path, png_with(p3, chunk(b"cICP", bytes([12, 13, 0, 1])))), COLORS)
    np.testing.assert_array_equal(read(tmp_path, png_with(COLORS, chunk(b"cICP", bytes([1, 13, 0, 1])))), COLORS)
    avif = save(p3, "AVIF", quality=100, subsampling="4:4:4")
    at = avif.index(b"nclx") + 4
    assert_near(read(tmp_path, avif[:at] + struct.pack(">HH", 12, 13) + avif[at + 4 :]), COLORS, 6)
    for curve, name in ((16, "PQ"), (18, "HLG")):
        for data in (
            png_with(COLORS, chunk(b"cICP", bytes([9, curve, 0, 1]))),
            avif[:at] + struct.pack(">HH", 9, curve) + avif[at + 4 :],
        ):
            with pytest.raises(DataError, match=rf"HDR image \({name}.*; export it as SDR"):
                read(tmp_path, data)
    assert not caplog.records


def test_read_image_jpeg2000_profile(tmp_path: Path) -> None:
    data = save(IN_P3, "JPEG2000", irreversible=False)
    at = data.index(b"colr") - 4
    size = struct.unpack(">I", data[at : at + 4])[0]
    box = struct.pack(">I", 8 + 3 + len(P3)) + b"colr\2\0\0" + P3
    header = data.index(b"jp2h") - 4
    length = struct.unpack(">I", data[header : header + 4])[0] + len(box) - size
    data = data[:header] + struct.pack(">I", length) + data[header + 4 : at] + box + data[at + size :]
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(image), IN_P3)
    assert_near(read(tmp_path, data), COLORS)
