"""write_image: which files it replaces, what the file says besides its pixels, and what its format cannot hold."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from fastnst.errors import DataError
from fastnst.images import (
    SOFTWARE,
    check_replaceable,
    is_own_image,
    read_header,
    read_image,
    read_with_metadata,
    write_image,
)
from fastnst.storage import ForeignFileError, StorageError

RAMP = np.add.outer(np.arange(24), 2 * np.arange(40))[..., None].repeat(3, -1).astype(np.uint8)
SUFFIXES = [".jpg", ".png", ".webp"]


def photo(path: Path, **options: object) -> Path:
    Image.fromarray(255 - RAMP).save(path, **options)
    return path


# Whose file is replaced.


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_write_image_replaces_only_its_own(tmp_path: Path, suffix: str) -> None:
    path = photo(tmp_path / f"a{suffix}")
    before = path.read_bytes()
    with pytest.raises(ForeignFileError, match=rf"a\{suffix} exists, and fastnst did not write it; .* --overwrite"):
        write_image(path, RAMP)
    assert path.read_bytes() == before
    write_image(path, RAMP, overwrite=True)
    assert is_own_image(path)
    write_image(path, 2 * RAMP)
    assert path.read_bytes() != before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def foreign_link(path: Path) -> None:
    write_image(path.with_name("own.png"), RAMP)
    path.symlink_to("own.png")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("fastnst 0.1.0"),
    "other software": lambda path: photo(path, exif=tags({ExifTags.Base.Software: "fastnstudio"})),
    "no text": lambda path: photo(path, exif=tags({ExifTags.Base.Software: 7})),
    "damaged tags": lambda path: photo(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
    "pipe": lambda path: os.mkfifo(path),
    "link": foreign_link,
    "dangling link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_is_own_image_takes_only_the_mark(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    FOREIGN[kind](path)
    assert not is_own_image(path)
    with pytest.raises(ForeignFileError):
        check_replaceable(path)
    check_replaceable(path, overwrite=True)


def test_check_replaceable_names_a_folder(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new.png")
    (tmp_path / "a.png").mkdir()
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="a folder has that name"):
            check_replaceable(tmp_path / "a.png", overwrite=overwrite)


def test_write_image_overwrite_replaces_the_link_itself(tmp_path: Path) -> None:
    target = photo(tmp_path / "target.png")
    before = target.read_bytes()
    (tmp_path / "link.png").symlink_to(target)
    write_image(tmp_path / "link.png", RAMP, overwrite=True)
    assert target.read_bytes() == before
    assert not (tmp_path / "link.png").is_symlink()


@pytest.mark.parametrize("hard_links", [True, False])
def test_write_image_keeps_a_file_that_appears_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    path, save = tmp_path / "a.png", Image.Image.save

    def saved_meanwhile(image: Image.Image, *arguments: object, **options: object) -> None:
        save(image, *arguments, **options)
        path.write_text("precious")

    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not hard_links:
        monkeypatch.setattr(os, "link", link)
        write_image(path, RAMP)  # works, and without a race it is replaced
        write_image(path, RAMP)
        path.unlink()
    monkeypatch.setattr(Image.Image, "save", saved_meanwhile)
    with pytest.raises(ForeignFileError):
        write_image(path, RAMP)
    assert path.read_text() == "precious"
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_write_image_replaces_a_result_that_appears_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands write to one name at once."""
    path, link = tmp_path / "a.png", os.link
    write_image(tmp_path / "other.png", RAMP)

    def linked_late(*arguments: object, **options: object) -> None:
        (tmp_path / "other.png").replace(path)
        link(*arguments, **options)

    monkeypatch.setattr(os, "link", linked_late)
    write_image(path, 255 - RAMP)
    np.testing.assert_array_equal(read_image(path), 255 - RAMP)


# What the file says.


def tags(values: dict[int, object], **directories: dict[int, object]) -> bytes:
    exif = Image.Exif()
    for tag, value in values.items():
        exif[tag] = value
    for name, directory in directories.items():
        exif[ExifTags.IFD[name]] = directory
    return exif.tobytes()


