"""Images that fail after the check: replaced by the stated rule, by all loaders alike, and listed in rejected.jsonl."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastnst.data.loaders import Loader, open_loader, pillow
from fastnst.data.manifest import ImageEntry, Manifest, build_manifest
from fastnst.data.replacements import (
    ImageReplacer,
    ReadFailure,
    append_row,
    failure_row,
    max_failures,
    read_failures,
    with_failed,
)
from fastnst.data.sampler import Sampler
from fastnst.errors import DataError
from helpers import crashing_workers
from helpers.batches import CPU, assert_close, data_config, expected_batch, load_pillow_in_this_process, pixels_of

pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")

LOADERS = ("dali", "pillow")
IMAGES, BATCH, STEPS, SIZE = 12, 4, 15, 32
SAMPLER = Sampler(5, IMAGES, BATCH, STEPS)


class Run:
    """A loader over twelve images, all of which may fail but one, and what it reported."""

    def __init__(self, manifest: Manifest, loader: str, *, max_percent: float = 100.0) -> None:
        self.manifest = manifest
        self.failures: list[ReadFailure] = []
        replacer = ImageReplacer(manifest, max_percent=max_percent, on_failure=self.failures.append)
        self.batches: Loader = open_loader(manifest, SAMPLER, data_config(loader, SIZE), device=CPU, replacer=replacer)

    def steps(self) -> dict[str, int]:
        return {failure.entry.path: failure.step for failure in self.failures}

    def rest(self) -> list[torch.Tensor]:
        with self.batches:
            return list(self.batches)

    def check(self, batches: list[torch.Tensor], pixels: dict[str, np.ndarray], steps: int = STEPS) -> None:
        assert len(batches) == steps
        for step, batch in enumerate(batches):
            assert_close(batch, expected_batch(self.manifest, SAMPLER, step, SIZE, pixels, self.steps()))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    load_pillow_in_this_process(monkeypatch)


in_one_process = pytest.mark.usefixtures("one_process")


@pytest.fixture
def manifest(photo_folder: Path) -> Manifest:
    return build_manifest(photo_folder)


@pytest.fixture(scope="module")
def pixels(generated_photos: Path) -> dict[str, np.ndarray]:
    return pixels_of(generated_photos)


def path_of(manifest: Manifest, index: int) -> Path:
    return manifest.folder / manifest.images[index].path


def first_use(index: int) -> int:
    """The step, from 1, in which an image comes first."""
    return next(step + 1 for step in range(STEPS) if index in SAMPLER.batch(step).indices)


def same_size(content: bytes) -> Callable[[Path], object]:
    """Overwrite a file with other bytes, as many as it had."""

    def damage(path: Path) -> None:
        size = path.stat().st_size
        path.write_bytes((content * (size // len(content) + 1))[:size])

    return damage


def as_another_image(path: Path) -> None:
    """Whole, of the same number of bytes, but wider."""
    size = path.stat().st_size
    Image.new("RGB", (200, 30), (1, 2, 3)).save(path, "PNG")
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "vanishes": (lambda path: path.unlink(), "no such file"),
    "is truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes, and had"),
    "is emptied": (lambda path: os.truncate(path, 0), "it has 0 bytes"),
    "becomes text": (same_size(b"A letter.\n"), "text"),
    "becomes another image": (as_another_image, "200 × 30 px, and was"),
    "becomes a folder": (lambda path: (path.unlink(), path.mkdir()), "is a directory"),
    "becomes a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "becomes a loop": (lambda path: (path.unlink(), path.symlink_to(path.name)), "symbolic links"),
}


@in_one_process
@pytest.mark.parametrize("damage", DAMAGES)
def test_loaders_replace_an_image_that_changed(manifest: Manifest, pixels: dict[str, np.ndarray], damage: str) -> None:
    change, reason = DAMAGES[damage]
    # Two neighbours: the replacement of the one is the other.
    victims = (4, 5)
    for victim in victims:
        change(path_of(manifest, victim))
    runs = {loader: Run(manifest, loader) for loader in LOADERS}
    for run in runs.values():
        run.check(run.rest(), pixels)
        assert len(run.failures) == 2, "each is reported once"
        assert all(reason in failure.reason and "; " in failure.reason for failure in run.failures)
    assert runs["dali"].failures == runs["pillow"].failures
    # The second of the two may be met earlier, as the replacement of the first.
    fifth, sixth = (manifest.images[victim].path for victim in victims)
    assert runs["dali"].steps() == {fifth: first_use(4), sixth: min(map(first_use, victims))}


@in_one_process
@pytest.mark.parametrize("place", [0, -14], ids=["pixels", "checksum"])
def test_loaders_replace_a_damaged_png_that_dali_would_accept(
    manifest: Manifest, pixels: dict[str, np.ndarray], place: int
) -> None:
    victim = next(index for index, entry in enumerate(manifest.images) if entry.format == "PNG")
    data = bytearray(path_of(manifest, victim).read_bytes())
    data[place or len(data) // 2] ^= 0xFF
    path_of(manifest, victim).write_bytes(data)
    for loader in LOADERS:
        run = Run(manifest, loader)
        run.check(run.rest(), pixels)
        assert run.steps() == {manifest.images[victim].path: first_use(victim)}


@in_one_process
@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_accept_an_image_with_another_mtime(manifest: Manifest, loader: str) -> None:
    whole = Run(manifest, loader).rest()
    for entry in manifest.images:
        os.utime(manifest.folder / entry.path, ns=(1, 1))
    run = Run(manifest, loader)
    for one, other in zip(run.rest(), whole, strict=True):
        assert torch.equal(one, other)
    assert not run.failures


@in_one_process
@pytest.mark.parametrize("content", [b"A letter.\n", b"\xff\xd8\xff\xe0"])
def test_dali_loader_recovers_from_images_that_break_it(
    manifest: Manifest, pixels: dict[str, np.ndarray], content: bytes
) -> None:
    """The disk lies: same size, same time, other bytes, so that they reach the decoder. In three steps of the run."""
    victims = [int(SAMPLER.batch(step).indices[step]) for step in range(3)]
    for victim in victims:
        same_size(content)(path_of(manifest, victim))
        os.utime(path_of(manifest, victim), ns=(1, manifest.images[victim].mtime))
    found = {}
    for loader in LOADERS:
        run = Run(manifest, loader)
        run.check(run.rest(), pixels)
        assert set(run.steps()) == {manifest.images[victim].path for victim in victims}
        found[loader] = run.failures
    assert found["dali"] == found["pillow"]


@in_one_process
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("when", [1, 4])
def test_loaders_replace_images_that_vanish_while_they_read(
    manifest: Manifest, pixels: dict[str, np.ndarray], loader: str, when: int
) -> None:
    """Delivered batches stay; later ones follow from the reported failures, whenever these were noticed."""
    run = Run(manifest, loader)
    with run.batches:
        batches = [next(run.batches) for _ in range(when)]
        before = [batch.clone() for batch in batches]
        for victim in (1, 2, 3, 9):
            path_of(manifest, victim).unlink()
        batches += list(run.batches)
    assert all(torch.equal(one, other) for one, other in zip(batches, before, strict=False))
    run.check(batches, pixels)
    assert len(run.failures) == 4
    assert min(run.steps().values()) > when, "nothing that was delivered is taken back"


@in_one_process
@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_keep_replacing_an_image_that_comes_back(
    manifest: Manifest, pixels: dict[str, np.ndarray], loader: str
) -> None:
    path = path_of(manifest, int(SAMPLER.batch(0).indices[0]))
    path.rename(path.with_name("away"))
    run = Run(manifest, loader)
    with run.batches:
        batches = [next(run.batches)]
        path.with_name("away").rename(path)
        batches += list(run.batches)
    assert run.steps() == {path.name: 1}
    run.check(batches, pixels)


@in_one_process
@pytest.mark.parametrize("loader", LOADERS)
def test_image_replacer_applies_earlier_failures_from_their_step(
    manifest: Manifest, pixels: dict[str, np.ndarray], loader: str
) -> None:
    known = [ReadFailure(manifest.images[7], "it went; restore it", 4), ReadFailure(manifest.images[8], "so; so", 6)]
    failed = {failure.entry.path: failure.step for failure in known}
    replacer = ImageReplacer(manifest, max_percent=100, earlier=known, on_failure=lambda _: pytest.fail("new"))
    config = data_config(loader, SIZE)
    with open_loader(manifest, SAMPLER, config, device=CPU, start_step=2, replacer=replacer) as batches:
        for step, batch in enumerate(batches, start=2):
            assert_close(batch, expected_batch(manifest, SAMPLER, step, SIZE, pixels, failed))


@pytest.mark.parametrize(
    ("images", "percent", "allowed"),
    [
        *((118_287, 1.0, 1182), (299, 1.0, 3), (12, 1.0, 3), (12, 50.0, 6), (12, 100.0, 11)),
        *((3, 1.0, 2), (1, 100.0, 0), (118_287, 0.0, 0)),
    ],
)
def test_max_failures(images: int, percent: float, allowed: int) -> None:
    assert max_failures(images, percent) == allowed


@in_one_process
@pytest.mark.parametrize("loader", LOADERS)
def test_image_replacer_raises_above_the_limit(manifest: Manifest, pixels: dict[str, np.ndarray], loader: str) -> None:
    # One of each of the first two steps, and two of the third: the last of them is one too many.
    places = ((0, 0), (1, 0), (2, 0), (2, 1))
    names = [manifest.images[SAMPLER.batch(step).indices[place]].path for step, place in places]
    for name in names:
        (manifest.folder / name).unlink()
    run = Run(manifest, loader, max_percent=1.0)
    batches: list[torch.Tensor] = []
    with run.batches, pytest.raises(DataError, match="4 of 12 images") as caught:
        batches.extend(run.batches)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "data.max_failed_percent = 1 allows 3" in message
    assert sum(name in message for name in names) == 3
    assert "--resume" in message
    assert set(run.steps()) == set(names), "the last is reported, too"
    # All batches before the step in which the fourth failed are delivered.
    run.check(batches, pixels, max(run.steps().values()) - 1)


@in_one_process
@pytest.mark.parametrize("loader", LOADERS)
def test_image_replacer_reports_before_the_batch_is_delivered(manifest: Manifest, loader: str) -> None:
    path_of(manifest, int(SAMPLER.batch(0).indices[2])).unlink()

    def full_disk(_: ReadFailure) -> None:
        raise DataError("no space left on device")

    replacer = ImageReplacer(manifest, max_percent=100, on_failure=full_disk)
    with (
        open_loader(manifest, SAMPLER, data_config(loader, SIZE), device=CPU, replacer=replacer) as batches,
        pytest.raises(DataError, match="no space left"),
    ):
        next(batches)


def test_pillow_loader_replaces_an_image_that_kills_its_worker(
    manifest: Manifest, pixels: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pillow, "_read_crops", crashing_workers.read_or_die)
    run = Run(manifest, "pillow")
    run.check(run.rest(), pixels)
    (failure,) = run.failures
    assert failure.entry.path == crashing_workers.DEADLY
    assert "the process that decodes it dies" in failure.reason
    assert failure.step == first_use(manifest.images.index(failure.entry))


def test_pillow_loader_blames_no_image_if_all_workers_die(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pillow, "_read_crops", crashing_workers.only_die)
    run = Run(manifest, "pillow")
    with run.batches, pytest.raises(DataError, match="end as soon as they start"):
        next(run.batches)
    assert not run.failures


def test_pillow_loader_raises_after_too_many_crashes(
    manifest: Manifest, pixels: dict[str, np.ndarray], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pillow, "MAX_WORKER_CRASHES", 1)
    run = Run(manifest, "pillow")
    loader: Any = run.batches

    def kill_workers() -> None:
        for process in list(loader._pool._processes.values()):
            process.kill()
            process.join()
        # Otherwise batches read before the kill would come first, and their number depends on timing.
        loader.seek(loader._oldest_step)

    with run.batches:
        batches = [next(loader)]
        kill_workers()
        batches.append(next(loader))
        kill_workers()
        with pytest.raises(DataError, match=r"ended unexpectedly 2 times.*data\.workers below 1"):
            next(loader)
    assert len(caplog.messages) == 1
    assert not run.failures
    run.check(batches, pixels, 2)


ENTRY = ImageEntry("a b/caf\udce9 %2F.jpg", 1234, 640, 480, "JPEG", True, 99)


def test_read_failures_restores_entries(tmp_path: Path) -> None:
    file = tmp_path / "rejected.jsonl"
    append_row(file, '{"path": "x.gif", "reason": "it is a GIF; convert it"}\n')
    for reason, step in (("it went; restore it", 7), ("it went again; restore it", 5), ("and again; restore it", 9)):
        append_row(file, failure_row(ReadFailure(ENTRY, reason, step)))
    (found,) = read_failures(file)
    assert (found.reason, found.step) == ("it went again; restore it", 5)
    for key in ("path", "size", "width", "height", "format", "dali_safe"):
        assert getattr(found.entry, key) == getattr(ENTRY, key)
    assert found.entry.mtime < 0, "no file has this time"
    row = json.loads(file.read_text("utf-8").splitlines()[1])
    assert row["path"] == "a b/caf\\xe9 %2F.jpg"
    assert row["checked"].keys() == {"name", "size", "width", "height", "format", "plain"}
    assert read_failures(tmp_path / "absent") == []


ROW = json.loads(failure_row(ReadFailure(ENTRY, "it went; restore it", 7)))
NAMES = ("../a.jpg", "a/../../b.jpg", "/etc/passwd", "%2Fetc/passwd", "a%00b", "", 7)
CHECKED = [*(("name", name) for name in NAMES), ("size", 0), ("width", "640"), ("height", True), ("format", "EPS")]
DAMAGED_ROWS = [
    *(ROW | {"checked": ROW["checked"] | {key: value}} for key, value in (*CHECKED, ("plain", 1))),
    *({key: value for key, value in ROW.items() if key != missing} for missing in ("checked", "reason")),
    *(ROW | change for change in ({"step": 0}, {"step": 1.5}, {"checked": []})),
]
NO_ROWS = [b"[]", b'["step"]', b'"step"', b"7", b"null", b"\xff", b"{", b"", b"[" * 100_000]


def test_read_failures_rejects_a_damaged_line(tmp_path: Path) -> None:
    for line in (*(json.dumps(row).encode() for row in DAMAGED_ROWS), *NO_ROWS):
        (tmp_path / "rejected.jsonl").write_bytes(b'{"path": "a", "reason": "b"}\n' + line + b"\n")
        with pytest.raises(DataError, match=r"line 2 of .*rejected\.jsonl is damaged; remove that line"):
            read_failures(tmp_path / "rejected.jsonl")


def test_with_failed_restores_the_manifest(manifest: Manifest) -> None:
    gone, broken, other = (manifest.images[index] for index in (2, 6, 9))
    path_of(manifest, 2).unlink()
    path_of(manifest, 6).write_bytes(b"A letter.")
    path_of(manifest, 9).write_bytes(path_of(manifest, 0).read_bytes())
    now = build_manifest(manifest.folder)
    assert now.fingerprint != manifest.fingerprint
    failures = [ReadFailure(entry, "it went; restore it", 3) for entry in (other, gone, broken)]
    restored = with_failed(now, failures)
    assert restored.fingerprint == manifest.fingerprint
    assert [entry.path for entry in restored.images] == [entry.path for entry in manifest.images]
    assert restored.images[9].width == other.width
    assert not restored.rejected
    assert with_failed(manifest, failures).images == manifest.images
