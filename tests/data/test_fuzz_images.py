"""Randomly damaged images: each is read, or refused with a DataError."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastnst.data.manifest import build_manifest
from fastnst.errors import DataError
from fastnst.images import read_image
from helpers.bad_image_fixtures import encoded
from helpers.lookalike_images import P3_MATRIX, cmyk_profile, gray_profile, rgb_profile


def seeds() -> list[bytes]:
    """Small images of all formats, colour modes and encodings."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    sixteen = Image.fromarray(rng.integers(0, 65536, (20, 24)).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (colours, "JPEG", {"quality": 80, "exif": turned}),
        (colours, "JPEG", {"progressive": True}),
        (colours.convert("CMYK"), "JPEG", {}),
        (colours.convert("L"), "JPEG", {}),
        (colours, "PNG", {"exif": turned}),
        (colours.convert("RGBA"), "PNG", {}),
        (colours.convert("P"), "PNG", {"transparency": 3}),
        (sixteen, "PNG", {}),
        (colours, "WEBP", {}),
        (colours.convert("RGBA"), "WEBP", {"lossless": True}),
        (colours, "WEBP", {"save_all": True, "append_images": [colours.rotate(90)]}),
        (colours, "BMP", {}),
        (colours.convert("P"), "BMP", {}),
        (colours, "TIFF", {"compression": "tiff_lzw"}),
        (colours.convert("1"), "TIFF", {"compression": "group4"}),
        (sixteen, "TIFF", {"compression": "tiff_adobe_deflate", "tiffinfo": {274: 6}}),
        (colours.convert("RGBA"), "TIFF", {"icc_profile": rgb_profile(P3_MATRIX, 2.2)}),
        (colours, "JPEG", {"icc_profile": rgb_profile(P3_MATRIX, 1.8)}),
        (colours.convert("CMYK"), "JPEG", {"icc_profile": cmyk_profile()}),
        (colours.convert("L"), "PNG", {"icc_profile": gray_profile(1.8)}),
        (colours.convert("RGBA"), "AVIF", {}),
        (colours, "JPEG2000", {}),
        (colours.convert("P"), "GIF", {"transparency": 3}),
        (colours, "PPM", {}),
    ]
    return [encoded(image, image_format, **options) for image, image_format, options in kinds]


SEEDS = seeds()
Damage = Callable[[bytes], bytes]


def _flip(place: float, bits: int) -> Damage:
    def flip(data: bytes) -> bytes:
        at = int(place * len(data))
        return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :] if data else data

    return flip


def _splice(place: float, removed: int, extra: bytes) -> Damage:
    """Replace `removed` bytes by `extra`."""

    def splice(data: bytes) -> bytes:
        at = int(place * len(data))
        return data[:at] + extra + data[at + removed :]

    return splice


# Headers are at the beginning.
places = st.floats(0, 0.999) | st.floats(0, 0.15)
numbers = st.sampled_from([b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00"])
damages = st.one_of(
    st.builds(_flip, places, st.integers(1, 255)),
    st.builds(_splice, places, st.just(0) | st.integers(1, 3000), st.binary(max_size=8)),
    st.builds(_splice, places, st.just(4), numbers),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real image with up to four damages."""
    data = draw(st.sampled_from(SEEDS))
    for damage in draw(st.lists(damages, min_size=1, max_size=4)):
        data = damage(data)
    return data


def check(data: bytes, file: Path) -> bool:
    """Whether the image was read; anything but an array or a DataError fails the test."""
    file.write_bytes(data)
    read = False
    for alpha in (False, True):
        refusal = ""
        try:
            image = read_image(file, alpha=alpha, min_side=1)
        except DataError as error:
            refusal = str(error)
        if refusal:
            assert str(file) in refusal
            assert 20 < len(refusal) < 500 + len(str(file))
            assert "\x1b" not in refusal
        else:
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] in ((3, 4) if alpha else (3,))
            assert min(image.shape) >= 1
            read = True
    try:
        manifest = build_manifest(file.parent, workers=1, cache=False, min_side=1)
    except DataError:
        return read
    # An image that passes the check must be readable.
    assert read, manifest.images
    return read


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "image.png"


def test_read_image_seeds(file: Path) -> None:
    assert all(check(data, file) for data in SEEDS)


@given(damaged())
@settings(max_examples=300)
def test_read_image_damaged(file: Path, data: bytes) -> None:
    check(data, file)


@given(st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"II*\0", b"MM\0*"]), st.binary())
@settings(max_examples=100)
@example(b"", b"")
def test_read_image_random_bytes_after_a_signature(file: Path, signature: bytes, rest: bytes) -> None:
    check(signature + rest, file)


@pytest.mark.campaign
@given(damaged())
@settings(max_examples=100_000)
def test_read_image_damaged_campaign(file: Path, data: bytes) -> None:
    """A quarter of an hour: `pytest -m campaign tests/data/test_fuzz_images.py`."""
    check(data, file)
