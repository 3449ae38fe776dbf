"""Paths and names are checked before torch, whose import takes seconds, and before any work."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.visualize.attribution.folder_batches import LOADERS
from fastnst.visualize.attribution.occlusion import FILLS
from fastnst.visualize.attribution.saliency import METHODS

RUN_ALL = """
import contextlib, io, json, sys
from fastnst.cli.main import main

for words in json.load(sys.stdin):
    sys.argv, stderr, code = ["fastnst", *words], io.StringIO(), 0
    with contextlib.redirect_stderr(stderr):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, stderr.getvalue(), "torch" in sys.modules]), flush=True)
"""

TRAIN = "train --style {photo} --data {photos} --vgg random"
SEEN = "--out {new} --vgg random"
CASES = [
    # What is missing.
    (3, "stylize nomodel {photo} --out {new}", "there is no style model nomodel"),
    (3, "stylize {run} missing.jpg --out {new}", "cannot use missing.jpg as an image: no such file"),
    (3, "train --style missing.jpg --data {photos}", "missing.jpg as an image: no such file"),
    (3, "train --style {photo} --data missing", "missing does not exist; give a folder"),
    (3, "train --style {photo} --data {photos} --vgg missing.pth", "cannot read the VGG19 weights"),
    (2, "train --style {photo} --data {photos} --config missing.toml", "cannot read the configuration missing.toml"),
    (2, "train --resume --out missing", "missing holds no run to resume"),
    (3, "train --style {photo} --data missing --dry-run", "missing does not exist"),
    (3, "visualize deconvnet missing.jpg --layer relu3_4 " + SEEN, "cannot use missing.jpg"),
    (3, "visualize deconvnet {photo} --layer relu3_4 --out {new} --vgg missing.pth", "cannot read the VGG19 weights"),
    (3, "visualize deconvnet {photo} --layer relu3_4 --run missing " + SEEN, "missing is no run directory"),
    (3, "visualize top missing --layer relu3_4 " + SEEN, "missing does not exist"),
    (3, "visualize transform missing {photo} --out {new}", "there is no style model missing"),
    (3, "tensorboard missing", "missing holds no TensorBoard log"),
    (3, "data check missing", "missing does not exist"),
    (3, "data cache missing", "missing does not exist"),
    (3, "demo --out {new} --vgg missing.pth", "cannot read the VGG19 weights"),
    # What is of another kind.
    (3, "stylize {photo} {photo} --out {new}", "is a JPEG, not a style model; the model comes first"),
    (3, "stylize {weights} {photo} --out {new}", "is a zip file of torch.save, not a style model"),
    (3, "stylize {photos} {photo} --out {new}", "holds no model.safetensors"),
    (3, "stylize {run} {weights} --out {new}", "is a zip file of torch.save, not an image"),
    (3, "train --style {weights} --data {photos}", "is a zip file of torch.save, not an image"),
    (3, "train --style {photos} --data {photos}", "is a folder; give one image with --style"),
    (3, "train --style {photo} --data {photo}", "is a JPEG, and not a folder; give a folder of images"),
    (3, "train --style {photo} --data {zip}", "is a zip archive, and not a folder; unpack it"),
    (3, "train --style {photo} --data {video}", "is an MP4 video, and not a folder; save its frames"),
    (3, "train --style {photo} --data {photos} --vgg {photo}", "is a JPEG, and --vgg takes the weights"),
    (3, "train --style {photo} --data {photos} --vgg {mat}", "is a MATLAB file, and "),
    (2, "train --style {photo} --data {photos} --config {photo}", "photo.jpg"),
    (3, "visualize saliency {weights} --target relu3_4:1 " + SEEN, "is a zip file of torch.save, not an image"),
    (3, "visualize top {zip} --layer relu3_4 " + SEEN, "is a zip archive, and not a folder"),
    (3, "visualize top {cache} --layer relu3_4 " + SEEN, "is a cache of training crops; give the folder"),
    (3, "data cache {cache}", "is a cache already"),
    (3, "visualize transform {mat} {photo} --out {new}", "is a MATLAB file, not a style model"),
    (3, "data check {zip}", "is a zip archive, and not a folder; unpack it"),
    (3, "data cache {video}", "is an MP4 video, and not a folder"),
    # What is in the way.
    (3, TRAIN + " --out {photo}", "a part of the path is a file"),
    (2, TRAIN + " --out {photos}", "is not empty"),
    (2, "visualize deconvnet {photo} --layer relu3_4 --out {photo} --vgg random", "is a file, and a folder is needed"),
    (3, "data cache {photos} --out {photos}", "which is no part of a cache"),
    (2, "demo --out {photos}", "is not empty"),
    # Mistyped names.
    (2, TRAIN + " --preset jonson", "did you mean 'johnson'?"),
    (2, TRAIN + " --set train.stepz=3", "did you mean 'train.steps'?"),
    (2, TRAIN + " --set loss.style_layers=relu9_9", "did you mean "),
    (2, TRAIN + " --stlye {photo}", "--style"),
    (2, "data cache {photos} --preset jonson", "did you mean 'johnson'?"),
    (2, "visualize deconvnet {photo} --layer relu9_9 " + SEEN, "no VGG19 layer is named 'relu9_9'; did you mean"),
    (2, "visualize deconvnet {photo} --layer relu3_4 --maps 300 " + SEEN, "relu3_4 has no map 300"),
    (2, "visualize top {photos} --layer relu3_9 " + SEEN, "did you mean 'relu3_4'?"),
    (2, "visualize top {photos} --layer relu3_4 --loader pilow " + SEEN, "'dali', 'pillow'"),
    (2, "visualize saliency {photo} --target class:catt " + SEEN, "'tabby cat' (class:281), 'tiger cat' (class:282)"),
    (2, "visualize saliency {photo} --target relu3_4:1 --method guidd " + SEEN, "'guided'"),
    (2, "visualize occlusion {photo} --target relu3_4:999 " + SEEN, "relu3_4 has no map 999"),
    (3, "visualize occlusion {photo} --target class:tabby " + SEEN, "random weights know no classes"),
    (2, "visualize transform {run} {photo} --layer ress3 --out {new}", "did you mean 'res3'?"),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    names = ("photo.jpg", "photos", "run", "weights.pth", "train2017.zip", "clip.mp4", "imagenet-vgg-verydeep-19.mat")
    paths = dict(
        zip(("photo", "photos", "run", "weights", "zip", "video", "mat"), map(folder.joinpath, names), strict=True)
    )
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(paths["photo"])
    paths["photos"].mkdir()
    Image.linear_gradient("L").save(paths["photos"] / "a.png")
    save_style_model(paths["run"] / "model.safetensors", TransformNet("johnson"), metadata={})
    torch.save({"conv1.weight": torch.zeros(3)}, paths["weights"])
    paths["zip"].write_bytes(b"PK\3\4" + bytes(22) + b"\x0f\0\0\0train2017/a.jpg")
    paths["video"].write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
    paths["mat"].write_bytes(b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + bytes(200))
    (folder / "coco-256").mkdir()
    (folder / "coco-256" / "manifest.json").write_text('{\n"kind": "fastnst cache"\n}')
    return paths | {"new": folder / "new", "cache": folder / "coco-256"}


@pytest.fixture(scope="module")
def outcomes(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, bool]]:
    """Exit code, stderr and whether torch was imported, of all cases in one fresh process."""
    commands = [command.format(**files).split() for _, command, _ in CASES]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        cwd=tmp_path_factory.mktemp("here"),
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[command for _, command, _ in CASES])
def test_wrong_path_or_name_shows_before_torch_is_imported(
    index: int, outcomes: list[tuple[int, str, bool]], files: dict[str, Path]
) -> None:
    code, message, has_torch = outcomes[index]
    wanted, command, text = CASES[index]
    assert text in message
    assert (code, has_torch) == (wanted, False), message
    assert "Traceback" not in message
    own = [line for line in message.splitlines() if line and not line.startswith(("Usage:", "Try "))]
    assert len(own) == 1, message
    assert not files["new"].exists(), command


def test_choices_of_options_are_those_of_the_commands() -> None:
    from fastnst.cli.visualize import occlusion, saliency, top

    for command, name, choices in ((saliency, "method", METHODS), (occlusion, "fill", FILLS), (top, "loader", LOADERS)):
        (option,) = [each for each in command.params if each.name == name]
        assert sorted(option.type.choices) == sorted(choices)
