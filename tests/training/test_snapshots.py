"""Samples and projections that a run logs: which, when, and that they change nothing."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastnst.config import Config
from fastnst.errors import UserError
from fastnst.training.train import train
from helpers.run_comparison import assert_same_weights
from helpers.tiny_runs import leave_out_graph, real_config

Configure = Callable[..., Config]
STEPS = 5


@pytest.fixture
def configure(photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """A run of real networks on single images."""
    leave_out_graph(monkeypatch)
    log = (f"train.steps={STEPS}", "train.sample_every=100", "train.samples=1", "visualize.every=100")
    watched = ("visualize.vgg_maps=['relu1_2:3']", "visualize.transform_maps=['conv2:5','up2']")
    return functools.partial(real_config, photo_folder, *log, *watched)


def images(out: Path) -> dict[str, list[int]]:
    """Steps of each image's slider."""
    events = EventAccumulator(str(out), size_guidance={"images": 0})
    events.Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_train_logs_projections_every_so_many_steps_and_learns_the_same(configure: Configure, tmp_path: Path) -> None:
    train(configure("visualize.every=2"), tmp_path / "watched")
    sliders = images(tmp_path / "watched")
    for image in ("image_00", "image_01"):
        for tag in ("vgg_transformed/relu1_2_map3", "transform_net/conv2_map5", "transform_net/up2"):
            assert sliders[f"evolution/{tag}/{image}"] == [0, 2, 4, 5]
        assert sliders[f"strip/transform_net/{image}"] == [0, 2, 4, 5]
        assert sliders[f"strip/vgg_content/{image}"] == [0]
    assert sliders["stylised/image_00"] == [0, 5]

    train(configure("visualize.every=0"), tmp_path / "unwatched")
    assert_same_weights(tmp_path / "watched", tmp_path / "unwatched")
    assert not any(tag.startswith(("evolution/", "strip/")) for tag in images(tmp_path / "unwatched"))


def test_train_refuses_maps_that_the_networks_lack(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="relu1_2 has no map 64; its maps are 0 … 63"):
        train(configure("visualize.vgg_maps=['relu1_2:64']"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_train_logs_deep_layers_and_tells_images_of_one_name_apart(
    configure: Configure, photo_folder: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (photo_folder / name).mkdir()
        shutil.copy(photo_folder / "image_01.png", photo_folder / name / "same.png")
    deep = ("visualize.vgg_maps=['pool3:1']", "visualize.images=1")
    train(configure("train.steps=1", "train.samples=2", *deep), tmp_path / "run")
    sliders = images(tmp_path / "run")
    assert {"stylised/a/same.png", "stylised/b/same.png"} <= set(sliders)
    assert sliders["evolution/vgg_transformed/pool3_map1/a/same.png"] == [0, 1]