PHOTO_TAGS = tags(
    {
        ExifTags.Base.Make: "Maker",
        ExifTags.Base.Model: "Camera 1",
        ExifTags.Base.Copyright: "© somebody",
        ExifTags.Base.DateTime: "2024:05:06 07:08:09",
        ExifTags.Base.Software: "Firmware 1.0",
        ExifTags.Base.Orientation: 6,
        ExifTags.Base.XResolution: 240.0,
        ExifTags.Base.YResolution: 240.0,
        ExifTags.Base.ResolutionUnit: 2,
    },
    Exif={
        ExifTags.Base.DateTimeOriginal: "2023:01:02 03:04:05",
        ExifTags.Base.FNumber: 2.8,
        ExifTags.Base.ColorSpace: 65535,
        ExifTags.Base.ExifImageWidth: 4000,
        ExifTags.Base.ExifImageHeight: 3000,
        ExifTags.Base.MakerNote: b"at offset 1234",
    },
    GPSInfo={ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (52.0, 31.0, 12.5)},
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("channels", [3, 4])
def test_write_image_keeps_tags_and_resolution(tmp_path: Path, suffix: str, channels: int) -> None:
    array = np.full((24, 40, channels), 200, np.uint8)
    write_image(tmp_path / f"a{suffix}", array, exif=PHOTO_TAGS, dpi=(300, 150))
    with Image.open(tmp_path / f"a{suffix}") as image:
        exif = image.getexif()
        photo_tags, places = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
        assert exif.get_ifd(ExifTags.IFD.IFD1) == {}
        if suffix != ".webp":
            assert image.info["dpi"] == pytest.approx((300, 150), abs=0.1)
    assert exif[ExifTags.Base.Make] == "Maker"
    assert exif[ExifTags.Base.Copyright].endswith("somebody")
    assert exif[ExifTags.Base.DateTime] == "2024:05:06 07:08:09"
    assert exif[ExifTags.Base.Software] == SOFTWARE
    assert exif[ExifTags.Base.Orientation] == 1
    assert (exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution]) == (300, 150)
    assert photo_tags[ExifTags.Base.DateTimeOriginal] == "2023:01:02 03:04:05"
    assert float(photo_tags[ExifTags.Base.FNumber]) == pytest.approx(2.8)
    assert photo_tags[ExifTags.Base.ColorSpace] == 1
    assert (photo_tags[ExifTags.Base.ExifImageWidth], photo_tags[ExifTags.Base.ExifImageHeight]) == (40, 24)
    assert ExifTags.Base.MakerNote not in photo_tags
    assert [float(value) for value in places[ExifTags.GPS.GPSLatitude]] == [52, 31, 12.5]
    source = read_with_metadata(tmp_path / f"a{suffix}")
    assert source.dpi == pytest.approx((300, 150), abs=0.1)
    write_image(tmp_path / "again.png", source.pixels, exif=source.exif, dpi=source.dpi)
    assert read_header(tmp_path / "again.png") == (40, 24, SOFTWARE)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_write_image_keeps_the_bytes_of_texts(tmp_path: Path, suffix: str) -> None:
    """Programs write UTF-8 into tags that are ASCII by the standard."""
    named = {ExifTags.Base.Copyright: "!! Zoe", ExifTags.Base.Artist: "Zoe"}
    exif = tags(named, Exif={ExifTags.Base.CameraOwnerName: "!!"}, GPSInfo={ExifTags.GPS.GPSDateStamp: "!!"})
    source = read_with_metadata(photo(tmp_path / "source.jpg", exif=exif.replace(b"!!", "©".encode())))
    write_image(tmp_path / f"a{suffix}", source.pixels, exif=source.exif)
    with Image.open(tmp_path / f"a{suffix}") as image:
        kept = image.getexif()
        found = [
            kept[ExifTags.Base.Copyright],
            kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.CameraOwnerName],
            kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSDateStamp],
        ]
    assert [text.encode("latin-1").decode() for text in found] == ["© Zoe", "©", "©"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_write_image_says_that_it_is_srgb(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}{suffix}", RAMP)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert len(image.info["icc_profile"]) < 1000
        profile = ImageCms.ImageCmsProfile(ImageCms.core.profile_frombytes(image.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(profile)
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    converted = ImageCms.profileToProfile(colours, profile, ImageCms.createProfile("sRGB"))
    assert converted is not None
    assert np.abs(np.asarray(converted).astype(int) - np.asarray(colours)).max() <= 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"Exif\0\0rubbish that is no directory", "damaged"),
        (tags({}, Exif={ExifTags.Base.UserComment: bytes(65450)}), "above the limit"),
    ],
)
def test_write_image_says_that_tags_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: bytes, reason: str
) -> None:
    write_image(tmp_path / "a.jpg", RAMP, exif=source)
    assert "a.jpg: written without the EXIF tags of its source; " in caplog.text
    assert reason in caplog.text
    assert is_own_image(tmp_path / "a.jpg")


# What the format cannot hold.


@pytest.mark.parametrize(("suffix", "limit"), [(".jpg", 65500), (".jpeg", 65500), (".webp", 16383)])
def test_write_image_names_the_limit_of_its_format(tmp_path: Path, suffix: str, limit: int) -> None:
    write_image(tmp_path / f"longest{suffix}", np.zeros((1, limit, 3), np.uint8))
    message = rf"has at most {limit:,} px, and the image is 1 × {limit + 1} px; choose a name that ends in \.png"
    with pytest.raises(DataError, match=message):
        write_image(tmp_path / f"longer{suffix}", np.zeros((limit + 1, 1, 3), np.uint8))
    write_image(tmp_path / "longer.png", np.zeros((limit + 1, 1, 3), np.uint8))
