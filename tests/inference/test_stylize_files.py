"""stylize_files and `fastnst stylize`: what is replaced, names of results, what is left out, what is kept of a file."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from fastnst.errors import DataError, UserError
from fastnst.images import SOFTWARE, read_image, read_with_metadata
from fastnst.inference import files, stylize_files
from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.storage import ForeignFileError, StorageError

Fastnst = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a style model of random weights."""
    run = tmp_path_factory.mktemp("run")
    net = TransformNet("johnson", generator=torch.Generator().manual_seed(0))
    save_style_model(run / "model.safetensors", net, metadata={})
    return run


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that must not be loaded."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(files, "load_style_model", load)
    return Path("no model")


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (20, 24), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(array).save(path, **options)
    return path


def run(model: Path, *images: Path, out: Path | str, **options: object) -> list[Path]:
    return stylize_files(model, images, out, device="cpu", **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Files of somebody else.


def test_stylize_keeps_foreign_files_and_says_so_first(unloaded: Path, tmp_path: Path) -> None:
    sources = [photo(tmp_path / "card" / f"IMG_000{index}.jpg", index) for index in range(4)]
    album = tmp_path / "album"
    others = [photo(album / f"IMG_000{index}.jpg", 10 + index) for index in (0, 2, 3)]
    before = [path.read_bytes() for path in others]
    with pytest.raises(ForeignFileError, match=r"IMG_0000\.jpg exists, and fastnst did not write it; .*--overwrite"):
        run(unloaded, sources[0], out=album)
    with pytest.raises(ForeignFileError, match=r"IMG_0000\.jpg and 2 more files exist, and fastnst did not write them"):
        run(unloaded, *sources, out=album)
    with pytest.raises(ForeignFileError):
        run(unloaded, sources[0], out=others[1])
    assert [path.read_bytes() for path in others] == before
    assert len(names(album)) == 3


def test_stylize_replaces_its_own_results(model: Path, tmp_path: Path) -> None:
    first, second = photo(tmp_path / "a" / "x.png"), photo(tmp_path / "b" / "x.png", 1)
    (result,) = run(model, first, out=tmp_path / "out/")
    before = result.read_bytes()
    assert run(model, second, out=tmp_path / "out/") == [result]
    assert result.read_bytes() != before
    foreign = photo(tmp_path / "foreign.png", 2)
    assert run(model, first, out=foreign, overwrite=True) == [foreign]
    assert foreign.read_bytes() == before
    with pytest.raises(UserError, match="would replace the input"):
        run(model, first, out=first, overwrite=True)


def test_stylize_command_says_the_rule_and_takes_overwrite(model: Path, tmp_path: Path, fastnst: Fastnst) -> None:
    _, text, _ = fastnst("stylize", "--help")
    assert "other files are kept unless --overwrite is given" in " ".join(text.split())
    source, other = photo(tmp_path / "meta.jpg"), photo(tmp_path / "album" / "meta.jpg", 1)
    before = other.read_bytes()
    code, text, err = fastnst("stylize", model, source, "--out", other.parent)
    assert (code, text) == (2, "")
    assert err == (
        f"fastnst: {other} exists, and fastnst did not write it; choose another --out, or give --overwrite to "
        "replace it\n"
    )
    assert other.read_bytes() == before
    assert fastnst("stylize", model, source, "--out", other.parent, "--overwrite")[:2] == (0, f"{other}\n")
    assert other.read_bytes() != before
    assert fastnst("stylize", model, source, "--out", other.parent)[0] == 0


def test_stylize_goes_on_when_a_foreign_file_appears_meanwhile(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sources, out = [photo(tmp_path / name) for name in ("a.png", "b.png")], tmp_path / "out"

    def read_while_another_writes(path: Path, **options: object) -> object:
        if path.name == "a.png":
            out.mkdir()
            (out / "a.png").write_text("precious")
        return read_with_metadata(path, **options)

    monkeypatch.setattr(files, "read_with_metadata", read_while_another_writes)
    with pytest.raises(DataError, match="1 of 2 images could not be stylized"):
        run(model, *sources, out=out)
    assert "a.png exists, and fastnst did not write it" in caplog.text
    assert (out / "a.png").read_text() == "precious"
    assert names(out) == ["a.png", "b.png"]


def test_stylize_checks_the_output_folder_first(
    unloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = photo(tmp_path / "a.png")
    (tmp_path / "file").write_text("x")
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    with pytest.raises(StorageError, match="a part of the path is a file"):
        run(unloaded, source, out=tmp_path / "file" / "b.png")
    with pytest.raises(StorageError, match="a folder has that name"):
        run(unloaded, source, out=tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path)
    with pytest.raises(StorageError, match="choose a folder you may write to"):
        run(unloaded, source, out=tmp_path / "b.png")
    assert names(tmp_path) == ["a.png", "file", "out"]


# A slash at the end.


@pytest.mark.parametrize("end", ["/", "//", "/."])
@pytest.mark.parametrize("exists", [False, True])
def test_stylize_takes_a_slash_for_a_folder(
    model: Path, tmp_path: Path, fastnst: Fastnst, end: str, exists: bool
) -> None:
    source = photo(tmp_path / "a.png")
    for name in ("results.2024", "looks.like.png"):
        if exists:
            (tmp_path / name).mkdir()
        code, text, err = fastnst("stylize", model, source, "--out", f"{tmp_path / name}{end}")
        assert (code, text) == (0, f"{tmp_path / name / 'a.png'}\n"), err
        assert run(model, source, out=f"{tmp_path / name}{end}") == [tmp_path / name / "a.png"]


def test_stylize_refuses_a_slash_behind_a_file(unloaded: Path, tmp_path: Path) -> None:
    source, file = photo(tmp_path / "a.png"), tmp_path / "b.png"
    file.write_text("x")
    with pytest.raises(UserError, match=r"b\.png is a file, and a folder is needed"):
        run(unloaded, source, out=f"{file}/")
    with pytest.raises(DataError, match=r"\.2024 is not a supported format; .*, or in / for a folder"):
        run(unloaded, source, out=tmp_path / "results.2024")


def test_stylize_writes_a_folder_of_one_image_into_a_folder(unloaded: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    photo(tmp_path / "few" / "a.png")
    with pytest.raises(UserError, match=r"b\.png names one image, and a folder was given; name a folder"):
        run(unloaded, tmp_path / "few", out=tmp_path / "b.png")


# What a format cannot hold.


def test_stylize_checks_the_limits_of_the_format_first(unloaded: Path, tmp_path: Path) -> None:
    panorama = photo(tmp_path / "panorama.png", size=(16, 70000))
    for suffix in (".jpg", ".webp"):
        with pytest.raises(DataError, match=r"the image is 70000 × 16 px; choose a name that ends in \.png"):
            run(unloaded, panorama, out=tmp_path / f"out{suffix}")
    assert names(tmp_path) == ["panorama.png"]


def test_stylize_names_a_panorama_of_a_folder_and_goes_on(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo(tmp_path / "in" / "a.webp")
    photo(tmp_path / "in" / "panorama.webp", size=(16, 17000), format="PNG")
    with pytest.raises(DataError, match="1 of 2 images could not be stylized, see above; the others are in"):
        run(model, tmp_path / "in", out=tmp_path / "out")
    assert "a side of a WEBP has at most 16,383 px, and the image is 17000 × 16 px" in caplog.text
    assert names(tmp_path / "out") == ["a.webp"]


# Names.


def test_stylize_names_a_name_too_long_and_goes_on(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (f"{'a' * 251}.png", f"{'a' * 251}.bmp", "b.png"):
        photo(tmp_path / "in" / name)
    with pytest.raises(DataError, match="1 of 3 images could not be stylized, see above; the others are in"):
        run(model, tmp_path / "in", out=tmp_path / "out")
    assert "a.bmp.png is too long for a file's name; rename the image" in caplog.text
    assert names(tmp_path / "out") == [f"{'a' * 251}.png", "b.png"]


def test_stylize_names_results_of_one_name_apart(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "in"
    sources = {name: photo(folder / name, seed) for seed, name in enumerate(("a.bmp", "a.png", "a.tif", "b.bmp"))}
    wanted = {"a.bmp": "a.bmp.png", "a.png": "a.png", "a.tif": "a.tif.png", "b.bmp": "b.png"}
    for images in ([folder], [*sources.values(), folder]):
        results = run(model, *images, out=tmp_path / "out")
        assert [path.name for path in results] == [wanted[name] for name in sorted(sources)]
    (plain,) = run(model, sources["a.tif"], out=tmp_path / "plain.png")
    assert plain.read_bytes() == (tmp_path / "out" / "a.tif.png").read_bytes()
    assert f"{sources['a.bmp']}: its result is named a.bmp.png, apart from that of {sources['a.png']}" in caplog.text


def test_stylize_tells_names_apart_that_some_file_systems_cannot(model: Path, tmp_path: Path) -> None:
    given = ["A.png", "a.PNG", "a.png", "cafe\u0301.png", "caf\u00e9.png"]
    sources = [photo(tmp_path / str(index) / name, index) for index, name in enumerate(given)]
    sources += [photo(tmp_path / "x" / "a-2.png")]
    results = [path.name for path in run(model, *sources, out=tmp_path / "out")]
    assert results == ["A.png", "a-2.PNG", "a-3.png", "cafe\u0301.png", "caf\u00e9-2.png", "a-2-2.png"]
    assert names(tmp_path / "out") == sorted(results)


# Folders of mixed files.

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_stylize_names_what_it_cannot_read_and_counts_the_rest(model: Path, tmp_path: Path, fastnst: Fastnst) -> None:
    folder = tmp_path / "in"
    photo(folder / "a.jpg")
    (folder / "IMG_1.HEIC").write_bytes(HEIC)
    (folder / "scan.psd").write_bytes(b"8BPS" + bytes(100))
    (folder / "gone.jpg").symlink_to("nowhere")
    for name in ("notes.txt", "clip.mp4", "model.safetensors", "README", ".DS_Store"):
        (folder / name).write_text("no image")
    (folder / "below").mkdir()
    code, text, err = fastnst("stylize", model, folder, "--out", tmp_path / "out", "--device", "cpu")
    assert (code, text) == (3, f"{tmp_path / 'out' / 'a.jpg'}\n")
    assert f"{folder}: left out 4 other files (.mp4, .safetensors, .txt, no suffix) and 1 subfolder\n" in err
    assert f"cannot use {folder / 'IMG_1.HEIC'} as an image: it is a HEIF image (HEIC)" in err
    assert f"cannot use {folder / 'scan.psd'} as an image: " in err
    assert f"cannot use {folder / 'gone.jpg'} as an image: no such file" in err
    assert "fastnst: 3 of 4 images could not be stylized, see above; the others are in" in err
    assert names(tmp_path / "out") == ["a.jpg"]


def test_stylize_says_what_a_folder_without_images_holds(unloaded: Path, tmp_path: Path) -> None:
    for index in range(12):
        (tmp_path / f"a.x{index:02d}").write_text("x")
    (tmp_path / "below").mkdir()
    with pytest.raises(DataError, match=r"holds no image, only 12 other files \(.*\.x07, …\) and 1 subfolder; give"):
        run(unloaded, tmp_path, out=tmp_path / "out")


def test_stylize_command_prints_names_that_are_not_utf8(model: Path, tmp_path: Path, fastnst: Fastnst) -> None:
    source = photo(tmp_path / "a.png")
    out = tmp_path / os.fsdecode(b"caf\xe9.png")
    code, text, err = fastnst("stylize", model, source, "--out", out)
    assert code == 0, err
    assert "caf" in text
    assert out.exists()


# What is kept of a file.


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_stylize_keeps_date_camera_and_resolution(model: Path, tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "Camera 1"
    exif[ExifTags.Base.Software] = "Firmware"
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.DateTimeOriginal: "2023:01:02 03:04:05"}
    source = photo(tmp_path / "in.jpg", exif=exif, dpi=(300, 200))
    run(model, source, out=tmp_path / f"out{suffix}")
    with Image.open(tmp_path / f"out{suffix}") as image:
        kept = image.getexif()
    assert kept[ExifTags.Base.Model] == "Camera 1"
    assert kept[ExifTags.Base.Software] == SOFTWARE
    assert kept[ExifTags.Base.Orientation] == 1
    assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == "2023:01:02 03:04:05"
    # Turned with the image.
    assert read_with_metadata(tmp_path / f"out{suffix}").dpi == pytest.approx((200, 300), abs=0.1)
    assert read_image(tmp_path / f"out{suffix}").shape == (24, 20, 3)
