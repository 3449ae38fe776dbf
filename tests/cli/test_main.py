"""The command line: help, plans, results, and messages about bad input."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from fastnst.progress import byte_count
from fastnst.run_log.writer import RunLog

Fastnst = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small(photo_folder: Path) -> list[object]:
    """Arguments of a training run that takes a second or two."""
    sizes = ("data.image_size=32", "train.batch_size=2", "style.size=48", "data.workers=1", "visualize.every=0")
    settings = [argument for size in sizes for argument in ("--set", size)]
    style = ["--style", photo_folder / "image_00.jpg", "--data", photo_folder, "--preset", "vgg-conv3"]
    return [*style, "--vgg", "random", "--device", "cpu", "--steps", 2, *settings]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, fastnst.cli.main\n"
    code += "for words in ['--help'], ['train', '--help']:\n sys.argv = ['fastnst', *words]\n"
    code += " try: fastnst.cli.main.main()\n except SystemExit: pass\n"
    code += "loaded = {'torch', 'numpy', 'pydantic', 'PIL', 'rich'} & set(sys.modules)\nassert not loaded, loaded\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout


@pytest.mark.parametrize(
    "command",
    [(), ("train",), ("stylize",), ("data",), ("data", "check"), ("data", "cache"), ("tensorboard",), ("demo",)],
)
def test_help_of_every_command(fastnst: Fastnst, command: tuple[str, ...]) -> None:
    code, out, _ = fastnst(*command, "--help")
    assert code == 0
    assert out.startswith("Usage: ")


def test_train_then_stylize(fastnst: Fastnst, small: list[object], tmp_path: Path, photo_folder: Path) -> None:
    run = tmp_path / "run"
    code, out, err = fastnst("train", *small, "--out", run)
    assert code == 0, err
    assert f"style model      {run / 'model.safetensors'}" in out
    assert f"fastnst tensorboard {run}" in err
    image = tmp_path / "stylized.png"
    code, out, err = fastnst("stylize", run, photo_folder / "image_01.png", "--out", image, "--device", "cpu")
    assert code == 0, err
    assert out == f"{image}\n"
    with Image.open(image) as stylized, Image.open(photo_folder / "image_01.png") as source:
        assert stylized.size == source.size


@pytest.mark.slow
def test_demo_trains_a_style_and_stylizes_a_photo(fastnst: Fastnst, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the demo's photos ship with scikit-image")
    code, out, err = fastnst("demo", "--out", tmp_path / "demo", "--vgg", "random", "--steps", 1)
    assert code == 0, err
    image = tmp_path / "demo-images" / "chelsea-stylised.png"
    assert out.splitlines()[:2] == [f"stylized image   {image}", f"style model      {tmp_path}/demo/model.safetensors"]
    with Image.open(image) as stylized:
        assert stylized.size == (451, 300)


def test_train_dry_run_prints_a_plan_and_writes_nothing(fastnst: Fastnst, small: list[object], tmp_path: Path) -> None:
    code, out, err = fastnst("train", *small, "--out", tmp_path / "run", "--dry-run")
    assert code == 0, err
    assert 'preset = "vgg-conv3"' in out
    assert "# data       12 images, 0 refused" in out
    assert "# steps      2 of 2 images, 0.33 passes over the data" in out
    assert "# memory     " in out
    assert "# disk       " in out
    assert not (tmp_path / "run").exists()


def test_estimate_counts_what_autograd_keeps() -> None:
    from fastnst.config import load_config
    from fastnst.losses.perceptual import PerceptualLoss
    from fastnst.models.transform_net import TransformNet
    from fastnst.models.vgg19 import VGG19
    from fastnst.training.memory.estimate import estimate

    settings = ["data.image_size=32", "train.batch_size=2", "train.precision=fp32", "train.engine=autograd"]
    config = load_config(preset="vgg-conv3", assignments=settings, environment={})
    need = estimate(config, device_type="cpu")
    net, vgg = TransformNet("johnson"), VGG19(last_layer="relu3_4")
    loss = PerceptualLoss(vgg, config.loss)
    loss.set_style(torch.rand(1, 3, 32, 32))
    kept: dict[int, torch.Tensor] = {}
    fixed = [*net.parameters(), *loss.parameters(), *loss.buffers()]  # the style's Gram matrices are buffers
    weights = {tensor.untyped_storage().data_ptr() for tensor in fixed}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    batch = torch.rand(2, 3, 32, 32).to(memory_format=torch.channels_last)
    net.to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = loss(net(batch), batch).total
    assert total.requires_grad
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert need.activations == pytest.approx(real, rel=0.05), (byte_count(need.activations), byte_count(real))
    trained, frozen = (sum(p.nbytes for p in module.parameters()) for module in (net, vgg))
    assert need.weights == 4 * trained + frozen


def test_data_check_names_each_rejected_image(fastnst: Fastnst, photo_folder: Path) -> None:
    (photo_folder / "notes.jpg").write_text("not an image")
    code, out, err = fastnst("data", "check", photo_folder)
    assert code == 0, err
    first, *rest = out.splitlines()
    assert first.startswith("12 images accepted (")
    assert first.endswith("1 refused")
    assert len(rest) == 1
    assert rest[0].startswith("notes.jpg: ")
    code, out, _ = fastnst("data", "check", photo_folder, "--json")
    assert code == 0
    assert '"accepted": 12' in out


def write_bad_inputs(folder: Path) -> None:
    """Write files and folders that no run can use."""
    folder.mkdir()
    (folder / "style.jpg").write_text("This is not an image.")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(1000, 512)}, folder / "resnet.pth")
    (folder / "vgg.pth").write_text("weights")
    (folder / "empty").mkdir()
    (folder / "taken").write_text("x")
    (folder / "full").mkdir()
    (folder / "full" / "letter.txt").write_text("x")


@pytest.mark.parametrize(
    ("arguments", "expected_code", "words"),
    [
        (["--style", "/nowhere/wave.jpg"], 3, ["/nowhere/wave.jpg"]),
        (["--style", "{bad}/style.jpg"], 3, ["style.jpg"]),
        (["--style", "{bad}/pixel.png"], 3, ["pixel.png", "1"]),
        (["--data", "/nowhere/photos"], 3, ["/nowhere/photos"]),
        (["--data", "{bad}/empty"], 3, ["{bad}/empty"]),
        (["--data", "{photos}/image_00.jpg"], 3, ["image_00.jpg"]),
        (["--vgg", "/nowhere/vgg.pth"], 3, ["/nowhere/vgg.pth"]),
        (["--vgg", "{bad}/resnet.pth"], 3, ["resnet.pth", "VGG19"]),
        (["--vgg", "{bad}/vgg.pth"], 3, ["vgg.pth"]),
        (["--preset", "lengstorm"], 2, ["'lengstorm'", "lengstrom"]),
        (["--set", "train.stepz=3"], 2, ["train.stepz", "'train.steps'"]),
        (["--set", "train.learning_rate=fast"], 2, ["learning_rate", "'fast'"]),
        (["--set", 'loss.content_layers=["relu9_9"]'], 2, ["relu9_9", "did you mean"]),
        (["--config", "/nowhere/run.toml"], 2, ["/nowhere/run.toml"]),
        (["--loader", "turbo"], 2, ["turbo", "dali, pillow"]),
        (["--precision", "fp8"], 2, ["fp8", "bf16"]),
        (["--steps", "0"], 2, ["train.steps", "0"]),
        (["--out", "{bad}/taken/run"], 3, ["{bad}/taken"]),
        (["--out", "{bad}/full"], 2, ["letter.txt", "--out"]),
        (["--resume"], 2, ["--resume", "config.toml"]),
        pytest.param(
            *(["--device", "cuda"], 5, ["cuda", "--device cpu"]),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
    ids=lambda value: "-".join(value).replace("/", "-") if isinstance(value, list) and "--" in value[0] else "",
)
def test_train_says_what_is_wrong_and_writes_nothing(
    fastnst: Fastnst,
    small: list[object],
    tmp_path: Path,
    photo_folder: Path,
    arguments: list[str],
    expected_code: int,
    words: list[str],
) -> None:
    write_bad_inputs(tmp_path / "bad")
    before = sorted(tmp_path.rglob("*"))
    given = [text.format(bad=tmp_path / "bad", photos=photo_folder) for text in arguments]
    code, out, err = fastnst("train", *small, "--out", tmp_path / "run", *given)
    assert code == expected_code, err
    assert out == ""
    message = [line for line in err.splitlines() if not line.startswith(("Usage:", "Try ", "check images:"))]
    assert 1 <= len([line for line in message if line.strip()]) <= 3, err
    for text in words:
        assert text.format(bad=tmp_path / "bad") in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_out_of_memory_is_one_line(fastnst: Fastnst, photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastnst.data.manifest.check_image", mock.Mock(side_effect=MemoryError))
    code, _, err = fastnst("data", "check", photo_folder)
    assert code == 5
    assert err.splitlines()[-1].startswith("fastnst: memory ran out; free some")
    assert "Traceback" not in err


def test_train_names_layers_that_the_weights_lack(
    fastnst: Fastnst, small: list[object], weights: Path, tmp_path: Path
) -> None:
    partial = weights / "vgg19_caffe_conv1_1-conv3_4.pth"
    code, _, err = fastnst("train", *small, "--preset", "hwalsuklee", "--vgg", partial, "--out", tmp_path / "run")
    assert code == 3
    assert "conv4_1" in err
    assert "conv3_4" in err
    assert not (tmp_path / "run").exists()


def test_stylize_says_what_is_wrong(fastnst: Fastnst, tmp_path: Path, photo_folder: Path) -> None:
    image = photo_folder / "image_00.jpg"
    (tmp_path / "model.safetensors").write_text("not a model")
    for model in ("/nowhere/run", tmp_path / "model.safetensors", image):
        code, out, err = fastnst("stylize", model, image, "--out", tmp_path / "out.png")
        assert code == 3, err
        assert str(model) in err
        assert out == ""
        assert not (tmp_path / "out.png").exists()


def test_tensorboard_shows_every_point_and_image(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in range(30):
            log.metrics(step, {"loss/total": float(step)})
            log.images(step, "stylised", torch.rand(1, 3, 16, 16), ["cat"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastnst", "tensorboard", str(tmp_path), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    plugin = f"http://localhost:{port}/data/plugin"
    try:
        points = _json_when_ready(f"{plugin}/scalars/scalars?tag=loss%2Ftotal&run=.", 30, process)
        images = _json_when_ready(f"{plugin}/images/images?tag=stylised%2Fcat&run=.&sample=0", 30, process)
    finally:
        process.terminate()
        process.wait(timeout=30)
    assert [step for _, step, _ in points] == list(range(30))
    assert [image["step"] for image in images] == list(range(30))


def _json_when_ready(url: str, count: int, process: subprocess.Popen[bytes]) -> list[Any]:
    """The list at `url` once it has `count` entries, or what it is after a minute."""
    deadline = time.monotonic() + 60
    found: list[Any] = []
    while len(found) < count and time.monotonic() < deadline:
        assert process.poll() is None, f"TensorBoard ended with code {process.returncode}"
        # TensorBoard answers 404 until it has read the log, and refuses before it listens.
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as response:
            found = json.load(response)
        time.sleep(0.2)
    return found


@pytest.mark.parametrize("kind", ["folder of links", "link to a run", "link to a file", "link back"])
def test_tensorboard_follows_links(
    fastnst: Fastnst, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    runs, given = tmp_path / "runs", tmp_path / "given"
    (runs / "wave").mkdir(parents=True)
    event = runs / "wave" / "events.out.tfevents.1.host"
    event.touch()
    if kind == "link to a run":
        given.symlink_to(runs / "wave")
    else:
        given.mkdir()
        (given / "back").symlink_to(given)
        (given / "dangling.tfevents").symlink_to(tmp_path / "nothing")
        if kind != "link back":
            (given / "linked").symlink_to(event if kind == "link to a file" else runs / "wave")
        if kind == "link to a file":
            (given / "linked").rename(given / event.name)
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: started.append(command))
    code, _, err = fastnst("tensorboard", given)
    assert (code, len(started)) == ((3, 0) if kind == "link back" else (0, 1)), err


def test_tensorboard_needs_a_log(fastnst: Fastnst, tmp_path: Path) -> None:
    code, _, err = fastnst("tensorboard", tmp_path)
    assert code == 3
    assert "holds no TensorBoard log" in err
