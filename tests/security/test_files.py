"""Malformed files through every public entry point: no code runs, memory stays bounded, errors are short and quick.

`helpers.malformed` make the files; `helpers.malformed.child` loads each in one child process and measures it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import TransformNet
from helpers.malformed.files import (
    Malformed,
    malformed_checkpoints,
    malformed_configurations,
    malformed_npz,
    malformed_style_models,
    malformed_weights,
)
from helpers.malformed.images import largest_images, malformed_images

MAX_MIB = 1024
ENTRY_POINTS = {
    "vgg": {"load_vgg19", "visualize"},
    "style": {"load_style_model", "stylize"},
    "npz": {"load_lengstrom_npz"},
    "config": {"load_config", "train", "train --resume"},
    "checkpoint": {"latest_checkpoint", "visualize"},
    "image": {"read_image", "stylize", "data check"},
}
Results = list[dict[str, Any]]


def load_in_child(files: Iterable[Malformed], folder: Path, canary: Path) -> Results:
    """Load each file through its entry points in a new process; return one result per file and entry point."""
    model, photo = folder / "model.safetensors", folder / "photo.png"
    save_style_model(model, TransformNet("johnson", generator=torch.Generator().manual_seed(0)), metadata={})
    Image.new("RGB", (40, 40), "teal").save(photo)
    given = {"files": [(file.way, str(file.path)) for file in files], "canary": str(canary)}
    given |= {"folder": str(folder), "model": str(model), "photo": str(photo)}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.malformed.child"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()[1:]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Malformed], Results]:
    """All files, and the results of loading them."""
    folder = tmp_path_factory.mktemp("malformed")
    canary = folder / "canary"
    files = [
        *(Malformed("large", path, harmless=True) for path in largest_images(folder / "large", all_modes=False)),
        *malformed_weights(folder / "weights", canary),
        *malformed_style_models(folder / "styles"),
        *malformed_npz(folder / "npz", canary),
        *malformed_configurations(folder / "configurations"),
        *malformed_checkpoints(folder / "checkpoints"),
        *(Malformed("image", path, harmless) for path, harmless in malformed_images(folder / "images")),
    ]
    return files, load_in_child(files, folder, canary)


def problems(results: Iterable[dict[str, Any]], harmless: set[str]) -> list[str]:
    """Return one line per result that breaks a rule; files in `harmless` may load."""
    found = []
    for result in results:
        name = f"{result['way']} {result['file']} through {result['through']}"
        if result["canary"]:
            found.append(f"{name}: a payload ran")
        if result["mib"] > MAX_MIB:
            found.append(f"{name}: took {result['mib']} MiB")
        if result["ended"] != "refused" and not (result["ended"] == "read" and result["file"] in harmless):
            found.append(f"{name}: {result['ended']} {result['message']}")
        if result["ended"] == "refused" and not 20 < len(result["message"]) < 4100:
            found.append(f"{name}: a message of {len(result['message'])} characters")
        if result["through"] in ("stylize", "visualize", "train") and "\x1b" in result["message"]:
            found.append(f"{name}: prints escape codes")
    return found


@pytest.mark.parametrize("way", ENTRY_POINTS)
def test_malformed_files_are_refused(way: str, loaded: tuple[list[Malformed], Results]) -> None:
    files, results = loaded
    mine = [file for file in files if file.way == way]
    assert len(mine) >= 15
    given = {(result["file"], result["through"]) for result in results if result["way"] == way}
    assert {file.path.name for file in mine} == {name for name, _ in given}
    assert {through for _, through in given} == ENTRY_POINTS[way]
    harmless = {file.path.name for file in mine if file.harmless}
    assert problems([result for result in results if result["way"] == way], harmless) == []


def test_largest_images_need_less_than_a_gibibyte(loaded: tuple[list[Malformed], Results]) -> None:
    results = [result for result in loaded[1] if result["way"] == "large"]
    assert {result["ended"] for result in results} == {"read"}
    assert problems(results, {result["file"] for result in results}) == []


@pytest.mark.campaign
def test_largest_images_of_all_modes_need_less_than_a_gibibyte(tmp_path: Path) -> None:
    """About a minute: `pytest -m campaign tests/security/test_files.py`."""
    paths = largest_images(tmp_path / "large", all_modes=True)
    results = load_in_child([Malformed("large", path) for path in paths], tmp_path, tmp_path / "canary")
    assert {result["ended"] for result in results} == {"read"}
    assert problems(results, {path.name for path in paths}) == []


def test_problems_finds_each_fault() -> None:
    fine = {"way": "vgg", "file": "a", "through": "visualize", "canary": False, "mib": 1, "ended": "refused"}
    fine["message"] = "a message that says what is wrong"
    assert problems([fine], set()) == []
    changes: list[dict[str, Any]] = [
        {"canary": True},
        {"mib": 1025},
        {"ended": "read", "message": ""},
        {"ended": "raised", "message": "Traceback"},
        {"ended": "took too long"},
        {"message": "x" * 5000},
        {"message": ""},
        {"message": "a message with \x1b[2J in it, to clear the screen"},
    ]
    for change in changes:
        assert len(problems([fine | change], set())) == 1, change


def test_huge_safetensors_headers_are_not_parsed(loaded: tuple[list[Malformed], Results]) -> None:
    _, results = loaded
    messages = [result["message"] for result in results if "metadata_bomb" in result["file"]]
    assert len(messages) == 6
    assert [message for message in messages if "longer than" not in message] == []
