"""Whole runs in which images fail: listed at once, told, replaced, and the same after a resume."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastnst.config import Config
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import Entry, build_manifest
from fastnst.data.replacements import ReadFailure, append_row, late_row, read_failures, with_failed
from fastnst.data.sampler import Sampler
from fastnst.errors import DataError
from fastnst.training import trainer
from fastnst.training.run_dir import rejected_images
from fastnst.training.run_dir.layout import REJECTED_NAME
from fastnst.training.step.train_step import NetTrainer
from helpers.tiny_runs import logged, make_small, small_config, train_small

pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")

STEPS, BATCH, IMAGES = 12, 2, 12
LOADERS = ("dali", "pillow")


class Crash(Exception):
    """Ends a run as a power cut does: nothing more is written."""


class Scene:
    """Small runs over a folder of twelve images, some of which go away when the first batch is asked for."""

    def __init__(self, folder: Path, style: Path, tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.style, self.tmp = folder, style, tmp
        self.away = tmp / "away"
        self.away.mkdir()
        self.victims: list[str] = []
        self.crash_after: int | None = None
        self.order = Sampler(0, IMAGES, BATCH, STEPS)
        self.paths = [entry.path for entry in build_manifest(folder).images]
        step = NetTrainer.train_step

        def crashing(this: NetTrainer, number: int, batch: torch.Tensor) -> Any:
            if self.crash_after is not None and number > self.crash_after:
                raise Crash
            return step(this, number, batch)

        def opening(*arguments: Any, **options: Any) -> Any:
            self.take_away()
            return open_loader(*arguments, **options)

        make_small(monkeypatch)
        monkeypatch.setattr(NetTrainer, "train_step", crashing)
        monkeypatch.setattr(trainer, "open_loader", opening)

    def config(self, loader: str, *more: str) -> Config:
        settings = (f"data.loader={loader}", f"train.steps={STEPS}", "train.checkpoint_every=4", "train.samples=1")
        return small_config(self.folder, *settings, f"style.image={self.style}", *more)

    def take_away(self) -> None:
        for name in self.victims:
            (self.folder / name).rename(self.away / name)
        self.victims = []

    def bring_back(self) -> None:
        for path in self.away.iterdir():
            path.rename(self.folder / path.name)

    def first_used_in(self, step: int) -> str:
        """An image that comes for the first time in a step of the first pass, counted from 1."""
        return self.paths[int(self.order.batch(step - 1).indices[0])]

    def train(self, config: Config, name: str, **options: Any) -> list[str]:
        return train_small(config, self.tmp / name, **options)

    def crash(self, config: Config, name: str, after: int) -> None:
        self.crash_after = after
        with pytest.raises(Crash):
            self.train(config, name)
        self.crash_after = None

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.tmp / name / REJECTED_NAME).read_text("utf-8").splitlines()]

    def assert_same(self, one: str, other: str) -> None:
        """Weights bit for bit, and all that was logged."""
        first, second = (load_file(self.tmp / name / "model.safetensors") for name in (one, other))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key]), key
        assert logged(self.tmp / one) == logged(self.tmp / other)

    def assert_other(self, one: str, other: str) -> None:
        first, second = (load_file(self.tmp / name / "model.safetensors") for name in (one, other))
        assert any(not torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.fixture
def scene(photo_folder: Path, generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(photo_folder, generated_photos / "image_00.jpg", tmp_path, monkeypatch)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_image_that_goes_away_is_replaced_listed_and_told(scene: Scene, loader: str) -> None:
    (scene.folder / "letter.jpg").write_text("A letter.")
    victim = scene.first_used_in(5)
    scene.victims = [victim]
    messages = scene.train(scene.config(loader), "run")
    (told,) = [message for message in messages if victim in message]
    assert "failed in step 5: no such file or directory" in told
    assert "rejected.jsonl" in told
    by_check, later = scene.rows("run")
    assert by_check == {"path": "letter.jpg", "reason": by_check["reason"]}
    assert (later["path"], later["step"]) == (victim, 5)
    assert "no such file" in later["reason"]
    assert len(logged(scene.tmp / "run")) == STEPS


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("after", [5, 7, 11])
def test_a_resumed_run_does_without_the_same_images_from_the_same_steps(scene: Scene, loader: str, after: int) -> None:
    """The image is gone when the run is resumed; it is missed in step 5, between the checkpoints of steps 4 and 8."""
    scene.victims = [scene.paths[0], scene.first_used_in(5)]
    first_steps = [
        1 + next(s for s in range(STEPS) if scene.paths.index(name) in scene.order.batch(s).indices)
        for name in scene.victims
    ]
    assert max(first_steps) <= after
    config = scene.config(loader)
    names = list(scene.victims)
    scene.train(config, "whole")
    rows = scene.rows("whole")
    assert {row["path"]: row["step"] for row in rows} == dict(zip(names, first_steps, strict=True))
    scene.bring_back()
    scene.victims = names
    scene.crash(config, "crashed", after)
    # As a write that a power cut stopped.
    with (scene.tmp / "crashed" / REJECTED_NAME).open("a") as file:
        file.write('{"path": "image_0')
    scene.train(config, "crashed", resume=True)
    scene.assert_same("whole", "crashed")
    assert scene.rows("crashed") == rows


def test_what_came_back_before_the_steps_are_repeated_is_used_again(scene: Scene) -> None:
    config = scene.config("pillow")
    scene.train(config, "clean")
    scene.victims = [scene.first_used_in(6)]
    scene.crash(config, "crashed", 7)
    assert len(scene.rows("crashed")) == 1
    scene.bring_back()
    scene.train(config, "crashed", resume=True)
    assert scene.rows("crashed") == []
    scene.assert_same("clean", "crashed")


def test_what_failed_in_a_step_that_is_done_stays_out(scene: Scene) -> None:
    config = scene.config("pillow")
    victim = scene.first_used_in(3)
    scene.victims = [victim]
    scene.train(config, "whole")
    scene.bring_back()
    scene.victims = [victim]
    scene.crash(config, "crashed", 7)
    scene.bring_back()
    scene.train(config, "crashed", resume=True)
    scene.assert_same("whole", "crashed")
    assert [row["step"] for row in scene.rows("crashed")] == [3]


def test_too_many_failures_end_the_run_and_a_mended_folder_goes_on(scene: Scene) -> None:
    config = scene.config("pillow")
    scene.train(config, "clean")
    # All that comes for the first time behind the checkpoint of step 4: what fails before it stays out.
    scene.victims = [scene.paths[index] for step in (5, 6) for index in scene.order.batch(step - 1).indices]
    names = list(scene.victims)
    with pytest.raises(DataError, match=r"4 of 12 images .* data\.max_failed_percent = 1 allows 3") as caught:
        scene.train(config, "run")
    assert caught.value.exit_code == 3
    assert sum(name in str(caught.value) for name in names) == 3
    assert len(scene.rows("run")) == 4
    scene.bring_back()
    scene.train(config, "run", resume=True)
    assert scene.rows("run") == []
    scene.assert_same("clean", "run")


def test_more_may_be_allowed_when_resuming(scene: Scene) -> None:
    names = sorted({scene.first_used_in(step) for step in (5, 6)} | set(scene.paths[-3:]))
    generous = scene.config("pillow", "data.max_failed_percent=50")
    scene.victims = list(names)
    scene.train(generous, "whole")
    scene.bring_back()
    scene.victims = list(names)
    with pytest.raises(DataError, match="allows 3"):
        scene.train(scene.config("pillow"), "run")
    scene.bring_back()
    scene.victims = list(names)
    scene.train(generous, "run", resume=True)
    scene.assert_same("whole", "run")


def test_none_may_fail_if_so_configured(scene: Scene) -> None:
    scene.victims = [scene.first_used_in(5)]
    victim = scene.victims[0]
    with pytest.raises(DataError, match="no such file") as caught:
        scene.train(scene.config("pillow", "data.max_failed_percent=0"), "run")
    assert victim in str(caught.value)


def test_what_went_away_unnoticed_is_another_folder(scene: Scene) -> None:
    """Between two processes, or before its first place: the run does not know it, and says what to do."""
    config = scene.config("pillow")
    scene.crash(config, "run", 5)
    (scene.folder / scene.paths[3]).unlink()
    with pytest.raises(DataError, match="the images in the data folder changed") as caught:
        scene.train(config, "run", resume=True)
    assert "--allow-changes" in str(caught.value)
    scene.train(config, "run", resume=True, allow_changes=True)
    assert len(logged(scene.tmp / "run")) == STEPS


def test_a_failure_that_cannot_be_listed_ends_the_run(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path, _row: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rejected_images, "append_row", full)
    scene.victims = [scene.first_used_in(5)]
    with pytest.raises(DataError, match=r"rejected\.jsonl: No space left") as caught:
        scene.train(scene.config("dali"), "run")
    assert caught.value.exit_code == 3


def test_a_images_failure_is_on_the_disk_before_the_batch_is_trained_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[int, int] = {}
    sync = os.fsync

    def record(descriptor: int) -> None:
        sync(descriptor)
        sizes[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", record)
    scene.victims = [scene.first_used_in(6)]
    scene.crash(scene.config("pillow"), "run", 5)
    assert [row["step"] for row in scene.rows("run")] == [6]
    status = (scene.tmp / "run" / REJECTED_NAME).stat()
    assert status.st_size == sizes[status.st_ino] > 0


def test_only_the_first_of_many_are_told_one_by_one(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejected_images, "MOST_MESSAGES", 2)
    scene.victims = scene.paths[4:9]
    messages = scene.train(scene.config("dali", "data.max_failed_percent=60"), "run")
    assert sum("stands in for it" in message for message in messages) == 2
    assert sum("further images" in message for message in messages) == 1
    assert len(scene.rows("run")) == 5


ENTRY = Entry("a b/caf\udce9 %2F.jpg", 1234, 640, 480, "JPEG", True, 99)


def test_a_row_brings_back_the_image_that_was_accepted(tmp_path: Path) -> None:
    file = tmp_path / REJECTED_NAME
    append_row(file, '{"path": "x.gif", "reason": "it is a GIF; convert it"}\n')
    append_row(file, late_row(ReadFailure(ENTRY, "it went; restore it", 7)))
    append_row(file, late_row(ReadFailure(ENTRY, "it went again; restore it", 5)))
    append_row(file, late_row(ReadFailure(ENTRY, "and again; restore it", 9)))
    (found,) = read_failures(file)
    assert (found.reason, found.step) == ("it went again; restore it", 5)
    assert [getattr(found.entry, key) for key in ("path", "size", "width", "height", "format", "plain")] == [
        getattr(ENTRY, key) for key in ("path", "size", "width", "height", "format", "plain")
    ]
    assert found.entry.mtime < 0, "no file has this time"
    assert json.loads(file.read_text("utf-8").splitlines()[1])["path"] == "a b/caf\\xe9 %2F.jpg"
    assert read_failures(tmp_path / "absent") == []


def _changed(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda row: row["checked"].update(values)


@pytest.mark.parametrize(
    "damage",
    [
        _changed(name="../secret.jpg"),
        _changed(name="a/../../secret.jpg"),
        _changed(name="/etc/passwd"),
        _changed(name="%2Fetc/passwd"),
        _changed(name="a%00b.jpg"),
        _changed(name=""),
        _changed(name=7),
        _changed(size=0),
        _changed(width="640"),
        _changed(height=True),
        _changed(format="GIF"),
        _changed(plain=1),
        lambda row: row.pop("checked"),
        lambda row: row.pop("reason"),
        lambda row: row.update(step=0),
        lambda row: row.update(step=1.5),
        lambda row: row.update(checked=[]),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    row = json.loads(late_row(ReadFailure(ENTRY, "it went; restore it", 7)))
    damage(row)
    (tmp_path / REJECTED_NAME).write_text('{"path": "a", "reason": "b"}\n' + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"line 2 of .*rejected\.jsonl is damaged; remove that line"):
        read_failures(tmp_path / REJECTED_NAME)


@pytest.mark.parametrize(
    "line", [b"[]", b'["step"]', b'"step"', b'"a"', b"7", b"null", b"\xff", b"{", b"", b"[" * 100_000]
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / REJECTED_NAME).write_bytes(line + b"\n")
    with pytest.raises(DataError, match="line 1 of"):
        read_failures(tmp_path / REJECTED_NAME)


def test_a_manifest_gets_back_what_went_away_or_changed(photo_folder: Path) -> None:
    before = build_manifest(photo_folder)
    gone, broken, other = before.images[2], before.images[6], before.images[9]
    (photo_folder / gone.path).unlink()
    (photo_folder / broken.path).write_bytes(b"A letter.")
    (photo_folder / other.path).write_bytes((photo_folder / before.images[0].path).read_bytes())
    now = build_manifest(photo_folder)
    assert now.fingerprint != before.fingerprint
    failures = [ReadFailure(entry, "it went; restore it", 3) for entry in (other, gone, broken)]
    restored = with_failed(now, failures)
    assert restored.fingerprint == before.fingerprint
    assert [entry.path for entry in restored.images] == [entry.path for entry in before.images]
    assert restored.images[9].width == other.width
    assert not restored.rejected
    assert with_failed(before, failures).images == before.images
