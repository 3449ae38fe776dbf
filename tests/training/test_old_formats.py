"""Files of fastnst 0.1.0 are resumed, loaded and stylized with: configurations, runs, checkpoints, models, caches."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnst import config_text
from fastnst.config import load_config
from fastnst.models.style_model import read_style_metadata
from fastnst.run_log.writer import read_metrics
from helpers import old_formats
from helpers.crash_points import InThisProcess

Fastnst = Callable[..., tuple[int, str, str]]
Inputs = tuple[Path, Path, Path]
"""Folders of photos and styles, and the file of VGG19's weights."""


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    config_text._warn_once.cache_clear()


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.setattr("fastnst.data.loaders.pillow.ProcessPoolExecutor", InThisProcess)
    torch.manual_seed(0)
    return old_formats.write_inputs(tmp_path)


@pytest.mark.parametrize("source", ["file", "environment", "--set"])
def test_load_config_reads_old_keys_and_names_the_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    file = tmp_path / "old.toml"
    file.write_text('[style]\npicture = "wave.png"\n[visualize]\npictures = 3\nmax_percent = 5.0\n')
    variables = {"STYLE__PICTURE": "wave.png", "VISUALIZE__PICTURES": "3", "VISUALIZE__MAX_PERCENT": "5"}
    config = load_config(
        file=file if source == "file" else None,
        environment={f"FASTNST_{key}": value for key, value in variables.items()} if source == "environment" else {},
        assignments=("style.picture=wave.png", "visualize.pictures=3", "visualize.max_percent=5")
        if source == "--set"
        else (),
    )
    assert (config.style.image, config.visualize.images) == (Path("wave.png"), 3)
    where = {"file": str(file), "environment": "the environment", "--set": "the command line"}[source]
    assert f"{where}: style.picture is now named style.image; the old name still works" in caplog.messages
    assert f"{where}: visualize.pictures is now named visualize.images; the old name still works" in caplog.messages
    assert any(text.startswith(f"{where}: visualize.max_percent no longer does any") for text in caplog.messages)
    assert len(caplog.messages) == 3


def assert_resumed(run: Path) -> None:
    """Steps 1 and 2 are the old ones, and step 3 was made."""
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss/total"] for row in rows[:2]] == [1274.5, 937.25]
    assert read_style_metadata(run)["steps"] == "3"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    failed = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()][-1]
    assert (failed["path"], failed["step"]) == (old_formats.GONE, 2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_resume_continues_a_run(inputs: Inputs, tmp_path: Path, fastnst: Fastnst, precision: str) -> None:
    photos, styles, vgg = inputs
    old_formats.write_run(tmp_path / "run", photos, styles / "wave.png", vgg, precision)
    code, _, said = fastnst("train", "--resume", "--out", tmp_path / "run")
    assert code == 0, said
    assert "resuming at step 2" in said
    assert "goes on, though" not in said
    assert_resumed(tmp_path / "run")
    if precision == "fp16":
        assert "fp16: 7 of 3 steps skipped" in said
        assert "the loss scale is now 0.000976562" in said
    assert "picture" not in (tmp_path / "run" / "config.toml").read_text().replace(str(tmp_path), "")


def test_train_resume_names_what_changed_in_a_run(inputs: Inputs, tmp_path: Path, fastnst: Fastnst) -> None:
    """Old names of the checkpoint's configuration do not hide a change, nor make one."""
    photos, styles, vgg = inputs
    old_formats.write_run(tmp_path / "run", photos, styles / "wave.png", vgg)
    (photos / "image_01.png").unlink()
    code, _, said = fastnst("train", "--resume", "--out", tmp_path / "run")
    assert code == 3
    assert "the images in the data folder changed since the checkpoint was written (4 images, SHA-256" in said
    assert "style." not in said.partition("trained otherwise")[2]


def test_train_resume_continues_a_folder_of_styles(inputs: Inputs, tmp_path: Path, fastnst: Fastnst) -> None:
    old_formats.write_style_folder(tmp_path / "runs", *inputs)
    code, _, said = fastnst("train", "--resume", "--out", tmp_path / "runs")
    assert code == 0, said
    assert "resuming at step 2: 2 styles" in said
    for name in ("wave", "storm"):
        assert_resumed(tmp_path / "runs" / name)


def test_train_reads_a_cache(inputs: Inputs, tmp_path: Path, fastnst: Fastnst) -> None:
    from fastnst.data.cache.format import as_manifest, read_cache
    from fastnst.data.loaders import open_loader
    from fastnst.data.sampler import Sampler

    photos, _, _ = inputs
    images = old_formats.write_cache(tmp_path / "cached", photos)
    assert fastnst("data", "check", tmp_path / "cached")[0] == 0
    manifest = as_manifest(read_cache(tmp_path / "cached"))
    config = load_config(assignments=["data.image_size=16", "data.fit=random_crop"], environment={}).data
    order = Sampler(0, len(images), 1, 3, fit="random_crop", flip=False)
    with open_loader(manifest, order, config, device=torch.device("cpu")) as loader:
        read = [int(batch.unique()) for batch in loader]
    assert sorted(read) == sorted(int(np.unique(image)[0]) for image in images)


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("architecture", ["hwalsuklee", "lengstrom", "johnson"])
def test_stylize_takes_a_style_model(tmp_path: Path, fastnst: Fastnst, architecture: str, norm: str) -> None:
    old_formats.write_style_model(tmp_path / "model.safetensors", architecture, norm)
    Image.new("RGB", (24, 20), (200, 90, 30)).save(tmp_path / "photo.png")
    out = tmp_path / "out.png"
    files = (tmp_path / "model.safetensors", tmp_path / "photo.png")
    code, _, said = fastnst("stylize", *files, "--out", out, "--device", "cpu")
    assert code == 0, said
    with Image.open(out) as image:
        assert image.size == (24, 20)


def test_visualize_transform_loads_a_checkpoint(inputs: Inputs, tmp_path: Path, fastnst: Fastnst) -> None:
    photos, styles, vgg = inputs
    old_formats.write_run(tmp_path / "run", photos, styles / "wave.png", vgg)
    code, printed, said = fastnst(
        *("visualize", "transform", tmp_path / "run", photos / "image_00.png", "--checkpoint", "2"),
        *("--layer", "conv1", "--device", "cpu", "--out", tmp_path / "seen"),
    )
    assert code == 0, said
    assert printed.splitlines()
