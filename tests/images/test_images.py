"""Reading, refusing and writing single images."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastnst import images
from fastnst.errors import DataError
from fastnst.images import read_image, to_array, to_tensor, write_image
from fastnst.images.open import MAX_PIXELS
from helpers.bad_image_fixtures import Specimen, specimens

HEIGHT, WIDTH = 20, 30
RAMP_Y, RAMP_X = np.mgrid[0:HEIGHT, 0:WIDTH]
RGB = np.stack([RAMP_X * 8, RAMP_Y * 12, RAMP_X + RAMP_Y], -1).astype(np.uint8)
ALPHA = (RAMP_X * 8).astype(np.uint8)
GRAY = RGB[..., 0]

# By orientation tag: the stored pixels of an image that is upright once the tag is applied.
STORED = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.swapaxes(0, 1),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: seen[::-1, ::-1].swapaxes(0, 1),
    8: lambda seen: np.rot90(seen, -1),
}


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(np.ascontiguousarray(array))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tif"])
def test_read_image_is_exact_for_lossless_formats(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", RGB, **({"lossless": True} if suffix == ".webp" else {}))
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    np.testing.assert_array_equal(image, RGB)


def test_read_image_repeats_gray_in_all_channels(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(tmp_path / "gray.png", GRAY)), np.dstack([GRAY] * 3))
    black_or_white = np.where(GRAY > 99, 255, 0).astype(np.uint8)
    path = save(tmp_path / "bits.png", black_or_white, "1")
    np.testing.assert_array_equal(read_image(path), np.dstack([black_or_white] * 3))


def test_read_image_scales_16_bits(tmp_path: Path) -> None:
    deep = np.full((HEIGHT, WIDTH), 128 * 257, np.uint16)
    deep[0, :3] = 0, 65535, 300  # 300 / 257 = 1.17
    image = read_image(save(tmp_path / "a.png", deep))
    assert image[0, :3, 0].tolist() == [0, 255, 1]
    assert (image[1:] == 128).all()


def test_read_image_palette(tmp_path: Path) -> None:
    palette = Image.fromarray(RGB).quantize(32)
    expected = np.asarray(palette.convert("RGB"))
    palette.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)
    assert read_image(tmp_path / "a.png", alpha=True).shape[2] == 3
    # One opacity per colour: colour 3 is clear, the others are opaque.
    palette.save(tmp_path / "b.png", transparency=bytes([255, 255, 255, 0]))
    visible = np.asarray(palette) != 3
    np.testing.assert_array_equal(read_image(tmp_path / "b.png")[visible], expected[visible])
    with_alpha = read_image(tmp_path / "b.png", alpha=True)
    np.testing.assert_array_equal(with_alpha[..., 3], np.where(visible, 255, 0))
    np.testing.assert_array_equal(with_alpha[..., :3], read_image(tmp_path / "b.png"))


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_read_image_alpha(tmp_path: Path, suffix: str) -> None:
    rgba = np.dstack([RGB, ALPHA])
    path = save(tmp_path / f"a{suffix}", rgba, **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    with_alpha = read_image(path, alpha=True)
    np.testing.assert_array_equal(with_alpha[..., 3], ALPHA)
    np.testing.assert_array_equal(with_alpha[..., :3], read_image(path))
    np.testing.assert_array_equal(with_alpha[..., :3][ALPHA >= 128], RGB[ALPHA >= 128])
    opaque = save(tmp_path / f"b{suffix}", np.dstack([RGB, np.full_like(ALPHA, 255)]), lossless=True)
    np.testing.assert_array_equal(read_image(opaque, alpha=True), RGB)


def test_read_image_alpha_of_gray_and_colour_key(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.dstack([GRAY, GRAY, GRAY, ALPHA]), "LA")
    np.testing.assert_array_equal(read_image(path, alpha=True)[..., 3], ALPHA)
    path = save(tmp_path / "b.png", RGB, transparency=(0, 0, 0))
    np.testing.assert_array_equal(read_image(path, alpha=True)[..., 3], np.where((RGB == 0).all(-1), 0, 255))


def test_read_image_cmyk(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", RGB, "CMYK", quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert np.abs(read_image(path).astype(int) - RGB).mean() < 4


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_read_image_applies_the_orientation_tag(tmp_path: Path, orientation: int, suffix: str) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", STORED[orientation](RGB), exif=tags)
    np.testing.assert_array_equal(read_image(path), RGB)


@pytest.mark.parametrize("tags", [b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12", b"Exif\0\0rubbish", b"Exif\0\0"])
def test_read_image_ignores_damaged_tags(tmp_path: Path, tags: bytes) -> None:
    path = save(tmp_path / "a.jpg", RGB, exif=tags)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).shape == RGB.shape


def test_read_image_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    shallow = Image.fromarray(RGB).quantize(16)
    shallow.save(tmp_path / "a.gif", save_all=True, append_images=[shallow.rotate(180)])
    np.testing.assert_array_equal(read_image(tmp_path / "a.gif"), np.asarray(shallow.convert("RGB")))
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), RGB)


@pytest.fixture(scope="module")
def bad_images() -> dict[str, Specimen]:
    return {specimen.name: specimen for specimen in specimens()}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "letter.jpg",
            "empty.jpg",
            "zeros.jpg",
            "paper.jpg",
            "phone.heic",
            "jpeg2000.jpg",
            "pixel.png",
            "fifteen.png",
        ),
        *("cut_00020.jpg", "cut_08.png", "cut_50_percent.jpg", "cut_end.jpg", "cut_half.webp", "bomb.png", "large.png"),
        *("dangling.jpg", "pipe.jpg"),
    ],
)
def test_read_image_error_names_file_reason_and_remedy(
    bad_images: dict[str, Specimen], tmp_path: Path, name: str
) -> None:
    bad_images[name].make(tmp_path / name)
    with pytest.raises(DataError, match=bad_images[name].verdict) as caught:
        read_image(tmp_path / name, max_pixels=MAX_PIXELS)
    message = str(caught.value)
    assert str(tmp_path / name) in message
    assert "\n" not in message
    assert "; " in message


def test_pillow_pixel_limit_stays_on() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None


def test_read_image_min_side(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RGB[:4, :5])
    assert read_image(path, min_side=4).shape == (4, 5, 3)
    with pytest.raises(DataError, match="5 × 4 px"):
        read_image(path)


def test_read_image_error_escapes_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert "caf\\xe9.jpg" in str(caught.value).encode("utf-8").decode()


@pytest.mark.parametrize(
    ("suffix", "largest_error"), [(".png", 0), (".PNG", 0), (".jpg", 6), (".jpeg", 6), (".webp", 12)]
)
def test_write_image_round_trip(tmp_path: Path, suffix: str, largest_error: int) -> None:
    write_image(tmp_path / f"new/a{suffix}", RGB)
    assert np.abs(read_image(tmp_path / f"new/a{suffix}").astype(int) - RGB).max() <= largest_error


def test_write_image_alpha(tmp_path: Path) -> None:
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:16, :, 3] = 255
    write_image(tmp_path / "a.png", rgba)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", alpha=True), rgba)
    write_image(tmp_path / "a.jpg", rgba)
    on_white = read_image(tmp_path / "a.jpg")
    assert on_white[:12].max() < 10
    assert on_white[20:].min() > 245


def test_write_image_keeps_the_old_file_on_error(tmp_path: Path) -> None:
    write_image(tmp_path / "a.webp", RGB)
    before = (tmp_path / "a.webp").read_bytes()
    with pytest.raises(DataError, match="17000 × 1 px"):
        write_image(tmp_path / "a.webp", np.zeros((1, 17000, 3), np.uint8))
    assert (tmp_path / "a.webp").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.webp"]


def test_write_image_refuses_unknown_suffixes_and_other_arrays(tmp_path: Path) -> None:
    for name in ("a.gif", "a", "a.jpg.txt"):
        with pytest.raises(DataError, match=r"\.jpg, \.jpeg, \.png, \.webp"):
            write_image(tmp_path / name, RGB)
    for array in (RGB.astype(np.float32), GRAY, RGB[..., :2], RGB[:0]):
        with pytest.raises(DataError, match="uint8 array"):
            write_image(tmp_path / "a.png", array)


def test_to_tensor_layout() -> None:
    tensor = to_tensor(RGB)
    assert tensor.shape == (1, 3, HEIGHT, WIDTH)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert tensor[0, 1, 2, 3].item() == pytest.approx(RGB[2, 3, 1] / 255)


def test_to_array_clamps_and_rounds() -> None:
    levels = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 2.0, float("inf")]).expand(3, 1, 7)
    assert to_array(levels)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]
    with pytest.raises(DataError, match="NaN"):
        to_array(torch.full((3, 2, 2), float("nan")))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_to_array_inverts_to_tensor(height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    np.testing.assert_array_equal(to_array(to_tensor(image)), image)
    np.testing.assert_array_equal(to_array(to_tensor(image)[0].double()), image)


def test_import_needs_no_torch() -> None:
    assert "torch" not in vars(images)
