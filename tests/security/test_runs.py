"""Prepared run directories: links that lead out, foreign configurations and checkpoints."""

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
from fastnst.storage import ForeignFileError
from fastnst.training.run_dir.checkpoint import FOLDER, STATE, TENSORS
from fastnst.training.train import train
from fastnst.visualize.sheets.page import Figure
from fastnst.visualize.sheets.report import PAGE_NAME, Report, write_report
from helpers.malformed.files import Call


@pytest.fixture(scope="module")
def config(generated_photos: Path) -> Config:
    """A run of two tiny steps."""
    small = ("data.image_size=32", "train.batch_size=1", "data.workers=1", "data.loader=pillow", "train.steps=2")
    small += ("train.checkpoint_every=1", "train.samples=1", "visualize.every=0", "style.size=32", "train.device=cpu")
    options = {"data.folder": generated_photos, "style.image": generated_photos / "image_00.jpg"}
    return load_config(preset="vgg-conv3", assignments=small, options=options | {"loss.vgg": "random"}, environment={})


@pytest.fixture(scope="module")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run of `config`."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(config, out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder outside the run, with files that it must not touch."""
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


def test_train_replaces_links_and_not_their_targets(config: Config, run: Path, outside: Path) -> None:
    for name in ("metrics.jsonl", "rejected.jsonl", "model.safetensors"):
        (run / name).unlink()
        (run / name).symlink_to(outside / "precious")
    (run / FOLDER / ".step_00000003.part").symlink_to(outside / "inner")
    (run / FOLDER / "step_00000009").symlink_to(outside / "inner")
    # A link in a checkpoint's place may end the run; it must not be followed.
    with contextlib.suppress(DataError):
        resume(config, run)
    assert not any((run / name).is_symlink() for name in ("metrics.jsonl", "rejected.jsonl"))
    assert untouched(outside)


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "checkpoints", "config.toml"])
def test_train_creates_nothing_through_a_dangling_link(config: Config, run: Path, outside: Path, name: str) -> None:
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    else:
        (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "new")
    with pytest.raises(UserError):
        resume(config, run)
    assert untouched(outside)


def test_train_keeps_the_target_of_a_linked_lock(config: Config, run: Path, outside: Path) -> None:
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(outside / "precious")
    with pytest.raises(UserError, match=r"lock|link"):
        resume(config, run)
    assert untouched(outside)


def test_write_image_and_write_report_never_follow_links(tmp_path: Path, outside: Path) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("stylized.png", PAGE_NAME, "sheet.png"):
        (out / name).symlink_to(outside / "precious")
    report = Report("title", "about", {}, [Figure("sheet", "tag", image, "caption", "alt")])
    for write in (
        lambda **options: write_image(out / "stylized.png", image, **options),
        lambda **options: write_report(report, out, command="fastnst", inputs=[], **options),
    ):
        with pytest.raises(ForeignFileError):
            write()
        write(overwrite=True)
    assert untouched(outside)
    assert not any((out / name).is_symlink() for name in ("stylized.png", PAGE_NAME, "sheet.png"))


ELSEWHERE = [
    *({"style.image": "/etc/passwd"}, {"style.image": "/dev/zero"}, {"data.folder": "/etc"}, {"data.folder": "/dev"}),
    *({"loss.vgg": "/etc/passwd"}, {"loss.vgg": "PAYLOAD"}),
]


@pytest.mark.parametrize("change", ELSEWHERE, ids=lambda change: "{}={}".format(*next(iter(change.items()))))
def test_train_resume_with_paths_that_point_elsewhere(run: Path, tmp_path: Path, change: dict[str, str]) -> None:
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
    """Replace a file of the newest checkpoint and its manifest entry; delete other checkpoints."""
    newest = max((run / FOLDER).glob("step_*"))
    for path in (run / FOLDER).glob("step_*"):
        if path != newest:
            shutil.rmtree(path)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / name).write_bytes(data)
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("model.conv1.weight"),
        lambda tensors: tensors.update({"model.conv1.weight": torch.zeros(1)}),
        lambda tensors: tensors["model.conv1.weight"].fill_(float("nan")),
        lambda tensors: tensors.update({"rng.cpu": tensors["rng.cpu"].int()}),
        lambda tensors: tensors["rng.cpu"].fill_(255),
    ],
    ids=["without_weights", "other_size", "not_finite", "integers", "no_random_state"],
)
def test_train_resume_refuses_a_checkpoint_with_wrong_tensors(
    config: Config, run: Path, change: Callable[[dict[str, torch.Tensor]], object]
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
        {"pictures": "x"},
        {"world_size": {}},
    ],
    ids=str,
)
def test_train_resume_refuses_a_checkpoint_with_wrong_state(config: Config, run: Path, change: dict[str, Any]) -> None:
    state = json.loads((max((run / FOLDER).glob("step_*")) / STATE).read_text())
    exchange(run, STATE, json.dumps(state | change).encode())
    with pytest.raises(UserError):
        resume(config, run)


def test_train_resume_of_the_unchanged_run(config: Config, run: Path) -> None:
    exchange(run, STATE, (max((run / FOLDER).glob("step_*")) / STATE).read_bytes())
    resume(config, run)
    assert (run / FOLDER / "step_00000003").is_dir()
