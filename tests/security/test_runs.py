"""Run directories that somebody prepared: links that lead out, configurations and checkpoints that are not ours."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fastnst.config import Config, load_config, to_toml
from fastnst.errors import DataError, UserError
from fastnst.images import write_image
from fastnst.training.run_dir.checkpoint import FOLDER, STATE, TENSORS
from fastnst.training.train import train
from fastnst.visualize.sheets.page import Figure
from fastnst.visualize.sheets.report import PAGE_NAME, Report, write_report
from helpers.malformed_files import Call


@pytest.fixture(scope="module")
def config(generated_photos: Path) -> Config:
    """One of two steps, at sizes a test can afford."""
    small = ("data.image_size=32", "train.batch_size=1", "data.workers=1", "data.loader=pillow", "train.steps=2")
    small += ("train.checkpoint_every=1", "train.samples=1", "visualize.every=0", "style.size=32", "train.device=cpu")
    options = {"data.folder": generated_photos, "style.image": generated_photos / "image_00.jpg"}
    return load_config(preset="vgg-conv3", assignments=small, options=options | {"loss.vgg": "random"}, environment={})


@pytest.fixture(scope="module")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of that configuration, done."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(config, out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody's, with files that a run must not touch."""
    folder = tmp_path / "outside"
    (folder / "inner").mkdir(parents=True)
    (folder / "precious").write_text("precious")
    (folder / "inner" / "precious").write_text("precious")
    return folder


def untouched(outside: Path) -> bool:
    files = sorted(path.relative_to(outside) for path in outside.rglob("*") if path.is_file())
    return files == [Path("inner/precious"), Path("precious")] and all(
        (outside / file).read_text() == "precious" for file in files
    )


def resume(config: Config, run: Path, *, steps: int = 3) -> None:
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    train(longer, run, resume=True)


def test_what_a_run_replaces_is_the_link_and_not_its_target(config: Config, run: Path, outside: Path) -> None:
    for name in ("metrics.jsonl", "rejected.jsonl", "model.safetensors"):
        (run / name).unlink()
        (run / name).symlink_to(outside / "precious")
    (run / FOLDER / ".step_00000003.part").symlink_to(outside / "inner")
    (run / FOLDER / "step_00000009").symlink_to(outside / "inner")
    # Where a link stands in a checkpoint's way, no checkpoint is one of the two good ends.
    with contextlib.suppress(DataError):
        resume(config, run)
    assert not any((run / name).is_symlink() for name in ("metrics.jsonl", "rejected.jsonl"))
    assert untouched(outside)


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "checkpoints", "config.toml"])
def test_a_link_to_nothing_makes_nothing_there(config: Config, run: Path, outside: Path, name: str) -> None:
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    else:
        (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "new")
    with pytest.raises(UserError):
        resume(config, run)
    assert untouched(outside)


def test_a_locks_target_stays_as_it_is(config: Config, run: Path, outside: Path) -> None:
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(outside / "precious")
    with pytest.raises(UserError, match=r"lock|link"):
        resume(config, run)
    assert untouched(outside)


def test_images_and_reports_replace_links(tmp_path: Path, outside: Path) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("painted.png", PAGE_NAME, "sheet.png"):
        (out / name).symlink_to(outside / "precious")
    write_image(out / "painted.png", image)
    report = Report("title", "about", {}, [Figure("sheet", "tag", image, "caption", "alt")])
    write_report(report, out, command="fastnst", inputs=[])
    assert untouched(outside)
    assert not any((out / name).is_symlink() for name in ("painted.png", PAGE_NAME, "sheet.png"))


@pytest.mark.parametrize(
    "change",
    [
        {"style.image": "/etc/passwd"},
        {"style.image": "/dev/zero"},
        {"data.folder": "/etc"},
        {"data.folder": "/dev"},
        {"loss.vgg": "/etc/passwd"},
        {"loss.vgg": "PAYLOAD"},
    ],
    ids=lambda change: "{}={}".format(*next(iter(change.items()))),
)
def test_a_configuration_that_points_elsewhere(run: Path, tmp_path: Path, change: dict[str, str]) -> None:
    payload, canary = tmp_path / "vgg.pth", tmp_path / "canary"
    torch.save({"features.0.weight": Call(os.system, f"touch {canary}")}, payload)
    change = {key: str(payload) if value == "PAYLOAD" else value for key, value in change.items()}
    (run / "config.toml").write_text(to_toml(load_config(file=run / "config.toml", options=change, environment={})))
    before = sorted(run.rglob("*"))
    pointed = load_config(file=run / "config.toml", environment={})
    with pytest.raises(UserError) as refused:
        resume(pointed, run)
    assert "root:" not in str(refused.value)
    assert len(str(refused.value)) < 2000
    assert not canary.exists()
    assert {path for path in run.rglob("*") if path.name != ".lock"} <= set(before)


def exchange(run: Path, name: str, data: bytes) -> None:
    """Other bytes in the newest checkpoint, which its manifest vouches for; and no other checkpoint."""
    newest = max((run / FOLDER).glob("step_*"))
    for path in (run / FOLDER).glob("step_*"):
        if path != newest:
            shutil.rmtree(path)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / name).write_bytes(data)
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _without_weights(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.conv1.weight"]


def _of_another_size(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.conv1.weight"] = torch.zeros(1)


def _of_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["rng.cpu"] = tensors["rng.cpu"].int()


def _not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.conv1.weight"].fill_(float("nan"))


def _no_random_state(tensors: dict[str, torch.Tensor]) -> None:
    tensors["rng.cpu"] = torch.full_like(tensors["rng.cpu"], 255)


@pytest.mark.parametrize("change", [_without_weights, _of_another_size, _of_integers, _not_finite, _no_random_state])
def test_a_checkpoint_of_other_tensors(
    config: Config, run: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    tensors = load((max((run / FOLDER).glob("step_*")) / TENSORS).read_bytes())
    change(tensors)
    exchange(run, TENSORS, save(tensors))
    with pytest.raises(UserError, match=r"step_00000002|model\.conv1\.weight"):
        resume(config, run)


@pytest.mark.parametrize(
    "change",
    [
        {"scaler": [1]},
        {"scaler": None},
        {"fingerprints": "x"},
        {"fingerprints": {"data": [1], "style": {"a": "b"}}},
        {"configuration": {"train.seed": [1], "\x1b[2J": 1}},
        {"images": "x"},
        {"world_size": {}},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_state(config: Config, run: Path, change: dict[str, Any]) -> None:
    state = json.loads((max((run / FOLDER).glob("step_*")) / STATE).read_text())
    exchange(run, STATE, json.dumps(state | change).encode())
    with pytest.raises(UserError):
        resume(config, run)


def test_the_unchanged_run_goes_on(config: Config, run: Path) -> None:
    exchange(run, STATE, (max((run / FOLDER).glob("step_*")) / STATE).read_bytes())
    resume(config, run)
    assert (run / FOLDER / "step_00000003").is_dir()
