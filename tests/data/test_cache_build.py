"""Building a cache: its bytes, batches from it, repair, and what survives a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastnst.config import DataConfig
from fastnst.data.cache import build as cache_build
from fastnst.data.cache import format as cache_format
from fastnst.data.cache.build import BuildResult, build_cache
from fastnst.data.cache.format import (
    CachedManifest,
    as_manifest,
    cached_shape,
    is_cache,
)
from fastnst.data.cache.verify import open_cache
from fastnst.data.crop import read_crop
from fastnst.data.loaders import open_loader
from fastnst.data.loaders.cache import read_pixels
from fastnst.data.manifest import ImageEntry, Manifest, build_manifest
from fastnst.data.replacements import ImageReplacer
from fastnst.data.sampler import Fit, Sampler
from fastnst.errors import DataError, UserError
from fastnst.storage import StorageError, lock_run
from helpers import batches
from helpers.batches import CPU, expected_batch, pixels_of

PROJECT = Path(__file__).resolve().parents[2]
SMALL_SHARD = 40_000
"""Bytes; two or three of the generated images at 64 px."""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_format, "SHARD_BYTES", SMALL_SHARD)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that a build decodes."""
    names: list[str] = []

    def watched(path: str, *arguments: Any, **options: Any) -> np.ndarray:
        names.append(Path(path).name)
        return read_crop(path, *arguments, **options)

    monkeypatch.setattr(cache_build, "read_crop", watched)
    return names


def build(folder: Path | Manifest, out: Path, size: int = 64, fit: Fit = "random_crop", **options: Any) -> BuildResult:
    manifest = folder if isinstance(folder, Manifest) else build_manifest(folder, allow_uniform=False)
    return build_cache(manifest, out, size=size, fit=fit, **options)


def load(manifest: Manifest, sampler: Sampler, size: int, **options: Any) -> torch.Tensor:
    return torch.cat(batches.load(manifest, sampler, "dali", size, workers=2, **options))


def by_pillow(manifest: Manifest, sampler: Sampler, size: int) -> torch.Tensor:
    """The Pillow loader's batches, computed image by image."""
    pixels = pixels_of(manifest.folder)
    return torch.cat([expected_batch(manifest, sampler, step, size, pixels) for step in range(sampler.steps)])


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(100))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize(
    ("fit", "size"), [("random_crop", 32), ("random_crop", 64), ("center_crop", 50), ("squash", 50)]
)
def test_cache_loader_equals_the_pillow_loader(fit: Fit, size: int, generated_photos: Path, tmp_path: Path) -> None:
    folder = build_manifest(generated_photos)
    cache = open_cache(build(generated_photos, tmp_path / "cache", size, fit).cache.folder, size=size, fit=fit)
    assert cache.images == folder.images
    assert len(cache.cache.shards) > 1
    sampler = Sampler(1, 12, 5, 6, fit=fit)
    from_cache = load(cache, sampler, size)
    assert from_cache.dtype == torch.uint8
    assert from_cache.shape == (30, size, size, 3)
    assert torch.equal(from_cache, by_pillow(folder, sampler, size))


