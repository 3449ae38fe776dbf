"""Reading beside the pixels: EXIF tags, resolution, limits on pixels and memory."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import ExifTags, Image

from fastnst.errors import DataError
from fastnst.images import read, read_image, read_with_metadata
from fastnst.images.open import MAX_PIXELS
from helpers.bad_image_fixtures import encoded, png, zeros
from helpers.lookalike_images import COLORS

TAKEN = "2020:01:02 03:04:05"


def photo_tags(orientation: int = 6) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    tags[ExifTags.Base.Make] = "Camera"
    tags[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: TAKEN,
        ExifTags.Base.ColorSpace: 0xFFFF,
        ExifTags.Base.MakerNote: b"offsets into the old file",
        ExifTags.Base.ExifImageWidth: 9999,
    }
    tags[ExifTags.IFD.GPSInfo] = {1: "N", 2: (48.0, 8.0, 9.0)}
    return tags


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_read_with_metadata_keeps_what_holds_for_the_result(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = photo_tags(orientation).tobytes()
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(COLORS), kind, exif=exif, dpi=(300, 200)))
    source = read_with_metadata(tmp_path / "a")
    turned = orientation == 6
    assert source.pixels.shape == (COLORS.swapaxes(0, 1) if turned else COLORS).shape
    np.testing.assert_array_equal(source.pixels, read_image(tmp_path / "a"))
    assert source.exif is not None
    found = Image.Exif()
    found.load(source.exif)
    assert found[ExifTags.Base.Orientation] == 1
    assert found[ExifTags.Base.Make] == "Camera"
    photo = found.get_ifd(ExifTags.IFD.Exif)
    assert photo[ExifTags.Base.DateTimeOriginal] == TAKEN
    assert photo[ExifTags.Base.ColorSpace] == 1
    assert photo[ExifTags.Base.ExifImageWidth] == source.pixels.shape[1]
    assert ExifTags.Base.MakerNote not in photo
    assert found.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"
    assert not found.get_ifd(ExifTags.IFD.IFD1)
    if kind in ("JPEG", "PNG", "TIFF"):
        assert source.dpi is not None
        np.testing.assert_allclose(source.dpi, (200, 300) if turned else (300, 200), atol=0.01)


@pytest.mark.parametrize("tags", [b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12", b"Exif\0\0rubbish", b""])
def test_read_with_metadata_of_damaged_or_no_tags(tmp_path: Path, tags: bytes) -> None:
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(COLORS), "JPEG", exif=tags))
    source = read_with_metadata(tmp_path / "a")
    assert source.exif is None
    assert source.dpi in (None, (72.0, 72.0))  # Pillow's default where tags are damaged


def test_read_image_limits_pixels_of_one_image_and_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 million pixels are read when they are named; the largest limit is an error."""
    file = tmp_path / "a.png"
    file.write_bytes(png(12_000, 8_000, 1, 0, zeros(8_000 * 1_501)))
    monkeypatch.setattr(read, "to_pixels", lambda image, _: np.empty((image.height, image.width, 0)))
    assert read_image(file).shape[:2] == (8_000, 12_000)
    with pytest.raises(DataError, match="12000 × 8000 px is above the limit of 89 million pixels; scale it down"):
        read_image(file, max_pixels=MAX_PIXELS)
    file.write_bytes(png(20_000, 14_000, 1, 0, b""))
    with pytest.raises(DataError, match="20000 × 14000 px is above the limit of 268 million pixels; scale it down"):
        read_image(file)
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_read_image_names_what_fits_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(4_000, 2_000, 1, 0, zeros(2_000 * 501)))
    monkeypatch.setattr(read, "available_host_memory", lambda: 24_000_000)
    with pytest.raises(DataError, match=r"4000 × 2000 px takes 91.6 MiB, and 22.9 MiB are free; .*1900 × 950 px"):
        read_image(file)
    monkeypatch.setattr(read, "available_host_memory", lambda: 100_000_000)
    assert read_image(file).shape == (2_000, 4_000, 3)


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("PIL.Image.open", MemoryError()),
        ("PIL.ImageFile.ImageFile.load", MemoryError()),
        ("PIL.ImageFile.ImageFile.load", OSError("out of memory error when reading image file")),
    ],
)
def test_an_image_that_memory_does_not_suffice_for_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, error: Exception
) -> None:
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(COLORS), "PNG"))
    monkeypatch.setattr(part, mock.Mock(side_effect=error))
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a")
