"""Images that fail after the check are replaced by the stated rule, by both loaders alike; no batch is lost."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastnst.config import DataConfig
from fastnst.data.crop import crop_box, resize_crop
from fastnst.data.loaders import Loader, open_loader, pillow
from fastnst.data.manifest import Manifest, build_manifest
from fastnst.data.replacements import ImageReplacer, ReadFailure, max_failures
from fastnst.data.sampler import Sampler
from fastnst.errors import DataError
from fastnst.images import read_image
from helpers import crashing_workers

pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")

LOADERS = ("dali", "pillow")
IMAGES, BATCH, STEPS = 12, 4, 15
LARGEST_DIFFERENCE = 1


class Run:
    """A loader over twelve images, all of which may fail but one, and what it reported."""

    def __init__(self, manifest: Manifest, loader: str, *, max_percent: float = 100.0, start_step: int = 0) -> None:
        self.failures: list[ReadFailure] = []
        replacements = ImageReplacer(manifest, max_percent=max_percent, on_failure=self.failures.append)
        config = DataConfig(loader=loader, image_size=32, workers=1, prefetch=2)
        self.order = Sampler(5, IMAGES, BATCH, STEPS)
        self.batches: Loader = open_loader(
            manifest,
            self.order,
            config,
            device=torch.device("cpu"),
            start_step=start_step,
            replacements=replacements,
        )

    def steps(self) -> dict[str, int]:
        return {failure.entry.path: failure.step for failure in self.failures}

    def rest(self) -> list[torch.Tensor]:
        with self.batches:
            return list(self.batches)


@pytest.fixture
def originals(generated_photos: Path) -> dict[str, np.ndarray]:
    """Pixels of the images before anything happens to them."""
    return {path.name: read_image(path) for path in generated_photos.iterdir()}


def expected_batch(
    manifest: Manifest, order: Sampler, step: int, failed: dict[str, int], originals: dict[str, np.ndarray]
) -> torch.Tensor:
    """The rule, said once more: `failed` holds, by path, the first step (from 1) without the image."""
    samples = order.batch(step)
    squares = []
    for index, crop, flip in zip(samples.indices, samples.crop, samples.flip, strict=True):
        position = int(index)
        while failed.get(manifest.images[position].path, STEPS + 1) <= step + 1:
            position = 0 if position + 1 == len(manifest.images) else position + 1
        entry = manifest.images[position]
        window = crop_box(entry.width, entry.height, order.fit, crop, 32)
        squares.append(resize_crop(Image.fromarray(originals[entry.path]), window, 32, bool(flip)))
    return torch.from_numpy(np.stack(squares))


def check_batches(
    manifest: Manifest, run: Run, batches: list[torch.Tensor], originals: dict[str, np.ndarray], start_step: int = 0
) -> None:
    assert len(batches) == STEPS - start_step
    for step, batch in enumerate(batches, start=start_step):
        expected = expected_batch(manifest, run.order, step, run.steps(), originals)
        assert (batch.int() - expected.int()).abs().max() <= LARGEST_DIFFERENCE, f"step {step + 1}"


def first_use(order: Sampler, index: int) -> int:
    """The step, from 1, in which an image comes first."""
    return next(step + 1 for step in range(STEPS) if index in order.batch(step).indices)


def same_size(content: bytes) -> Callable[[Path], object]:
    """Overwrite a file with other bytes, as many as it had."""

    def damage(path: Path) -> None:
        size = path.stat().st_size
        path.write_bytes((content * (size // len(content) + 1))[:size])

    return damage


def flip_a_byte_in_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def flip_a_byte_of_the_checksum(path: Path) -> None:
    """Of the pixels of a PNG, which stay as they were; behind it lies the end chunk of 12 bytes."""
    data = bytearray(path.read_bytes())
    data[-14] ^= 0xFF
    path.write_bytes(data)


def as_another_image(path: Path) -> None:
    """Whole, of the same number of bytes, but wider."""
    size = path.stat().st_size
    Image.new("RGB", (200, 30), (1, 2, 3)).save(path, "PNG")
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "vanishes": (lambda path: path.unlink(), "no such file"),
    "is truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes, and had"),
    "is emptied": (lambda path: os.truncate(path, 0), "it has 0 bytes"),
    "grows": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes, and had"),
    "becomes text": (same_size(b"A letter.\n"), "text"),
    "becomes zeros": (same_size(b"\0"), "no image"),
    "becomes another image": (as_another_image, "200 × 30 px, and was"),
    "becomes a folder": (lambda path: (path.unlink(), path.mkdir()), "is a directory"),
    "becomes a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "becomes a loop": (lambda path: (path.unlink(), path.symlink_to(path.name)), "symbolic links"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_happens_to_a_image_both_loaders_replace_it_alike(
    photo_folder: Path, originals: dict[str, np.ndarray], damage: str
) -> None:
    manifest = build_manifest(photo_folder)
    change, reason = DAMAGES[damage]
    # Two that stand beside each other: the first stand-in of the one is the other.
    victims = (4, 5)
    for victim in victims:
        change(photo_folder / manifest.images[victim].path)
    runs = {loader: Run(manifest, loader) for loader in LOADERS}
    batches = {loader: run.rest() for loader, run in runs.items()}
    order = runs["dali"].order
    for loader, run in runs.items():
        assert len(run.failures) == 2, "each is reported once"
        assert all(reason in failure.reason and "; " in failure.reason for failure in run.failures)
        check_batches(manifest, run, batches[loader], originals)
    assert runs["dali"].failures == runs["pillow"].failures
    first = {manifest.images[victim].path: first_use(order, victim) for victim in victims}
    # The second of the two may be met earlier, standing in for the first.
    fifth, sixth = (manifest.images[victim].path for victim in victims)
    assert runs["dali"].steps() == {fifth: first[fifth], sixth: min(first.values())}


@pytest.mark.parametrize("damage", [flip_a_byte_in_the_middle, flip_a_byte_of_the_checksum])
def test_a_damaged_png_is_found_by_both_though_dali_would_take_it(
    photo_folder: Path, originals: dict[str, np.ndarray], damage: Callable[[Path], object]
) -> None:
    manifest = build_manifest(photo_folder)
    victim = next(index for index, entry in enumerate(manifest.images) if entry.format == "PNG")
    damage(photo_folder / manifest.images[victim].path)
    for loader in LOADERS:
        run = Run(manifest, loader)
        check_batches(manifest, run, run.rest(), originals)
        assert run.steps() == {manifest.images[victim].path: first_use(run.order, victim)}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_touched_image_is_still_the_same(photo_folder: Path, loader: str) -> None:
    manifest = build_manifest(photo_folder)
    whole = Run(manifest, loader).rest()
    for entry in manifest.images:
        os.utime(photo_folder / entry.path, ns=(1, 1))
    run = Run(manifest, loader)
    for one, other in zip(run.rest(), whole, strict=True):
        assert torch.equal(one, other)
    assert not run.failures


@pytest.mark.parametrize("content", [b"A letter.\n", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"\0"])
def test_dali_dies_of_it_and_is_rebuilt_in_place(
    photo_folder: Path, originals: dict[str, np.ndarray], content: bytes
) -> None:
    """The disk lies: same size, same time, other bytes, so that they reach the decoder. In three steps of the run."""
    manifest = build_manifest(photo_folder)
    order = Sampler(5, IMAGES, BATCH, STEPS)
    victims = [int(order.batch(step).indices[step]) for step in range(3)]
    for victim in victims:
        path = photo_folder / manifest.images[victim].path
        same_size(content)(path)
        os.utime(path, ns=(1, manifest.images[victim].mtime))
    found = {}
    for loader in LOADERS:
        run = Run(manifest, loader)
        check_batches(manifest, run, run.rest(), originals)
        assert set(run.steps()) == {manifest.images[victim].path for victim in victims}
        found[loader] = run.failures
    assert found["dali"] == found["pillow"]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("when", range(1, 6))
def test_images_that_vanish_while_batches_are_read(
    photo_folder: Path, originals: dict[str, np.ndarray], loader: str, when: int
) -> None:
    """What is delivered stays; what comes follows from the failures that were reported, whenever they were noticed."""
    manifest = build_manifest(photo_folder)
    run = Run(manifest, loader)
    with run.batches:
        batches = [next(run.batches) for _ in range(when)]
        before = [batch.clone() for batch in batches]
        for victim in (1, 2, 3, 9):
            (photo_folder / manifest.images[victim].path).unlink()
        batches += list(run.batches)
    assert all(torch.equal(one, other) for one, other in zip(batches, before, strict=False))
    check_batches(manifest, run, batches, originals)
    assert len(run.failures) == 4
    assert min(run.steps().values()) > when, "nothing that was delivered is taken back"


@pytest.mark.parametrize("loader", LOADERS)
def test_a_image_that_comes_back_stays_out(photo_folder: Path, originals: dict[str, np.ndarray], loader: str) -> None:
    """What a batch holds follows from the reported failures alone, even if a file flickers."""
    manifest = build_manifest(photo_folder)
    run = Run(manifest, loader)
    victim = int(run.order.batch(0).indices[0])
    path = photo_folder / manifest.images[victim].path
    path.rename(path.with_name("away"))
    with run.batches:
        batches = [next(run.batches)]
        path.with_name("away").rename(path)
        batches += list(run.batches)
    assert run.steps() == {path.name: 1}
    check_batches(manifest, run, batches, originals)


def test_known_failures_hold_from_their_step_on(photo_folder: Path, originals: dict[str, np.ndarray]) -> None:
    manifest = build_manifest(photo_folder)
    known = [ReadFailure(manifest.images[7], "it went; restore it", 4), ReadFailure(manifest.images[8], "so; so", 6)]
    config = DataConfig(loader="pillow", image_size=32, workers=1, prefetch=2)
    order = Sampler(5, IMAGES, BATCH, STEPS)
    for loader in LOADERS:
        replacements = ImageReplacer(manifest, max_percent=100, earlier=known, on_failure=lambda _: pytest.fail("new"))
        settings = config.model_copy(update={"loader": loader})
        with open_loader(
            manifest, order, settings, device=torch.device("cpu"), start_step=2, replacements=replacements
        ) as batches:
            for step, batch in enumerate(batches, start=2):
                failed = {failure.entry.path: failure.step for failure in known}
                expected = expected_batch(manifest, order, step, failed, originals)
                assert (batch.int() - expected.int()).abs().max() <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("images", "percent", "allowed"),
    [
        *((118_287, 1.0, 1182), (1000, 1.0, 10), (299, 1.0, 3), (12, 1.0, 3), (12, 50.0, 6), (12, 100.0, 11)),
        *((3, 1.0, 2), (1, 1.0, 0), (1, 100.0, 0), (118_287, 0.0, 0), (12, 0.0, 0)),
    ],
)
def test_how_many_may_fail(images: int, percent: float, allowed: int) -> None:
    assert max_failures(images, percent) == allowed


@pytest.mark.parametrize("loader", LOADERS)
def test_above_the_threshold_training_ends_and_names_the_first(
    photo_folder: Path, originals: dict[str, np.ndarray], loader: str
) -> None:
    manifest = build_manifest(photo_folder)
    order = Sampler(5, IMAGES, BATCH, STEPS)
    # One of each of the first two steps, and two of the third: the last of them is one too many.
    places = ((0, 0), (1, 0), (2, 0), (2, 1))
    victims = [int(order.batch(step).indices[place]) for step, place in places]
    names = [manifest.images[victim].path for victim in victims]
    for name in names:
        (photo_folder / name).unlink()
    run = Run(manifest, loader, max_percent=1.0)
    batches: list[torch.Tensor] = []
    with run.batches, pytest.raises(DataError, match="4 of 12 images") as caught:
        batches.extend(run.batches)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "data.max_failed_percent = 1 allows 3" in message
    assert sum(name in message for name in names) == 3
    assert "--resume" in message
    assert {failure.entry.path for failure in run.failures} == set(names), "the last is reported, too"
    # Whatever is before the step in which the fourth failed is delivered.
    assert len(batches) == max(run.steps().values()) - 1
    for step, batch in enumerate(batches):
        expected = expected_batch(manifest, order, step, run.steps(), originals)
        assert (batch.int() - expected.int()).abs().max() <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_that_goes_away_altogether_ends_training(photo_folder: Path, loader: str) -> None:
    manifest = build_manifest(photo_folder)
    photo_folder.rename(photo_folder.with_name("unmounted"))
    run = Run(manifest, loader)
    with run.batches, pytest.raises(DataError, match="12 of 12 images"):
        next(run.batches)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_failure_that_cannot_be_noted_ends_training(photo_folder: Path, loader: str) -> None:
    """It is noted before the batch that does without it is delivered."""
    manifest = build_manifest(photo_folder)
    (photo_folder / manifest.images[int(Sampler(5, IMAGES, BATCH, STEPS).batch(0).indices[2])].path).unlink()

    def full_disk(_: ReadFailure) -> None:
        raise DataError("no space left on device")

    replacements = ImageReplacer(manifest, max_percent=100, on_failure=full_disk)
    config = DataConfig(loader=loader, image_size=32, workers=1, prefetch=2)
    order = Sampler(5, IMAGES, BATCH, STEPS)
    with (
        open_loader(manifest, order, config, device=torch.device("cpu"), replacements=replacements) as batches,
        pytest.raises(DataError, match="no space left"),
    ):
        next(batches)


def test_a_image_that_kills_what_decodes_it_is_replaced(
    photo_folder: Path, originals: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pillow, "_read_crops", crashing_workers.read_or_die)
    manifest = build_manifest(photo_folder)
    run = Run(manifest, "pillow")
    check_batches(manifest, run, run.rest(), originals)
    (failure,) = run.failures
    assert failure.entry.path == crashing_workers.DEADLY
    assert "the process that decodes it dies" in failure.reason
    victim = next(index for index, entry in enumerate(manifest.images) if entry.path == crashing_workers.DEADLY)
    assert failure.step == first_use(run.order, victim)


def test_no_image_is_blamed_where_no_process_lives(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pillow, "_read_crops", crashing_workers.only_die)
    run = Run(build_manifest(photo_folder), "pillow")
    with run.batches, pytest.raises(DataError, match="end as soon as they start"):
        next(run.batches)
    assert not run.failures


def test_workers_that_are_killed_again_and_again_end_training(
    photo_folder: Path, originals: dict[str, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    manifest = build_manifest(photo_folder)
    run = Run(manifest, "pillow")
    loader: Any = run.batches
    batches = [next(loader)]
    with run.batches:
        for _ in range(pillow.MAX_WORKER_CRASHES):
            kill_workers(loader)
            batches.append(next(loader))
        kill_workers(loader)
        with pytest.raises(DataError, match=r"ended unexpectedly 4 times.*data\.workers below 1"):
            next(loader)
    assert len(caplog.messages) == pillow.MAX_WORKER_CRASHES
    assert not run.failures
    for step, batch in enumerate(batches):
        assert torch.equal(batch, expected_batch(manifest, run.order, step, {}, originals))


def kill_workers(loader: Any) -> None:
    for process in list(loader._pool._processes.values()):
        process.kill()
        process.join()
    # What was read before would be delivered first, and how much that is depends on the clock.
    loader.seek(loader._next_to_submit - len(loader._waiting))