def test_cache_loader_other_sizes_differ_by_rounding(generated_photos: Path, tmp_path: Path) -> None:
    cache = as_manifest(build(generated_photos, tmp_path / "cache", 50).cache)
    sampler = Sampler(1, 12, 6, 8)
    difference = (load(cache, sampler, 50).int() - by_pillow(build_manifest(generated_photos), sampler, 50).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 0.01


def test_cache_loader_start_step_and_ranks_do_not_change_batches(generated_photos: Path, tmp_path: Path) -> None:
    cache = as_manifest(build(generated_photos, tmp_path / "cache").cache)
    alone = load(cache, Sampler(3, 12, 6, 6), 64)
    shared = Sampler(3, 12, 6, 6, world_size=2)
    first, second = (load(cache, shared, 64, start_step=4, rank=rank).unflatten(0, (2, 3)) for rank in range(2))
    assert torch.equal(torch.cat([first, second], 1), alone[24:].unflatten(0, (2, 6)))


def test_build_cache_bytes_do_not_depend_on_workers(generated_photos: Path, tmp_path: Path) -> None:
    results = [contents(build(generated_photos, tmp_path / str(n), workers=n).cache.folder) for n in (1, 2, 5)]
    assert results[0] == results[1] == results[2]
    assert len(results[0]) > 4


def test_build_cache_keeps_a_finished_cache(generated_photos: Path, tmp_path: Path, decoded: list[str]) -> None:
    first = build(generated_photos, tmp_path)
    decoded.clear()
    again = build(generated_photos, tmp_path)
    assert not decoded
    assert again == BuildResult(first.cache, len(first.cache.shards))


def test_build_cache_rebuild_replaces_damaged_shards_only(
    generated_photos: Path, tmp_path: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cache = build(generated_photos, tmp_path).cache
    whole = contents(tmp_path)
    path = tmp_path / "shard_0001.u8"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    (tmp_path / "shard_0003.u8").unlink()
    with pytest.raises(DataError, match=r"shard_0001.u8 is damaged: its SHA-256.*shard_0003.u8 is missing.*--rebuild"):
        build(generated_photos, tmp_path)
    decoded.clear()
    built = build(generated_photos, tmp_path, rebuild=True)
    damaged = {image.entry.path for image in cache.images if image.shard in (1, 3)}
    assert set(decoded) == damaged
    assert built == BuildResult(cache, len(cache.shards) - 2)
    assert contents(tmp_path) == whole
    assert sum("is made again" in text for text in caplog.messages) == 2


def test_build_cache_rebuild_after_the_folder_changed(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    before = build(photo_folder, out).cache
    (photo_folder / "image_11.webp").unlink()
    with pytest.raises(DataError, match=r"cache of 12 images of .*, not of 11 images .*--rebuild") as caught:
        build(photo_folder, out)
    assert "choose another --out" in str(caught.value)
    built = build(photo_folder, out, rebuild=True)
    assert (len(built.cache.images), built.shards_kept) == (11, len(before.shards) - 1)
    smaller = build(photo_folder, out, 16, rebuild=True)
    assert set(contents(out)) == {"manifest.json", *(shard.name for shard in smaller.cache.shards)}
    assert len(smaller.cache.shards) < len(before.shards)
    assert open_cache(out, size=16, fit="random_crop").cache == smaller.cache


# A process that kills itself before the n-th call of a function.
KILLED = """
import os, signal, sys
from pathlib import Path
from fastnst.data.cache import format as cache_format
from fastnst.data.cache import build as cache_build
from fastnst.data.manifest import build_manifest

name, count = sys.argv[3].split(":")
cache_format.SHARD_BYTES = int(sys.argv[4])
original, calls = getattr(cache_build, name), []

def kill_at_count(*arguments, **options):
    calls.append(None)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

setattr(cache_build, name, kill_at_count)
manifest = build_manifest(Path(sys.argv[1]))
cache_build.build_cache(
    manifest, Path(sys.argv[2]), size=64, fit="random_crop", workers=1, rebuild="rebuild" in sys.argv
)
"""


def kill(folder: Path, out: Path, where: str, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, out, where, str(SMALL_SHARD), *options],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    ("where", "finished"),
    # Each shard is followed by its sidecar; the manifest comes last.
    [("read_crop:7", 3), ("write_atomic:5", 2), ("write_atomic:4", 1), ("manifest", None)],
)
def test_build_cache_keeps_finished_shards_after_a_kill(
    where: str, finished: int | None, generated_photos: Path, tmp_path: Path, decoded: list[str]
) -> None:
    whole = build(generated_photos, tmp_path / "whole").cache
    if finished is None:
        finished, where = len(whole.shards), f"write_atomic:{2 * len(whole.shards) + 1}"
    out = tmp_path / "cache"
    kill(generated_photos, out, where)
    assert is_cache(out)
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="unfinished"):
        open_cache(out, size=64, fit="random_crop")
    decoded.clear()
    built = build(generated_photos, out)
    assert built.shards_kept == finished
    assert len(decoded) == sum(image.shard >= finished for image in whole.images)
    assert contents(out).keys() == contents(tmp_path / "whole").keys()
    for shard in whole.shards:
        assert (out / shard.name).read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


def test_build_cache_after_a_kill_during_rebuild_and_more_damage(
    generated_photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = build(generated_photos, tmp_path).cache
    whole = contents(tmp_path)
    (tmp_path / "shard_0001.u8").unlink()
    kill(generated_photos, tmp_path, "read_crop:2", "rebuild")
    assert not (tmp_path / "manifest.json").exists()
    with (tmp_path / "shard_0002.u8").open("r+b") as file:
        file.write(b"damage")
    # Unfinished, it needs no `rebuild`: no cache exists yet that could be mistaken for an intact one.
    assert build(generated_photos, tmp_path).shards_kept == len(cache.shards) - 2
    assert "shard_0002.u8 is damaged or missing, and is made again" in caplog.messages[0]
    assert contents(tmp_path) == whole


def test_build_cache_names_an_image_that_vanished(photo_folder: Path, tmp_path: Path) -> None:
    manifest = build_manifest(photo_folder)
    (photo_folder / "image_05.webp").unlink()
    with pytest.raises(DataError, match=r"image_05.webp cannot be read any more: no such file.*same command again"):
        build(manifest, tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_build_cache_rejects_elongated_images(photo_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for width, name in ((16 * 32, "long.png"), (16 * 32 + 1, "longer.png")):
        Image.fromarray(rng.integers(0, 256, (16, width, 3), np.uint8)).save(photo_folder / name)
    cache = build(photo_folder, tmp_path / "cache").cache
    assert len(cache.images) == 13
    (refused,) = cache.rejected
    assert refused.path == "longer.png"
    assert "513 × 16 px is too thin" in refused.reason
    for file in photo_folder.glob("*"):
        if file.name != "longer.png":
            file.unlink()
    with pytest.raises(DataError, match="none of the images"):
        build(photo_folder, tmp_path / "other")


def test_build_cache_checks_space_before_it_writes(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "cache"
    cache = build(generated_photos, out).cache
    usage = type("Usage", (), {"free": cache.bytes - 1})
    monkeypatch.setattr(cache_build.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"needs .* KiB in .*, and .* KiB are free there; free some space"):
        build(generated_photos, tmp_path / "new" / "cache")
    assert not (tmp_path / "new").exists()
    # Old shards are removed one by one, each once its replacement is complete.
    usage.free = SMALL_SHARD
    assert build(generated_photos, out, 32, rebuild=True).shards_kept == 0


def test_build_cache_refuses_a_folder_with_other_files(
    photo_folder: Path, generated_photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"holds 'image_00.jpg', which is no part of a cache; choose another --out"):
        build(generated_photos, photo_folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "a page"}')
    assert not is_cache(tmp_path / "other")
    with pytest.raises(DataError, match="is not that of a cache"):
        build(generated_photos, tmp_path / "other", rebuild=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a part of the path is a file"):
        build(generated_photos, tmp_path / "file")
    with lock_run(tmp_path / "locked"), pytest.raises(UserError, match="in use by another fastnst process"):
        build(generated_photos, tmp_path / "locked")


def test_read_pixels(generated_photos: Path, tmp_path: Path) -> None:
    cache = as_manifest(build(generated_photos, tmp_path).cache)
    folder = build_manifest(generated_photos)
    for entry in (folder.images[0], folder.images[-1]):
        height, width = read_pixels(cache, entry).shape[:2]
        assert (height, width) == cached_shape(entry.width, entry.height, "random_crop", 64)
        assert read_pixels(folder, entry).shape[:2] == (entry.height, entry.width)
    with pytest.raises(DataError, match="not in the cache"):
        read_pixels(cache, ImageEntry("other.jpg", 1, 20, 20, "JPEG", True, 1))


def test_cache_loader_replaces_an_image_that_only_the_folder_had(generated_photos: Path, tmp_path: Path) -> None:
    """A run started on the folder; the cache was built after an image had vanished."""
    cache = as_manifest(build(generated_photos, tmp_path).cache)
    gone = ImageEntry("image_04a.png", 1, 50, 60, "PNG", True, -1)
    images = [*cache.images[:5], gone, *cache.images[5:]]
    manifest = CachedManifest(cache.folder, images, [], "", cache=cache.cache)
    sampler = Sampler(0, 13, 4, 7)
    failed: list[Any] = []
    replacer = ImageReplacer(manifest, max_percent=1, on_failure=failed.append)
    crops = load(manifest, sampler, 64, replacer=replacer)
    assert [failure.entry for failure in failed] == [gone]
    assert any(5 in sampler.batch(step).indices for step in range(7))
    pixels = pixels_of(generated_photos)
    expected = [expected_batch(manifest, sampler, step, 64, pixels, {gone.path: failed[0].step}) for step in range(7)]
    assert torch.equal(crops, torch.cat(expected))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, 100), "was written to: it has 100 bytes, and had"),
        (overwrite, "was written to, while it was read"),
    ],
)
def test_cache_loader_names_a_shard_that_changes(
    damage: Any, message: str, generated_photos: Path, tmp_path: Path
) -> None:
    cache = as_manifest(build(generated_photos, tmp_path).cache)
    path = tmp_path / "shard_0002.u8"
    os.utime(path, ns=(1, 1))
    config = DataConfig(image_size=64, workers=1)
    with open_loader(cache, Sampler(0, 12, 4, 100), config, device=CPU) as batches:
        next(batches)
        damage(path)
        with pytest.raises(DataError, match=message) as caught:
            list(batches)
    assert "shard_0002.u8" in str(caught.value)
    assert "--rebuild, then go on with --resume" in str(caught.value)


def test_cache_loader_keeps_reading_a_replaced_shard(generated_photos: Path, tmp_path: Path) -> None:
    """A rebuild writes new files; an open loader keeps reading the old ones."""
    cache = as_manifest(build(generated_photos, tmp_path).cache)
    sampler, config = Sampler(0, 12, 4, 12), DataConfig(image_size=64, workers=1)
    expected = load(cache, sampler, 64)
    with open_loader(cache, sampler, config, device=CPU) as batches:
        first = next(batches)
        (tmp_path / "shard_0000.u8").unlink()
        build(generated_photos, tmp_path, rebuild=True)
        assert torch.equal(torch.cat([first, *batches]), expected)


def test_cache_loader_close_early_and_twice(generated_photos: Path, tmp_path: Path) -> None:
    cache = as_manifest(build(generated_photos, tmp_path).cache)
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    batches = open_loader(cache, Sampler(0, 12, 4, 100), DataConfig(image_size=64), device=CPU)
    kept, copy = (batch := next(batches)), batch.clone()
    for _ in range(5):
        next(batches)
    assert torch.equal(kept, copy)
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files
