"""Checking a folder: images found, rejections and their reasons, and the cache of results."""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastnst.data import manifest as manifest_module
from fastnst.data.manifest import Manifest, build_manifest
from fastnst.errors import DataError
from fastnst.images import UnusableImageError
from fastnst.storage import cache_folder

NOBODY = 65534


@pytest.fixture
def checked_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that are decoded, as opposed to known from the cache."""
    seen: list[str] = []
    check_image = manifest_module.check_image

    def watched(path: str, data: bytes, **rules: Any) -> tuple[manifest_module.ImageEntry, str]:
        seen.append(path)
        return check_image(path, data, **rules)

    monkeypatch.setattr(manifest_module, "check_image", watched)
    return seen


def paths(manifest: Manifest) -> list[str]:
    return [entry.path for entry in manifest.images]


def reasons(manifest: Manifest) -> dict[str, str]:
    return {rejection.path: rejection.reason for rejection in manifest.rejected}


def save_png(path: Path, size: tuple[int, int] = (20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, "PNG")


def test_build_manifest_finds_every_image(photo_folder: Path) -> None:
    save_png(photo_folder / "z" / "deep" / "last.PNG", (40, 50))
    save_png(photo_folder / ".hidden.png")
    save_png(photo_folder / ".hidden" / "a.png")
    (photo_folder / "notes.txt").write_text("not an image")
    manifest = build_manifest(photo_folder)
    assert paths(manifest) == sorted(paths(manifest))
    assert len(manifest.images) == 13
    assert not manifest.rejected
    assert manifest.ignored == 2
    last = manifest.images[-1]
    assert (last.path, last.width, last.height, last.format, last.dali_safe) == ("z/deep/last.PNG", 40, 50, "PNG", True)
    assert last.size == (photo_folder / "z/deep/last.PNG").stat().st_size
    assert {entry.format for entry in manifest.images} == {"JPEG", "PNG", "WEBP"}


def test_build_manifest_photos_are_dali_safe(photos: Path, tmp_path: Path) -> None:
    for file in sorted(photos.iterdir())[::8]:
        (tmp_path / file.name).symlink_to(file)
    manifest = build_manifest(tmp_path)
    assert len(manifest.images) == 32
    for entry in manifest.images:
        with Image.open(tmp_path / entry.path) as image:
            profile = image.info.get("icc_profile")
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))) if profile else "sRGB"
        assert entry.dali_safe == ("sRGB" in name), name


def test_build_manifest_rechecks_files_with_another_size_or_mtime(photo_folder: Path, checked_files: list[str]) -> None:
    (photo_folder / "broken.jpg").write_bytes(b"no image")
    first = build_manifest(photo_folder)
    assert len(checked_files) == 13
    checked_files.clear()
    assert build_manifest(photo_folder) == first
    assert not checked_files

    changed = photo_folder / first.images[3].path
    time = changed.stat().st_mtime_ns
    os.utime(changed, ns=(time, time + 1))
    save_png(photo_folder / "broken.jpg")
    again = build_manifest(photo_folder)
    assert sorted(checked_files) == sorted(["broken.jpg", first.images[3].path])
    assert not again.rejected
    assert len(again.images) == 13

    checked_files.clear()
    changed.unlink()
    assert len(build_manifest(photo_folder).images) == 12
    assert not checked_files


def test_build_manifest_without_cache_and_with_another_min_side(photo_folder: Path, checked_files: list[str]) -> None:
    build_manifest(photo_folder, cache=False)
    build_manifest(photo_folder, cache=False)
    assert len(checked_files) == 24
    save_png(photo_folder / "small.png", (20, 30))
    build_manifest(photo_folder)
    assert set(reasons(build_manifest(photo_folder, min_side=21))) == {"small.png"}


def test_build_manifest_ignores_a_damaged_cache(
    photo_folder: Path, tmp_path: Path, checked_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTNST_CACHE", str(tmp_path / "cache"))
    expected = build_manifest(photo_folder)
    (file,) = (cache_folder() / "manifests").iterdir()
    whole = file.read_text("ascii")
    changes = (('"files": [[', '"files": [[1, '), ("true", "17"), ('"JPEG"', '"EPS"'), ('"key": [', '"key": [0, '))
    for text in ("", "[]", whole[: len(whole) // 2], *(whole.replace(*change) for change in changes)):
        file.write_text(text, "ascii")
        checked_files.clear()
        assert build_manifest(photo_folder) == expected
        assert len(checked_files) == 12


def test_build_manifest_works_if_the_cache_cannot_be_written(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTNST_CACHE", str(tmp_path / "file"))
    assert len(build_manifest(photo_folder).images) == 12


def test_build_manifest_continues_an_interrupted_check(
    photo_folder: Path, checked_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "_CHUNK", 1)

    def interrupt(done: int, _total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_manifest(photo_folder, workers=1, progress=interrupt)
    checked_files.clear()
    assert len(build_manifest(photo_folder).images) == 12
    assert len(checked_files) <= 7


def test_build_manifest_progress(photo_folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    build_manifest(photo_folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 12) for done in range(13)]
    calls.clear()
    build_manifest(photo_folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(12, 12)]


def test_manifest_fingerprint_depends_on_content_only(photo_folder: Path, tmp_path: Path) -> None:
    original = build_manifest(photo_folder).fingerprint
    copy = Path(shutil.copytree(photo_folder, tmp_path / "elsewhere"))
    assert build_manifest(copy).fingerprint == original
    save_png(copy / "one_more.png")
    assert build_manifest(copy).fingerprint != original


def test_build_manifest_refuses_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory; check the path"):
        build_manifest(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file; give the folder"):
        build_manifest(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        build_manifest(tmp_path / "empty")
    (tmp_path / "empty" / "a.jpg").write_bytes(b"letter")
    with pytest.raises(DataError, match=r"none of the 1 images .* the first, a\.jpg: it holds text"):
        build_manifest(tmp_path / "empty")


def test_build_manifest_does_not_cache_disk_errors(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: str) -> bytes:
        raise UnusableImageError("input/output error; check the disk")

    with monkeypatch.context() as disk:
        disk.setattr(manifest_module, "read_bytes", fail)
        with pytest.raises(DataError, match="check the disk"):
            build_manifest(photo_folder)
    assert len(build_manifest(photo_folder).images) == 12


@pytest.fixture
def as_anybody(photo_folder: Path) -> Iterator[Path]:
    """`photo_folder`, or a copy of it, owned by this process, which is not the superuser's for as long as it lasts."""
    if os.geteuid():
        yield photo_folder
        return
    # Above pytest's own folders, which are closed to others.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(photo_folder, Path(name) / "photos"))
        for path in (Path(name), folder, *folder.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        try:
            os.seteuid(NOBODY)
        except OSError:
            pytest.skip("permissions do not bind the superuser, and nobody else is there to try")
        try:
            yield folder
        finally:
            os.seteuid(0)


def test_build_manifest_rejects_unreadable_files_and_folders(as_anybody: Path) -> None:
    (as_anybody / "image_00.jpg").chmod(0)
    (as_anybody / "locked").mkdir(mode=0)
    manifest = build_manifest(as_anybody)
    found = reasons(manifest)
    assert set(found) == {"image_00.jpg", "locked"}
    assert all("permission denied; check its permissions" in reason for reason in found.values())
    assert len(manifest.images) == 11
    as_anybody.chmod(0)
    try:
        with pytest.raises(DataError, match="permission denied"):
            build_manifest(as_anybody)
    finally:
        as_anybody.chmod(0o755)


def test_build_manifest_allow_uniform(photo_folder: Path) -> None:
    one_dot = np.full((40, 50, 3), 200, np.uint8)
    one_dot[39, 49, 2] = 0
    Image.fromarray(one_dot).save(photo_folder / "dot.png")
    red_and_blue = np.full((40, 50, 3), (90, 30, 30), np.uint8)
    red_and_blue[:, 25:] = (30, 51, 50)
    Image.fromarray(red_and_blue).save(photo_folder / "alike_in_brightness.jpg", quality=95)
    invisible = Image.fromarray(np.full((40, 50, 3), 9, np.uint8))
    invisible.putalpha(Image.fromarray(np.arange(2000, dtype=np.uint16).astype(np.uint8).reshape(40, 50)))
    invisible.save(photo_folder / "flat_alpha.png")
    for name, mode in (("flat.jpg", "RGB"), ("flat.png", "L"), ("flat_bits.png", "1"), ("flat_palette.png", "P")):
        Image.new(mode, (40, 50), 0).save(photo_folder / name)
    found = reasons(build_manifest(photo_folder, allow_uniform=False))
    assert set(found) == {"flat.jpg", "flat.png", "flat_bits.png", "flat_palette.png", "flat_alpha.png"}
    assert all("one colour" in reason for reason in found.values())
    assert not build_manifest(photo_folder).rejected


def test_build_manifest_decodes_no_more_at_once_than_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(40):
        Image.fromarray(np.full((50, 40 + index, 3), index, np.uint8)).save(tmp_path / f"{index:02d}.png")
    running: list[int] = []
    largest: list[int] = []

    def slow(_: bytes, image: Image.Image) -> None:
        running.append(image.width * image.height)
        largest.append(sum(running))
        time.sleep(0.003)
        running.remove(image.width * image.height)

    monkeypatch.setattr(manifest_module, "check_integrity", slow)
    for pixels, rejected in ((5000, 0), (3000, 19)):
        monkeypatch.setattr(manifest_module, "available_host_memory", lambda pixels=pixels: 12 * pixels)
        largest.clear()
        found = build_manifest(tmp_path, workers=8, cache=pixels == 3000)
        assert len(found.rejected) == rejected
        assert max(largest) <= pixels
    assert found.rejected[0].reason == "decoding takes 35.7 KiB, and 35.2 KiB are there; scale it down"
    # What was rejected for lack of memory only is checked again.
    monkeypatch.setattr(manifest_module, "available_host_memory", lambda: 2**30)
    assert not build_manifest(tmp_path).rejected
    assert max(largest) > 3000
