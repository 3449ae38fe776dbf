"""`fastnst visualize …`: the five commands from start to end."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastnst.config import load_config, to_toml
from fastnst.errors import DataError
from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.models.weights import load_vgg19
from fastnst.training.run_dir.load_net import load_checkpoint_net, steps_of_run
from fastnst.visualize.commands import saliency, top
from fastnst.visualize.commands.options import batch_that_fits, read_crops
from helpers.html_page import Page

Fastnst = Callable[..., tuple[int, bytes, str]]
Visualize = Callable[..., tuple[Page, set[str], str]]
MAP = ("--target", "conv1_1:0")
SMALL = ("--vgg", "random", "--device", "cpu", "--size", "64")


def test_deconvnet(visualize: Visualize, photo: Path) -> None:
    layers = ("--layer", "conv2_1", "--layer", "relu1_1", "--layer", "conv2_1")
    page, names, err = visualize("deconvnet", photo, *layers, "--maps", "3,0-4", *SMALL)
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
def test_deconvnet_activation_option(visualize: Visualize, photo: Path, activation: str) -> None:
    arguments = ("--layer", "relu1_2", "--activation", activation, "--maps", "top:2")
    page, names, _ = visualize("deconvnet", photo, *arguments, *SMALL)
    close = set() if activation == "all" else {f"{photo.stem}-relu1_2-close.png"}
    assert names == {f"{photo.stem}-relu1_2.png", *close}
    assert {"all": "all activations of each map", "5,60": "row 5, column 60"}[activation] in " ".join(page.text)


def test_deconvnet_spreads_many_maps_over_sheets(visualize: Visualize, photo: Path) -> None:
    arguments = ("--layer", "conv1_1", "--activation", "all", "--maps", "all")
    page, names, _ = visualize("deconvnet", photo, *arguments, *SMALL)
    assert names == {f"{photo.stem}-conv1_1-{part}.png" for part in (1, 2)}
    scales = {text.split("±")[1].split(",")[0] for text in page.text if "±" in text}
    assert len(scales) == 1, "one scale for all maps of a layer"


def test_transform(visualize: Visualize, finished_run: Path, photo: Path, tmp_path: Path) -> None:
    page, names, _ = visualize("transform", finished_run, photo, "--size", 32, "--device", "cpu")
    assert names == {f"{photo.stem}-layers.png"}
    with Image.open(tmp_path / "out" / f"{photo.stem}-layers.png") as strip:
        assert strip.width > 13 * 96, "photo, eleven layers, output"
    text = " ".join(page.text)
    assert f"{finished_run}: johnson, instance norm" in text
    assert "conv1, conv2, conv3, res1, res2, res3, res4, res5, up1, up2, out" in text


def test_transform_checkpoint_and_maps_options(
    visualize: Visualize, finished_run: Path, photo: Path, tmp_path: Path
) -> None:
    def stylize(name: str, *more: object) -> bytes:
        arguments = ("--layer", "up1", "--layer", "conv2", "--maps", "0,7", "--size", 32, "--device", "cpu")
        _, names, _ = visualize("transform", finished_run, photo, *arguments, *more, out=name)
        assert names == {f"{photo.stem}-{sheet}.png" for sheet in ("layers", "conv2", "up1")}
        return (tmp_path / name / f"{photo.stem}-layers.png").read_bytes()

    last, first, again = stylize("last"), stylize("first", "--checkpoint", 10), stylize("again", "--checkpoint", 10)
    assert first == again
    assert first != last
    assert "step 10" in (tmp_path / "first" / "index.html").read_text("utf-8")


def test_top(visualize: Visualize, photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = sorted(photo_folder.iterdir())
    Image.new("RGB", (200, 4)).save(photo_folder / "narrow.png")
    monkeypatch.setattr(top, "MAPS_PER_SHEET", 2)
    arguments = ("--layer", "relu2_1", "--maps", "top:3", "--count", 4)
    page, names, err = visualize("top", photo_folder, *arguments, *SMALL)
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
def test_saliency(visualize: Visualize, photo: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    samples = ("--samples", 2, "--noise", 0.1) if method == "smoothgrad" else ()
    page, names, _ = visualize("saliency", photo, "--target", "relu1_2:17", "--method", method, *samples, *SMALL)
    stem = f"{photo.stem}-saliency"
    assert names == {f"{stem}.png", f"{stem}-heat.png", f"{stem}-overlay.png", f"{stem}-heat.npy"}
    values = np.load(out / f"{stem}-heat.npy", allow_pickle=False)
    assert (values.dtype, values.shape) == (np.float32, (64, 64))
    assert values.min() >= 0
    assert values.max() > 0
    with Image.open(out / f"{stem}-heat.png") as image:
        assert image.size == (64, 64)
    assert "relu1_2:17" in " ".join(page.text)


@pytest.mark.parametrize("fill", ["grey", "blur"])
def test_occlusion(visualize: Visualize, photo: Path, tmp_path: Path, fill: str) -> None:
    out = tmp_path / "out"
    arguments = ("--target", "relu1_2:3", "--patch", 16, "--stride", 16, "--fill", fill)
    _, names, _ = visualize("occlusion", photo, *arguments, *SMALL)
    stem = f"{photo.stem}-occlusion"
    assert names == {stem + end for end in (".png", "-heat.png", "-overlay.png", "-heat.npy", "-scores.npy")}
    heat_values, scores = (np.load(out / f"{stem}-{what}.npy", allow_pickle=False) for what in ("heat", "scores"))
    assert (heat_values.dtype, heat_values.shape) == (np.float32, (64, 64))
    assert (scores.dtype, scores.shape) == (np.float32, (4, 4))
    # The occluders lie side by side: each pixel has one, and heat is the score's drop by it.
    drops = heat_values[::16, ::16] + scores
    np.testing.assert_allclose(drops, drops[0, 0], rtol=1e-4)


# Names, folders, and the log.


def test_saliency_of_files_with_any_names(visualize: Visualize, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a #b ü"
    folder.mkdir()
    names = ["with space & <b>.png", "käse#1?.jpg", "käse#1?.png", os.fsdecode(b"caf\xe9 50%.png")]
    images = [folder / name for name in names]
    for path in images:
        with Image.open(photo) as source:
            source.convert("RGB").save(os.fsencode(path))
    page, found, _ = visualize("saliency", *map(str, images), *MAP, *SMALL, out="out %41")
    assert len(found) == 16
    assert "käse#1?-2-saliency.png" in found
    assert b"caf\xe9 50%-saliency.png" in {os.fsencode(name) for name in found}
    assert "caf\\xe9 50%.png" in " ".join(page.text)


def test_visualize_run_option_logs_at_the_right_step(
    fastnst: Fastnst, finished_run: Path, photo: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    common = ("--out", tmp_path / "out", "--run", run, "--device", "cpu", "--size", 32)
    for options in ((), ("--checkpoint", 20)):
        code, _, err = fastnst("transform", run, photo, *options, *common)
        assert code == 0, err
    code, _, err = fastnst("saliency", photo, *MAP, "--vgg", "random", *common)
    assert code == 0, err
    assert f"fastnst tensorboard {run}" in err
    events = EventAccumulator(str(run), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    strip, heat = f"visualize/transform/{photo.stem}/layers", f"visualize/saliency/{photo.stem}/conv1_1:0"
    assert {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]} == {
        strip: [30, 20],
        heat: [30],
    }
    (text, _) = events.Tensors(f"{strip}/text_summary")
    assert b"fastnst visualize transform" in text.tensor_proto.string_val[0]


# Networks from checkpoints.


def test_load_checkpoint_net(finished_run: Path) -> None:
    state = torch.get_rng_state()
    net = load_checkpoint_net(finished_run, 20)
    assert torch.equal(torch.get_rng_state(), state)
    wanted = TransformNet("johnson", generator=torch.Generator().manual_seed(20)).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in net.state_dict().items())
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_load_checkpoint_net_refuses_another_network(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "config.toml").write_text(to_toml(load_config(preset="lengstrom", environment={})), "utf-8")
    with pytest.raises(DataError, match="does not hold the weights of a lengstrom net with instance norm"):
        load_checkpoint_net(run, 10)


def test_steps_of_run_without_a_model(tmp_path: Path) -> None:
    assert steps_of_run(tmp_path) == 0
    save_style_model(tmp_path / "model.safetensors", TransformNet("johnson"), metadata={"steps": "many"})
    assert steps_of_run(tmp_path) == 0


# Errors.


def test_saliency_of_a_class_needs_the_classifiers_weights(
    fastnst: Fastnst, photo: Path, weights: Path, tmp_path: Path
) -> None:
    partial = weights / "vgg19_caffe_conv1_1-conv3_4.pth"
    arguments = ("--target", "class:3", "--vgg", partial, "--out", tmp_path / "out", "--device", "cpu")
    code, _, err = fastnst("saliency", photo, *arguments)
    assert code == 3
    for words in ("class 3", "classifier", "conv4_1", "layer:map"):
        assert words in err
    assert not (tmp_path / "out").exists()


def test_saliency_reports_too_little_memory(
    fastnst: Fastnst, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(saliency, "saliency", run_out)
    code, _, err = fastnst("saliency", photo, *MAP, "--out", tmp_path / "out", *SMALL)
    assert code == 5
    assert "out of memory; lower --size" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("deconvnet", ("--layer", "conv1_1", *SMALL)),
        ("top", ("--layer", "conv1_1", *SMALL)),
        ("saliency", (*MAP, *SMALL)),
        ("occlusion", (*MAP, *SMALL)),
        ("transform", ("--device", "cpu", "--size", "64")),
    ],
)
def test_visualize_refuses_a_size_that_memory_does_not_hold(
    fastnst: Fastnst,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    options: tuple[str, ...],
) -> None:
    monkeypatch.setattr("fastnst.visualize.commands.options.available_memory", lambda _: 2**20)
    model = tmp_path / "model.safetensors"
    save_style_model(model, TransformNet("johnson"), metadata={})
    inputs = {"top": (photo.parent,), "transform": (model, photo)}.get(command, (photo,))
    code, _, err = fastnst(command, *inputs, *options, "--out", tmp_path / "out")
    assert code == 5
    assert "a crop of 64 × 64 px needs 2.0 MiB or more, and 1.0 MiB are there; set --size 38 or less" in err
    assert not (tmp_path / "out").exists()


def test_batch_that_fits_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for room, expected in ((0, 1), (700 * 100**2 * 5, 5), (2**40, 32)):
        monkeypatch.setattr("fastnst.visualize.commands.options.available_memory", lambda _, room=room: room)
        assert batch_that_fits(cpu, 100, 32) == expected


@pytest.mark.parametrize("command", ["deconvnet", "top", "saliency", "occlusion", "transform"])
def test_visualize_help(fastnst: Fastnst, command: str) -> None:
    code, out, _ = fastnst(command, "--help")
    assert code == 0
    assert out.startswith(b"Usage: ")
    assert b"--out FOLDER" in out
    assert b"--run RUN" in out
