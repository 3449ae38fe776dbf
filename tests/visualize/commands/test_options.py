"""Options of `fastnst visualize`: which are understood, and the message for each that is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastnst.visualize.commands.options import parse_activation, parse_maps

Fastnst = Callable[..., tuple[int, bytes, str]]


@pytest.mark.parametrize(
    ("text", "numbers", "strongest"),
    [
        ("0,5,17-20", (0, 5, 17, 18, 19, 20), None),
        (" 7 , 3-3,007 ", (7, 3), None),
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


# Command line, where capitals stand for paths and options; exit code; parts of the message.
BAD: list[tuple[str, int, tuple[str, ...]]] = [
    ("deconvnet PHOTO --layer conv3_5", 2, ("'conv3_5'", "did you mean 'conv3_")),
    ("deconvnet PHOTO", 2, ("--layer",)),
    ("deconvnet PHOTO CONV1 --maps 3,64", 2, ("conv1_1 has no map 64", "0 … 63")),
    ("deconvnet PHOTO CONV1 --maps some", 2, ("'some'", "top:16", "17-20")),
    ("deconvnet PHOTO CONV1 --maps 9-2", 2, ("9-2", "from low to high")),
    ("deconvnet PHOTO CONV1 --maps 0-999999", 2, ("0-999999",)),
    ("deconvnet PHOTO CONV1 --maps=", 2, ("--maps ''",)),
    ("deconvnet PHOTO CONV1 --maps top:0", 2, ("top:0", "top:1")),
    ("deconvnet PHOTO CONV1 --activation 1;2", 2, ("'1;2'", "ROW,COL")),
    ("deconvnet PHOTO CONV1 --activation 3,64", 2, ("--activation 3,64", "conv1_1", "columns 0 … 63")),
    ("deconvnet PHOTO --layer conv4_4", 2, ("size of 64 px", "conv4_4", "116 px")),
    ("deconvnet PHOTO CONV1 --size 100000", 2, ("100000", "2048")),
    ("deconvnet TINY/tiny.png --layer conv3_4", 3, ("tiny.png is 60 × 40 px", "conv3_4", "48 × 48 px")),
    ("deconvnet EMPTY/none.jpg CONV1", 3, ("none.jpg", "check the path")),
    ("deconvnet EMPTY CONV1", 3, ("empty", "give a")),
    ("deconvnet PHOTO CONV1 --vgg EMPTY/vgg.pth", 3, ("vgg.pth",)),
    ("deconvnet PHOTO CONV1 --device cuda", 5, ("cuda", "--device cpu")),
    ("deconvnet PHOTO CONV1 --device tpu", 2, ("'tpu'",)),
    ("deconvnet PHOTO CONV1 --out TINY/tiny.png", 2, ("tiny.png", "folder")),
    ("deconvnet PHOTO CONV1 --out TINY/tiny.png/x", 3, ("tiny.png",)),
    ("deconvnet PHOTO CONV1 --run EMPTY", 3, ("no run directory", "config.toml")),
    ("saliency PHOTO --target class:tabby", 3, ("random weights know no classes", "tabby", "--vgg auto", "layer:map")),
    ("saliency PHOTO MAP --samples 3", 2, ("--samples", "smoothgrad", "plain")),
    ("occlusion TINY/tiny.png --target relu3_4:1", 3, ("tiny.png is 60 × 40 px", "relu3_4")),
    ("occlusion PHOTO MAP --patch 65", 2, ("65", "64")),
    ("occlusion PHOTO MAP --stride 33", 2, ("33", "32")),
    ("top EMPTY CONV1", 3, ("empty", "no images")),
    ("top PHOTO CONV1", 3, ("photo", "folder")),
    ("top TINY --layer conv3_4", 3, ("tiny.png", "60 × 40 px", "48 px")),
    ("top EMPTY --layer fc7", 2, ("fc7", "whole image")),
    ("top EMPTY CONV1 --count 0", 2, ("--count is 0",)),
    ("top EMPTY CONV1 --loader turbo", 2, ("'turbo'", "pillow")),
    ("transform EMPTY/nothing PHOTO", 3, ("nothing",)),
    ("transform TINY/other.safetensors PHOTO", 3, ("other.safetensors", "another kind")),
    ("transform RUN PHOTO --checkpoint 15", 3, ("step 15", "checkpoints: 10, 20")),
    ("transform RUN/model.safetensors PHOTO --checkpoint 10", 3, ("model.safetensors", "no run directory")),
    ("transform RUN PHOTO --layer res6", 2, ("'res6'", "did you mean 'res")),
    ("transform RUN PHOTO --layer out --maps 0-3", 2, ("out has no map 3", "0 … 2")),
]


@pytest.mark.parametrize(("line", "expected", "parts"), BAD, ids=[line for line, *_ in BAD])
def test_visualize_refuses_bad_input_with_one_message(
    fastnst: Fastnst, finished_run: Path, photo: Path, tmp_path: Path, line: str, expected: int, parts: tuple[str, ...]
) -> None:
    if line.endswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for name in ("tiny", "empty"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "tiny" / "tiny.png")
    save_file({"weight": torch.zeros(2)}, tmp_path / "tiny" / "other.safetensors")
    places = {"PHOTO": photo, "TINY": tmp_path / "tiny", "EMPTY": tmp_path / "empty", "RUN": finished_run}
    for word, value in {**places, "CONV1": "--layer conv1_1", "MAP": "--target conv1_1:0"}.items():
        line = line.replace(word, str(value))
    defaults = {"--out": str(tmp_path / "out"), "--device": "cpu", "--size": "64", "--vgg": "random"}
    arguments = line.split()
    for option, value in defaults.items():
        if option not in arguments and not (option == "--vgg" and arguments[0] == "transform"):
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
