"""Runs in which images fail: replaced, listed at once, logged, and the same after a resume."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fastnst.config import Config
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import build_manifest
from fastnst.data.replacements import REJECTED_NAME
from fastnst.data.sampler import Sampler
from fastnst.errors import DataError
from fastnst.training import trainer
from fastnst.training.run_dir import rejected_images
from helpers.batches import load_pillow_in_this_process
from helpers.run_comparison import assert_same_weights
from helpers.storage_faults import record_synced_sizes
from helpers.tiny_runs import Killed, before_each_step, logged, make_small, small_config, train_small

pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")

STEPS, BATCH, IMAGES = 12, 2, 12
LOADERS = ("dali", "pillow")


class Scene:
    """Small runs over a folder of twelve images, some of which vanish when the loader opens."""

    def __init__(self, folder: Path, style: Path, tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.style, self.tmp = folder, style, tmp
        self.away = tmp / "away"
        self.away.mkdir()
        self.victims: Sequence[str] = ()
        self.crash_after: int | None = None
        self.sampler = Sampler(0, IMAGES, BATCH, STEPS)
        self.paths = [entry.path for entry in build_manifest(folder).images]

        def crash(_: object, step: int) -> None:
            if self.crash_after is not None and step > self.crash_after:
                raise Killed

        def opening(*arguments: Any, **options: Any) -> Any:
            for name in self.victims:
                (self.folder / name).rename(self.away / name)
            return open_loader(*arguments, **options)

        make_small(monkeypatch)
        load_pillow_in_this_process(monkeypatch)
        before_each_step(monkeypatch, crash)
        monkeypatch.setattr(trainer, "open_loader", opening)

    def config(self, loader: str, *more: str) -> Config:
        settings = (f"data.loader={loader}", f"train.steps={STEPS}", "train.checkpoint_every=4", "train.samples=1")
        return small_config(self.folder, *settings, f"style.image={self.style}", *more)

    def bring_back(self) -> None:
        for path in self.away.iterdir():
            path.rename(self.folder / path.name)

    def first_used_in(self, step: int) -> str:
        """An image whose first use is in this step, from 1, of the first epoch."""
        return self.paths[int(self.sampler.batch(step - 1).indices[0])]

    def train(self, config: Config, name: str, without: Sequence[str] = (), **options: Any) -> list[str]:
        self.victims = without
        return train_small(config, self.tmp / name, **options)

    def crash(self, config: Config, name: str, after: int, without: Sequence[str] = ()) -> None:
        self.crash_after = after
        with pytest.raises(Killed):
            self.train(config, name, without)
        self.crash_after = None

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.tmp / name / REJECTED_NAME).read_text("utf-8").splitlines()]

    def assert_same(self, one: str, other: str) -> None:
        """Weights bit for bit, and all that was logged."""
        assert_same_weights(self.tmp / one, self.tmp / other)
        assert logged(self.tmp / one) == logged(self.tmp / other)


@pytest.fixture
def scene(photo_folder: Path, generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(photo_folder, generated_photos / "image_00.jpg", tmp_path, monkeypatch)


@pytest.mark.parametrize("loader", LOADERS)
def test_train_replaces_lists_and_logs_an_image_that_vanishes(scene: Scene, loader: str) -> None:
    (scene.folder / "letter.jpg").write_text("A letter.")
    victim = scene.first_used_in(5)
    messages = scene.train(scene.config(loader), "run", [victim])
    assert any("1 of 13 images refused" in message for message in messages)
    (message,) = [message for message in messages if victim in message]
    assert "failed in step 5: no such file or directory" in message
    assert "rejected.jsonl" in message
    by_check, later = scene.rows("run")
    assert by_check == {"path": "letter.jpg", "reason": by_check["reason"]}
    assert (later["path"], later["step"]) == (victim, 5)
    assert "no such file" in later["reason"]
    assert len(logged(scene.tmp / "run")) == STEPS


@pytest.mark.parametrize(("after", "loader"), [(5, "pillow"), (11, "dali")])
def test_train_resume_replaces_the_same_images_from_the_same_steps(scene: Scene, after: int, loader: str) -> None:
    """The image is gone when the run is resumed; it is missed in step 5, between the checkpoints of steps 4 and 8."""
    names = [scene.paths[0], scene.first_used_in(5)]
    first_steps = [
        1 + next(s for s in range(STEPS) if scene.paths.index(name) in scene.sampler.batch(s).indices) for name in names
    ]
    assert max(first_steps) <= after
    config = scene.config(loader)
    scene.train(config, "whole", names)
    rows = scene.rows("whole")
    assert {row["path"]: row["step"] for row in rows} == dict(zip(names, first_steps, strict=True))
    scene.bring_back()
    scene.crash(config, "crashed", after, names)
    # A write that a power cut interrupted.
    with (scene.tmp / "crashed" / REJECTED_NAME).open("a") as file:
        file.write('{"path": "image_0')
    scene.train(config, "crashed", resume=True)
    scene.assert_same("whole", "crashed")
    assert scene.rows("crashed") == rows


def test_train_resume_reads_an_image_again_that_failed_in_a_repeated_step(scene: Scene) -> None:
    config = scene.config("pillow")
    scene.train(config, "clean")
    scene.crash(config, "crashed", 7, [scene.first_used_in(6)])
    assert len(scene.rows("crashed")) == 1
    scene.bring_back()
    scene.train(config, "crashed", resume=True)
    assert scene.rows("crashed") == []
    scene.assert_same("clean", "crashed")


def test_train_resume_keeps_replacing_an_image_that_failed_in_a_completed_step(scene: Scene) -> None:
    config = scene.config("pillow")
    victim = scene.first_used_in(3)
    scene.train(config, "whole", [victim])
    scene.bring_back()
    scene.crash(config, "crashed", 7, [victim])
    scene.bring_back()
    scene.train(config, "crashed", resume=True)
    scene.assert_same("whole", "crashed")
    assert [row["step"] for row in scene.rows("crashed")] == [3]


def test_train_stops_at_too_many_failures_and_resumes_on_a_restored_folder(scene: Scene) -> None:
    config = scene.config("pillow")
    scene.train(config, "clean")
    # First used after the checkpoint of step 4: images that failed before it would stay replaced.
    names = [scene.paths[index] for step in (5, 6) for index in scene.sampler.batch(step - 1).indices]
    with pytest.raises(DataError, match=r"4 of 12 images .* data\.max_failed_percent = 1 allows 3") as caught:
        scene.train(config, "run", names)
    assert caught.value.exit_code == 3
    assert sum(name in str(caught.value) for name in names) == 3
    assert len(scene.rows("run")) == 4
    scene.bring_back()
    scene.train(config, "run", resume=True)
    assert scene.rows("run") == []
    scene.assert_same("clean", "run")


def test_train_resume_may_allow_more_failures(scene: Scene) -> None:
    names = sorted({scene.first_used_in(step) for step in (5, 6)} | set(scene.paths[-3:]))
    generous = scene.config("pillow", "data.max_failed_percent=50")
    scene.train(generous, "whole", names)
    scene.bring_back()
    with pytest.raises(DataError, match="allows 3"):
        scene.train(scene.config("pillow"), "run", names)
    scene.bring_back()
    scene.train(generous, "run", names, resume=True)
    scene.assert_same("whole", "run")


def test_train_resume_refuses_a_folder_that_lost_an_image(scene: Scene) -> None:
    """It vanished between two processes, so the run has not recorded its failure."""
    config = scene.config("pillow")
    scene.crash(config, "run", 5)
    (scene.folder / scene.paths[3]).unlink()
    with pytest.raises(DataError, match="the images in the data folder changed") as caught:
        scene.train(config, "run", resume=True)
    assert "--allow-changes" in str(caught.value)
    scene.train(config, "run", resume=True, allow_changes=True)
    assert len(logged(scene.tmp / "run")) == STEPS


def test_train_stops_if_a_failure_cannot_be_listed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(rejected_images, "append_row", mock.Mock(side_effect=error))
    with pytest.raises(DataError, match=r"rejected\.jsonl: No space left") as caught:
        scene.train(scene.config("dali"), "run", [scene.first_used_in(5)])
    assert caught.value.exit_code == 3


def test_train_lists_a_failure_durably_before_its_step(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = record_synced_sizes(monkeypatch)
    scene.crash(scene.config("pillow"), "run", 5, [scene.first_used_in(6)])
    assert [row["step"] for row in scene.rows("run")] == [6]
    status = (scene.tmp / "run" / REJECTED_NAME).stat()
    assert status.st_size == sizes[status.st_ino] > 0


def test_train_logs_only_the_first_of_many_failures(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejected_images, "MAX_MESSAGES", 2)
    messages = scene.train(scene.config("dali", "data.max_failed_percent=60"), "run", scene.paths[4:9])
    assert sum("failed in step" in message for message in messages) == 2
    assert sum("further images" in message for message in messages) == 1
    assert len(scene.rows("run")) == 5
