"""Options of `fastnst visualize`: which are understood, and the message for each that is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastnst.visualize.commands.options import parse_activation, parse_maps

Fastnst = Callable[..., tuple[int, bytes, str]]


@pytest.mark.parametrize(
    ("text", "numbers", "strongest"),
    [
        ("0,5,17-20", (0, 5, 17, 18, 19, 20), None),
        (" 7 , 3-3,7 ", (7, 3), None),
        ("007", (7,), None),
        ("top:16", None, 16),
        ("all", None, None),
    ],
)
def test_parse_maps(text: str, numbers: tuple[int, ...] | None, strongest: int | None) -> None:
    choice = parse_maps(text)
    assert (choice.numbers, choice.strongest) == (numbers, strongest)
    strengths = torch.tensor([1.0, 3.0, 3.0, 2.0])
    if numbers is None:
        assert choice.of("conv1_1", strengths) == ([1, 2, 3, 0] if strongest else [0, 1, 2, 3])
        assert choice.count(4) == 4
    else:
        assert choice.count(4) == len(numbers)


@pytest.mark.parametrize("text", ["14,9", "(14, 9)", " 14 , 009"])
def test_parse_activation(text: str) -> None:
    assert parse_activation(text) == (14, 9)


def _tiny(folder: Path) -> Path:
    Image.new("RGB", (60, 40)).save(folder / "tiny.png")
    return folder / "tiny.png"


def _other_model(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _file(folder: Path) -> Path:
    (folder / "taken").write_text("x")
    return folder / "taken"


CONV1 = ("--layer", "conv1_1")
MAP = ("--target", "conv1_1:0")

# Arguments, made of the folder, a photo and a run; exit code; parts of the message.
BAD: dict[str, tuple[Callable[[Path, Path, Path], list[Any]], int, tuple[str, ...]]] = {
    "layer": (lambda _t, p, _r: ["deconvnet", p, "--layer", "conv3_5"], 2, ("'conv3_5'", "did you mean 'conv3_")),
    "no-layer": (lambda _t, p, _r: ["deconvnet", p], 2, ("--layer",)),
    "map": (lambda _t, p, _r: ["deconvnet", p, *CONV1, "--maps", "3,64"], 2, ("conv1_1 has no map 64", "0 … 63")),
    "maps-words": (lambda _t, p, _r: ["deconvnet", p, *CONV1, "--maps", "some"], 2, ("'some'", "top:16", "17-20")),
    "maps-range": (lambda _t, p, _r: ["deconvnet", p, *CONV1, "--maps", "9-2"], 2, ("9-2", "from low to high")),
    "maps-huge": (lambda _t, p, _r: ["deconvnet", p, *CONV1, "--maps", "0-999999"], 2, ("0-999999",)),
    "maps-empty": (lambda _t, p, _r: ["deconvnet", p, *CONV1, "--maps", ""], 2, ("--maps ''",)),
    "maps-top-0": (lambda _t, p, _r: ["deconvnet", p, *CONV1, "--maps", "top:0"], 2, ("top:0", "top:1")),
    "activation": (lambda _t, p, _r: ["deconvnet", p, *CONV1, "--activation", "1;2"], 2, ("'1;2'", "ROW,COL")),
    "position": (
        lambda _t, p, _r: ["deconvnet", p, *CONV1, "--activation", "3,64"],
        2,
        ("--activation 3,64", "conv1_1", "columns 0 … 63"),
    ),
    "size-below-field": (
        lambda _t, p, _r: ["deconvnet", p, "--layer", "conv4_4"],
        2,
        ("--size 64", "conv4_4", "116×116"),
    ),
    "size-huge": (lambda _t, p, _r: ["deconvnet", p, *CONV1, "--size", "100000"], 2, ("100000", "2048")),
    "image-below-field": (
        lambda t, _p, _r: ["deconvnet", _tiny(t), "--layer", "conv3_4"],
        3,
        ("tiny.png is 60 × 40 px", "conv3_4", "48 × 48 px"),
    ),
    "no-image": (lambda t, _p, _r: ["deconvnet", t / "none.jpg", *CONV1], 3, ("none.jpg", "check the path")),
    "folder-as-image": (lambda t, _p, _r: ["deconvnet", _empty(t), *CONV1], 3, ("empty", "give a")),
    "class-of-random-weights": (
        lambda _t, p, _r: ["saliency", p, "--target", "class:tabby"],
        3,
        ("random weights know no classes", "tabby", "--vgg auto", "layer:map"),
    ),
    "target-below-field": (
        lambda t, _p, _r: ["occlusion", _tiny(t), "--target", "relu3_4:1"],
        3,
        ("tiny.png is 60 × 40 px", "relu3_4"),
    ),
    "samples": (lambda _t, p, _r: ["saliency", p, *MAP, "--samples", 3], 2, ("--samples", "smoothgrad", "plain")),
    "patch": (lambda _t, p, _r: ["occlusion", p, *MAP, "--patch", 65], 2, ("65", "64")),
    "stride": (lambda _t, p, _r: ["occlusion", p, *MAP, "--stride", 33], 2, ("33", "32")),
    "empty-folder": (lambda t, _p, _r: ["top", _empty(t), *CONV1], 3, ("empty", "no images")),
    "file-as-folder": (lambda _t, p, _r: ["top", p, *CONV1], 3, ("photo", "folder")),
    "folder-of-tiny-images": (
        lambda t, _p, _r: ["top", _tiny(_empty(t)).parent, "--layer", "conv3_4"],
        3,
        ("tiny.png", "60 × 40 px", "48 px"),
    ),
    "top-fc": (lambda t, _p, _r: ["top", t, "--layer", "fc7"], 2, ("fc7", "whole image")),
    "count": (lambda t, _p, _r: ["top", t, *CONV1, "--count", 0], 2, ("--count 0",)),
    "loader": (lambda t, _p, _r: ["top", t, *CONV1, "--loader", "turbo"], 2, ("'turbo'", "pillow")),
    "weights": (lambda t, p, _r: ["deconvnet", p, *CONV1, "--vgg", t / "vgg.pth"], 3, ("vgg.pth",)),
    "no-cuda": (lambda _t, p, _r: ["deconvnet", p, *CONV1, "--device", "cuda"], 5, ("cuda", "--device cpu")),
    "no-such-device": (lambda _t, p, _r: ["deconvnet", p, *CONV1, "--device", "tpu"], 2, ("'tpu'",)),
    "out-is-a-file": (lambda t, p, _r: ["deconvnet", p, *CONV1, "--out", _file(t)], 2, ("taken", "folder")),
    "out-below-a-file": (lambda t, p, _r: ["deconvnet", p, *CONV1, "--out", _file(t) / "x"], 3, ("taken",)),
    "no-run": (lambda t, p, _r: ["deconvnet", p, *CONV1, "--run", t], 3, ("no run directory", "config.toml")),
    "model": (lambda t, p, _r: ["transform", t / "nothing", p], 3, ("nothing",)),
    "other-model": (lambda t, p, _r: ["transform", _other_model(t), p], 3, ("other.safetensors", "another kind")),
    "checkpoint": (lambda _t, p, r: ["transform", r, p, "--checkpoint", 15], 3, ("step 15", "checkpoints: 10, 20")),
    "checkpoint-of-a-file": (
        lambda _t, p, r: ["transform", r / "model.safetensors", p, "--checkpoint", 10],
        3,
        ("model.safetensors", "no run directory"),
    ),
    "transform-layer": (lambda _t, p, r: ["transform", r, p, "--layer", "res6"], 2, ("'res6'", "did you mean 'res")),
    "transform-map": (
        lambda _t, p, r: ["transform", r, p, "--layer", "out", "--maps", "0-3"],
        2,
        ("out has no map 3", "0 … 2"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_visualize_refuses_bad_input_with_one_message(
    fastnst: Fastnst, finished_run: Path, photo: Path, tmp_path: Path, name: str
) -> None:
    if name == "no-cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    arguments, expected, parts = BAD[name][0](tmp_path, photo, finished_run), *BAD[name][1:]
    defaults = {"--out": tmp_path / "out", "--device": "cpu", "--size": "64"}
    if arguments[0] != "transform":
        defaults["--vgg"] = "random"
    for option, value in defaults.items():
        if option not in arguments:
            arguments += [option, value]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = fastnst(*arguments)
    assert code == expected, err
    assert out == b""
    for part in parts:
        assert part in err
    assert "Traceback" not in err
    ignored = ("Usage:", "Try ", "VGG19: RANDOM", "check:")
    messages = [line for line in err.splitlines() if line.strip() and not line.startswith(ignored)]
    assert 1 <= len(messages) <= 2, err
    assert sorted(tmp_path.rglob("*")) == before
