"""What a run shows of itself beside numbers, and that this keeps within its share of the time."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastnst.config import Config, load_config
from fastnst.errors import UserError
from fastnst.run_log.writer import read_metrics
from fastnst.training.monitoring import snapshots
from fastnst.training.trainer import train

Configure = Callable[..., Config]
STEPS = 6


@pytest.fixture
def configure(photo_folder: Path) -> Configure:
    def configure(*assignments: str) -> Config:
        small = ("data.image_size=32", "train.batch_size=1", "data.workers=1", "data.loader=pillow", "style.size=48")
        log = (f"train.steps={STEPS}", "train.sample_every=100", "train.samples=1", "train.device=cpu")
        watched = ("visualize.vgg_maps=['relu1_2:3']", "visualize.transform_maps=['conv2:5','up2']")
        options = {
            "data.folder": photo_folder,
            "style.image": photo_folder / "image_00.jpg",
            "loss.vgg": "random",
        }
        all_assignments = [*small, *log, *watched, *assignments]
        return load_config(preset="vgg-conv3", assignments=all_assignments, options=options, environment={})

    return configure


class Clock:
    """Time that passes only when it is told to: `step` seconds with each training step, `look` with each set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, step: float, look: float) -> None:
        self.now = 0.0
        monkeypatch.setattr(snapshots.time, "perf_counter", lambda: self.now)
        due, projected = snapshots.SampleLogger.projections_due, snapshots.SampleLogger._project

        def stepping(this: snapshots.SampleLogger, *arguments: int) -> bool:
            self.now += step
            return due(this, *arguments)

        def looking(this: snapshots.SampleLogger, *arguments: object) -> None:
            with this._allowance:
                self.now += look
            # Its own clock stands still from here on; what it counts is taken back.
            spent, count = this._allowance.spent, this._allowance.count
            projected(this, *arguments)
            this._allowance.spent, this._allowance.count = spent, count

        monkeypatch.setattr(snapshots.SampleLogger, "projections_due", stepping)
        monkeypatch.setattr(snapshots.SampleLogger, "_project", looking)


def run(config: Config, out: Path) -> list[str]:
    messages: list[str] = []
    train(config, out, notify=messages.append)
    return messages


def images(out: Path) -> dict[str, list[int]]:
    """Steps of each image's slider."""
    events = EventAccumulator(str(out), size_guidance={"images": 0})
    events.Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_projections_stand_under_one_tag_with_a_slider(configure: Configure, tmp_path: Path) -> None:
    out = tmp_path / "run"
    messages = run(configure("visualize.every=2", "visualize.max_percent=100"), out)
    sliders = images(out)
    for image in ("image_00", "image_01"):
        for tag in ("vgg_transformed/relu1_2_map3", "transform_net/conv2_map5", "transform_net/up2"):
            assert sliders[f"evolution/{tag}/{image}"] == [0, 2, 4, 6]
        assert sliders[f"strip/transform_net/{image}"] == [0, 2, 4, 6]
        assert sliders[f"strip/vgg_content/{image}"] == [0]
    assert sliders["stylised/image_00"] == [0, 6]
    assert all(0 < row["speed/projections_percent"] < 100 for row in read_metrics(out))
    (report,) = [message for message in messages if message.startswith("projections: ")]
    assert report.startswith("projections: 4 sets in ")
    assert "of the training time" in report
    assert "left out" not in report


def test_they_do_not_change_what_is_learned(configure: Configure, tmp_path: Path) -> None:
    run(configure("visualize.every=2", "visualize.max_percent=100"), tmp_path / "watched")
    messages = run(configure("visualize.every=0"), tmp_path / "unwatched")
    watched, unwatched = (load_file(tmp_path / name / "model.safetensors") for name in ("watched", "unwatched"))
    assert all(torch.equal(tensor, unwatched[name]) for name, tensor in watched.items())
    assert not any(tag.startswith(("evolution/", "strip/")) for tag in images(tmp_path / "unwatched"))
    assert "speed/projections_percent" not in read_metrics(tmp_path / "unwatched")[0]
    assert not any(message.startswith("projections") for message in messages)


def test_sets_that_would_take_too_long_are_left_out(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 s a step, 2 s a set, a tenth of the time: the first set uses up 20 s, and another fits after 40 s."""
    Clock(monkeypatch, step=10.0, look=2.0)
    messages = run(configure("visualize.every=1", "visualize.max_percent=10"), tmp_path / "run")
    assert images(tmp_path / "run")["evolution/transform_net/up2/image_00"] == [0, 4, 6]
    (report,) = [message for message in messages if message.startswith("projections: ")]
    assert "3 sets in 0:06, 9.1% of the training time; 4 more would have passed" in report
    assert "visualize.max_percent = 10" in report


def test_the_time_is_that_of_training(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, step=1000.0, look=2.0)
    run(configure("visualize.every=1", "train.log_every=1"), tmp_path / "run")
    assert images(tmp_path / "run")["evolution/transform_net/up2/image_00"] == list(range(STEPS + 1))
    shares = [row["speed/projections_percent"] for row in read_metrics(tmp_path / "run")]
    # At the end of step s: the sets of steps 0 … s − 1, in s steps' time. The clock ticks before the row is written.
    assert shares == pytest.approx([100 * 2 * s / (1000 * s + 2 * s) for s in range(1, STEPS + 1)])


def test_maps_that_the_networks_lack_stop_a_run_before_it_begins(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="relu1_2 has no map 64; its maps are 0 … 63"):
        run(configure("visualize.vgg_maps=['relu1_2:64']"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_vgg19_reaches_as_deep_as_what_is_watched(configure: Configure, tmp_path: Path) -> None:
    run(configure("train.steps=1", "visualize.vgg_maps=['pool3:1']", "visualize.images=1"), tmp_path / "run")
    assert images(tmp_path / "run")["evolution/vgg_transformed/pool3_map1/image_00"] == [0, 1]


def test_images_of_one_name_in_two_folders_are_told_apart(
    configure: Configure, photo_folder: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (photo_folder / name).mkdir()
        shutil.copy(photo_folder / "image_01.png", photo_folder / name / "same.png")
    run(configure("train.steps=1", "train.samples=2"), tmp_path / "run")
    assert {"stylised/a/same.png", "stylised/b/same.png"} <= set(images(tmp_path / "run"))
