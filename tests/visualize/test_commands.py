"""`fastnst visualize …` as a user meets it: five commands from start to end, and what they say about bad input."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_page import Page

from fastnst.config import load_config, to_toml
from fastnst.errors import DataError
from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.models.weights import load_vgg19
from fastnst.training.run_dir.checkpoint import save_checkpoint
from fastnst.training.run_dir.load_net import load_checkpoint_net, steps_of_run
from fastnst.visualize.commands import heat_maps, top
from fastnst.visualize.commands.options import columns_for, parse_activation, parse_maps, read_crops
from helpers.run_command import exit_code_of

Fastnst = Callable[..., tuple[int, bytes, str]]
SMALL = ("--vgg", "random", "--device", "cpu", "--size", "64")


@pytest.fixture
def fastnst(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Fastnst:
    """Run `fastnst visualize` in this process; returns its exit code, stdout as bytes, and stderr."""

    def run(*arguments: object) -> tuple[int, bytes, str]:
        code = exit_code_of(monkeypatch, "visualize", *arguments)
        output = capfdbinary.readouterr()
        return code, output.out, output.err.decode()

    return run


@pytest.fixture
def photo(tmp_path: Path, generated_photos: Path) -> Path:
    """An image of more than 64 × 64 px."""
    for source in sorted(generated_photos.iterdir()):
        with Image.open(source) as image:
            if min(image.size) >= 64:
                return Path(shutil.copy(source, tmp_path / f"photo{source.suffix}"))
    raise AssertionError("all images are small")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a style model of 30 steps and checkpoints of steps 10 and 20."""
    run = tmp_path_factory.mktemp("runs") / "wave"
    run.mkdir()
    config = load_config(preset="johnson", environment={})
    (run / "config.toml").write_text(to_toml(config), "utf-8")
    for step in (10, 20, 30):
        net = TransformNet("johnson", generator=torch.Generator().manual_seed(step))
        tensors = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
        tensors["optimizer.exp_avg.conv1.weight"] = torch.zeros_like(net.conv1.weight)
        if step < 30:
            save_checkpoint(run, step, tensors=tensors, state={}, keep=5)
    save_style_model(run / "model.safetensors", net, metadata={"steps": "30"})
    return run


def check_output(out: Path, printed: bytes) -> tuple[Page, set[str]]:
    """What every command leaves: the page first, its links, and no more; PNGs that open."""
    paths = [Path(os.fsdecode(line)) for line in printed.splitlines()]
    assert paths[0] == out / "index.html"
    names = {path.name for path in paths}
    assert {path.name for path in out.iterdir()} == names
    page = Page(paths[0].read_bytes())
    assert {os.fsdecode(name) for name in page.files} == names - {"index.html"}
    for name in names:
        if name.endswith(".png"):
            with Image.open(out / name) as image:
                assert image.mode == "RGB"
                image.load()
    return page, names - {"index.html"}


# The five commands.


