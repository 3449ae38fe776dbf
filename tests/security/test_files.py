"""Hostile files through every public way in: no code runs, memory stays bounded, a short refusal comes soon.

`helpers.malformed_*` make them; `helpers.malformed_child` gives them in, in a
process of its own, whose peak of memory is measured for each.
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

from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import TransformNet
from helpers.malformed_files import (
    Hostile,
    hostile_checkpoints,
    hostile_configurations,
    hostile_npz,
    hostile_style_models,
    hostile_weights,
)
from helpers.malformed_images import hostile_images, largest_images

MOST_MIB = 1024
WAYS = {
    "vgg": {"load_vgg19", "visualize"},
    "style": {"load_style_model", "stylize"},
    "npz": {"load_lengstrom_npz"},
    "config": {"load_config", "train", "train --resume"},
    "checkpoint": {"latest_checkpoint", "visualize"},
    "image": {"read_image", "stylize", "data check"},
}


def give_in(files: Iterable[Hostile], folder: Path, canary: Path) -> list[dict[str, Any]]:
    """How each file fared, in a new process."""
    model, photo = folder / "model.safetensors", folder / "photo.png"
    save_style_model(model, TransformNet("johnson", generator=torch.Generator().manual_seed(0)), metadata={})
    from PIL import Image

    Image.new("RGB", (40, 40), "teal").save(photo)
    given = {"files": [(file.way, str(file.path)) for file in files], "canary": str(canary)}
    given |= {"folder": str(folder), "model": str(model), "photo": str(photo)}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.malformed_child"],
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
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Hostile], list[dict[str, Any]]]:
    """All files, and how they fared."""
    folder = tmp_path_factory.mktemp("hostile")
    canary = folder / "canary"
    files = [
        *hostile_weights(folder / "weights", canary),
        *hostile_style_models(folder / "styles"),
        *hostile_npz(folder / "npz", canary),
        *hostile_configurations(folder / "configurations"),
        *hostile_checkpoints(folder / "checkpoints"),
        *(Hostile("image", path, harmless) for path, harmless in hostile_images(folder / "images")),
    ]
    return files, give_in(files, folder, canary)


def problems(results: Iterable[dict[str, Any]], harmless: set[str]) -> list[str]:
    """What is wrong with how files fared, one line each."""
    found = []
    for result in results:
        name = f"{result['way']} {result['file']} through {result['through']}"
        if result["canary"]:
            found.append(f"{name}: a payload ran")
        if result["mib"] > MOST_MIB:
            found.append(f"{name}: took {result['mib']} MiB")
        if result["ended"] != "refused" and not (result["ended"] == "read" and result["file"] in harmless):
            found.append(f"{name}: {result['ended']} {result['message']}")
        if result["ended"] == "refused" and not 20 < len(result["message"]) < 4100:
            found.append(f"{name}: a message of {len(result['message'])} characters")
        if result["through"] in ("stylize", "visualize", "train") and "\x1b" in result["message"]:
            found.append(f"{name}: steers the terminal")
    return found


@pytest.mark.parametrize("way", WAYS)
def test_hostile_files_are_refused_shortly_and_cheaply(
    way: str, hostile: tuple[list[Hostile], list[dict[str, Any]]]
) -> None:
    files, results = hostile
    mine = [file for file in files if file.way == way]
    assert len(mine) >= 15
    given_in = {(result["file"], result["through"]) for result in results if result["way"] == way}
    assert {file.path.name for file in mine} == {name for name, _ in given_in}
    assert {through for _, through in given_in} == WAYS[way]
    harmless = {file.path.name for file in mine if file.harmless}
    assert problems([result for result in results if result["way"] == way], harmless) == []


def _largest(tmp_path: Path, *, all_modes: bool) -> list[str]:
    paths = largest_images(tmp_path / "large", all_modes=all_modes)
    results = give_in([Hostile("image", path) for path in paths], tmp_path, tmp_path / "canary")
    read = [result for result in results if result["through"] == "read_image"]
    assert {result["ended"] for result in read} == {"read"}
    return problems(read, {path.name for path in paths})


def test_the_largest_images_take_less_than_a_gibibyte(tmp_path: Path) -> None:
    assert _largest(tmp_path, all_modes=False) == []


@pytest.mark.campaign
def test_the_largest_images_of_all_modes_take_less_than_a_gibibyte(tmp_path: Path) -> None:
    """About a minute: `pytest -m campaign tests/security/test_files.py`."""
    assert _largest(tmp_path, all_modes=True) == []


def test_what_goes_wrong_is_found() -> None:
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


def test_a_header_that_no_model_needs_is_not_parsed(hostile: tuple[list[Hostile], list[dict[str, Any]]]) -> None:
    _, results = hostile
    told = [result["message"] for result in results if "metadata_bomb" in result["file"]]
    assert len(told) == 6
    assert [message for message in told if "longer than" not in message] == []