def test_deconvnet(fastnst: Fastnst, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    layers = ("--layer", "conv2_1", "--layer", "relu1_1", "--layer", "conv2_1")
    code, printed, err = fastnst("deconvnet", photo, *layers, "--maps", "3,0-4", "--out", out, *SMALL)
    assert code == 0, err
    page, names = check_output(out, printed)
    stem = photo.stem
    sheets = {f"{stem}-{what}" for what in ("layers", "relu1_1", "relu1_1-close", "conv2_1", "conv2_1-close")}
    assert names == {f"{sheet}.png" for sheet in sheets}
    assert page.images[0]["src"] == f"./{stem}-layers.png"
    text = " ".join(page.text)
    for words in ("relu1_1, conv2_1", "3,0-4", "strongest", "64 × 64 px", "random, torchvision flavour", "grey = 0"):
        assert words in text
    assert f"fastnst visualize deconvnet {photo} --layer conv2_1" in text
    assert "maps 3, 0, 1, 2, 4" in text
    assert "RANDOM weights" in err


@pytest.mark.parametrize("activation", ["all", "5,60"])
def test_deconvnet_of_other_activations(fastnst: Fastnst, photo: Path, tmp_path: Path, activation: str) -> None:
    out = tmp_path / "out"
    arguments = ("--layer", "relu1_2", "--activation", activation, "--maps", "top:2", "--out", out)
    code, printed, err = fastnst("deconvnet", photo, *arguments, *SMALL)
    assert code == 0, err
    page, names = check_output(out, printed)
    close = set() if activation == "all" else {f"{photo.stem}-relu1_2-close.png"}
    assert names == {f"{photo.stem}-relu1_2.png", *close}
    assert {"all": "all activations of each map", "5,60": "row 5, column 60"}[activation] in " ".join(page.text)


def test_many_maps_are_spread_over_sheets(fastnst: Fastnst, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--layer", "conv1_1", "--activation", "all", "--maps", "all", "--out", out)
    code, printed, err = fastnst("deconvnet", photo, *arguments, *SMALL)
    assert code == 0, err
    page, names = check_output(out, printed)
    assert names == {f"{photo.stem}-conv1_1-{part}.png" for part in (1, 2)}
    scales = {text.split("±")[1].split(",")[0] for text in page.text if "±" in text}
    assert len(scales) == 1, "one scale for all maps of a layer"


def test_transform(fastnst: Fastnst, finished_run: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, err = fastnst("transform", finished_run, photo, "--out", out, "--size", 32, "--device", "cpu")
    assert code == 0, err
    page, names = check_output(out, printed)
    assert names == {f"{photo.stem}-layers.png"}
    with Image.open(out / f"{photo.stem}-layers.png") as strip:
        assert strip.width > 13 * 96, "photo, eleven layers, painting"
    text = " ".join(page.text)
    assert f"{finished_run}: johnson, instance norm" in text
    assert "conv1, conv2, conv3, res1, res2, res3, res4, res5, up1, up2, out" in text


def test_transform_at_a_checkpoint_with_single_maps(
    fastnst: Fastnst, finished_run: Path, photo: Path, tmp_path: Path
) -> None:
    def paint(name: str, *more: object) -> bytes:
        arguments = ("--layer", "up1", "--layer", "conv2", "--maps", "0,7", "--size", 32, "--device", "cpu")
        code, printed, err = fastnst("transform", finished_run, photo, *arguments, "--out", tmp_path / name, *more)
        assert code == 0, err
        _, names = check_output(tmp_path / name, printed)
        assert names == {f"{photo.stem}-{sheet}.png" for sheet in ("layers", "conv2", "up1")}
        return (tmp_path / name / f"{photo.stem}-layers.png").read_bytes()

    last, first, again = paint("last"), paint("first", "--checkpoint", 10), paint("again", "--checkpoint", 10)
    assert first == again
    assert first != last
    assert "step 10" in (tmp_path / "first" / "index.html").read_text("utf-8")


def test_top(fastnst: Fastnst, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    images = sorted(photo_folder.iterdir())
    Image.new("RGB", (200, 4)).save(photo_folder / "narrow.png")
    monkeypatch.setattr(top, "MAPS_PER_SHEET", 2)
    arguments = ("--layer", "relu2_1", "--maps", "top:3", "--count", 4, "--out", out)
    code, printed, err = fastnst("top", photo_folder, *arguments, *SMALL)
    assert code == 0, err
    page, names = check_output(out, printed)
    assert names == {"relu2_1-1.png", "relu2_1-2.png"}
    text = " ".join(page.text)
    assert f"{photo_folder}, 12 images" in text
    assert "10 × 10 px" in text, "the receptive field"
    assert "narrow.png" in err
    assert "top of relu2_1: 12/12 images" in err
    # The tables name, of all maps, those with the strongest activations, and where these are.
    net = load_vgg19("random", last_layer="relu2_1")
    activations = net(torch.cat(read_crops(images, 64)), ["relu2_1"])["relu2_1"].flatten(2)
    strongest = activations.amax(dim=(0, 2)).argsort(descending=True)[:3].tolist()
    cells = [cell for cell in page.text if cell.strip()]
    rows = [cells[index - 4 : index + 1] for index, cell in enumerate(cells) if cell.startswith("image_")]
    assert [row[:2] for row in rows] == [[str(channel), str(rank)] for channel in strongest for rank in (1, 2, 3, 4)]
    for row in rows:
        image = [path.name for path in images].index(row[4])
        values = activations[image, int(row[0])]
        assert float(row[2]) == pytest.approx(float(values.max()), rel=0.006)
        place, column = map(int, row[3].split(", "))
        assert float(values[place * 32 + column]) == pytest.approx(float(values.max()), rel=1e-4)


@pytest.mark.parametrize("method", ["plain", "guided", "smoothgrad"])
def test_saliency(fastnst: Fastnst, photo: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    samples = ("--samples", 2, "--noise", 0.1) if method == "smoothgrad" else ()
    arguments = ("--target", "relu1_2:17", "--method", method, *samples, "--out", out)
    code, printed, err = fastnst("saliency", photo, *arguments, *SMALL)
    assert code == 0, err
    page, names = check_output(out, printed)
    stem = f"{photo.stem}-saliency"
    assert names == {f"{stem}.png", f"{stem}-heat_maps.png", f"{stem}-overlay.png", f"{stem}-heat_maps.npy"}
    values = np.load(out / f"{stem}-heat_maps.npy", allow_pickle=False)
    assert (values.dtype, values.shape) == (np.float32, (64, 64))
    assert values.min() >= 0
    assert values.max() > 0
    with Image.open(out / f"{stem}-heat_maps.png") as image:
        assert image.size == (64, 64)
    assert "relu1_2:17" in " ".join(page.text)


@pytest.mark.parametrize("fill", ["grey", "blur"])
def test_occlusion(fastnst: Fastnst, photo: Path, tmp_path: Path, fill: str) -> None:
    out = tmp_path / "out"
    arguments = ("--target", "relu1_2:3", "--patch", 16, "--stride", 16, "--fill", fill, "--out", out)
    code, printed, err = fastnst("occlusion", photo, *arguments, *SMALL)
    assert code == 0, err
    _, names = check_output(out, printed)
    stem = f"{photo.stem}-occlusion"
    endings = (".png", "-heat_maps.png", "-overlay.png", "-heat_maps.npy", "-scores.npy")
    assert names == {stem + ending for ending in endings}
    heat_values, scores = (np.load(out / f"{stem}-{what}.npy", allow_pickle=False) for what in ("heat", "scores"))
    assert (heat_values.dtype, heat_values.shape) == (np.float32, (64, 64))
    assert (scores.dtype, scores.shape) == (np.float32, (4, 4))
    # The occluders lie side by side: each pixel has one, and heat is the score's drop by it.
    drops = heat_values[::16, ::16] + scores
    np.testing.assert_allclose(drops, drops[0, 0], rtol=1e-4)


# Names, folders, and the log.


def test_names_of_any_kind(fastnst: Fastnst, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a #b ü"
    folder.mkdir()
    names = ["with space & <b>.png", "käse#1?.jpg", "käse#1?.png", os.fsdecode(b"caf\xe9 50%.png")]
    images = [folder / name for name in names]
    for path in images:
        with Image.open(photo) as source:
            source.convert("RGB").save(os.fsencode(path))
    out = tmp_path / "out %41"
    arguments = [os.fsdecode(os.fsencode(path)) for path in images]
    code, printed, err = fastnst("saliency", *arguments, "--target", "conv1_1:0", "--out", out, *SMALL)
    assert code == 0, err
    page, found = check_output(out, printed)
    assert len(found) == 16
    assert "käse#1?-2-saliency.png" in found
    assert b"caf\xe9 50%-saliency.png" in {os.fsencode(name) for name in found}
    assert "caf\\xe9 50%.png" in " ".join(page.text)


def test_results_are_replaced_and_other_files_stay(fastnst: Fastnst, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    for channel in ("0", "1"):
        arguments = ("--layer", "conv1_1", "--maps", channel, "--out", out)
        code, _, err = fastnst("deconvnet", photo, *arguments, *SMALL)
        assert code == 0, err
        assert f"maps {channel}:" in (out / "index.html").read_text("utf-8")
    assert (out / "letter.txt").read_text() == "mine"


def test_sheets_go_into_a_runs_log(
    fastnst: Fastnst, finished_run: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastnst.run_log import writer

    logged: list[tuple[Path, dict[str, tuple[int, ...]], int, str]] = []

    def log(run: Path, sheets: dict[str, np.ndarray], *, step: int, text: str) -> None:
        assert (tmp_path / "out" / "index.html").exists()
        logged.append((run, {tag: sheet.shape for tag, sheet in sheets.items()}, step, text))

    monkeypatch.setattr(writer, "log_visualization", log)
    common = ("--out", tmp_path / "out", "--run", finished_run, "--device", "cpu", "--size", 32)
    code, _, err = fastnst("transform", finished_run, photo, *common)
    assert code == 0, err
    code, _, err = fastnst("transform", finished_run, photo, "--checkpoint", 20, *common)
    assert code == 0, err
    code, _, err = fastnst("saliency", photo, "--target", "conv1_1:0", "--vgg", "random", *common)
    assert code == 0, err
    assert f"fastnst tensorboard {finished_run}" in err
    assert [step for _, _, step, _ in logged] == [30, 20, 30]
    assert all(run == finished_run for run, _, _, _ in logged)
    assert list(logged[0][1]) == [f"visualize/transform/{photo.stem}/layers"]
    assert all(len(shape) == 3 and shape[2] == 3 for _, sheets, _, _ in logged for shape in sheets.values())
    assert "fastnst visualize transform" in logged[0][3]


def test_the_log_really_holds_them(fastnst: Fastnst, finished_run: Path, photo: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    arguments = ("--target", "conv1_1:0", "--out", tmp_path / "out", "--run", run)
    code, _, err = fastnst("saliency", photo, *arguments, *SMALL)
    assert code == 0, err
    (events,) = run.glob("events.out.tfevents.*")
    assert f"visualize/saliency/{photo.stem}/conv1_1:0".encode() in events.read_bytes()


# The pieces that need no command.


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
def test_maps_that_are_understood(text: str, numbers: tuple[int, ...] | None, strongest: int | None) -> None:
    choice = parse_maps(text)
    assert (choice.numbers, choice.strongest) == (numbers, strongest)
    strengths = torch.tensor([1.0, 3.0, 3.0, 2.0])
    if numbers is None:
        assert choice.of("conv1_1", strengths) == ([1, 2, 3, 0] if strongest else [0, 1, 2, 3])
        assert choice.count(4) == 4
    else:
        assert choice.count(4) == len(numbers)


@pytest.mark.parametrize("text", ["14,9", "(14, 9)", " 14 , 009"])
def test_positions_that_are_understood(text: str) -> None:
    assert parse_activation(text) == (14, 9)


def test_a_sheet_is_wider_than_high_and_nearly_full() -> None:
    for cells in range(1, 70):
        columns = columns_for(cells)
        rows = -(-cells // columns)
        assert columns * rows - cells <= 3
        assert rows <= columns <= 3 * rows or cells < 6


def test_a_checkpoint_comes_back_as_a_network(finished_run: Path) -> None:
    state = torch.get_rng_state()
    net = load_checkpoint_net(finished_run, 20)
    assert torch.equal(torch.get_rng_state(), state)
    wanted = TransformNet("johnson", generator=torch.Generator().manual_seed(20)).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in net.state_dict().items())
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_a_checkpoint_of_another_network_is_refused(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "config.toml").write_text(to_toml(load_config(preset="lengstrom", environment={})), "utf-8")
    with pytest.raises(DataError, match="holds other weights than a lengstrom net with instance norm"):
        load_checkpoint_net(run, 10)


def test_the_steps_of_a_run_without_a_model_are_unknown(tmp_path: Path) -> None:
    assert steps_of_run(tmp_path) == 0
    save_style_model(tmp_path / "model.safetensors", TransformNet("johnson"), metadata={"steps": "many"})
    assert steps_of_run(tmp_path) == 0


# Bad input.


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

# Arguments, made of the folder, a photo and a run; exit code; what the message says.
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
    "class": (lambda _t, p, _r: ["saliency", p, "--target", "class:tabbi"], 2, ("'tabbi'", "tabby")),
    "target": (lambda _t, p, _r: ["saliency", p, "--target", "17"], 2, ("'17'", "class:N")),
    "target-layer": (lambda _t, p, _r: ["occlusion", p, "--target", "relu9_1:0"], 2, ("relu9_1", "did you mean")),
    "target-map": (lambda _t, p, _r: ["occlusion", p, "--target", "relu1_1:64"], 2, ("64", "0 … 63")),
    "target-below-field": (
        lambda t, _p, _r: ["occlusion", _tiny(t), "--target", "relu3_4:1"],
        3,
        ("tiny.png is 60 × 40 px", "relu3_4"),
    ),
    "method": (lambda _t, p, _r: ["saliency", p, *MAP, "--method", "guidet"], 2, ("'guidet'", "guided")),
    "samples": (lambda _t, p, _r: ["saliency", p, *MAP, "--samples", 3], 2, ("--samples", "smoothgrad", "plain")),
    "no-samples": (
        lambda _t, p, _r: ["saliency", p, *MAP, "--method", "smoothgrad", "--samples", 0],
        2,
        ("samples", "0"),
    ),
    "fill": (lambda _t, p, _r: ["occlusion", p, *MAP, "--fill", "gray"], 2, ("'gray'", "grey")),
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
def test_bad_input_gets_one_message_and_nothing_is_written(
    fastnst: Fastnst, finished_run: Path, photo: Path, tmp_path: Path, name: str
) -> None:
    if name == "no-cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    arguments, expected, said = BAD[name][0](tmp_path, photo, finished_run), *BAD[name][1:]
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
    for words in said:
        assert words in err
    assert "Traceback" not in err
    told = [line for line in err.splitlines() if not line.startswith(("Usage:", "Try ", "VGG19: RANDOM", "check:"))]
    assert 1 <= len([line for line in told if line.strip()]) <= 2, err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_class_needs_the_classifiers_weights(fastnst: Fastnst, photo: Path, weights: Path, tmp_path: Path) -> None:
    partial = weights / "vgg19_caffe_conv1_1-conv3_4.pth"
    arguments = ("--target", "class:3", "--vgg", partial, "--out", tmp_path / "out", "--device", "cpu")
    code, _, err = fastnst("saliency", photo, *arguments)
    assert code == 3
    for words in ("class 3", "classifier", "conv4_1", "layer:map"):
        assert words in err
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_said(
    fastnst: Fastnst, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(heat_maps, "measure_saliency", run_out)
    code, _, err = fastnst("saliency", photo, *MAP, "--out", tmp_path / "out", *SMALL)
    assert code == 5
    assert "out of memory; lower --size" in err
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_replaced(fastnst: Fastnst, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    source = Path(shutil.copy(photo, out / "photo.png"))
    shutil.copy(photo, out / "photo-conv1_1.png")
    inputs = (source, out / "photo-conv1_1.png")
    code, _, err = fastnst("deconvnet", *inputs, *CONV1, "--maps", "0", "--out", out, *SMALL)
    assert code == 2
    assert "photo-conv1_1.png would be replaced" in err
    assert {path.name for path in out.iterdir()} == {"photo.png", "photo-conv1_1.png"}


@pytest.mark.parametrize("command", ["deconvnet", "top", "saliency", "occlusion", "transform"])
def test_every_command_explains_itself(fastnst: Fastnst, command: str) -> None:
    code, out, _ = fastnst(command, "--help")
    assert code == 0
    assert out.startswith(b"Usage: ")
    assert b"--out FOLDER" in out
    assert b"--run RUN" in out


def test_help_imports_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys\nfrom fastnst.cli.visualize import visualize\n"
        "visualize.main(['saliency', '--help'], standalone_mode=False)\n"
        "print(json.dumps([n for n in ('torch', 'numpy', 'PIL') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", f"import json\n{code}"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
