"""What the tests of `fastnst visualize` share: the command, a photo and a finished run."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastnst.config import load_config, to_toml
from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.training.run_dir.checkpoint import save_checkpoint
from helpers.html_page import Page
from helpers.run_command import exit_code_of


@pytest.fixture
def fastnst(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[int, bytes, str]]:
    """Run `fastnst visualize` in this process; returns its exit code, stdout as bytes, and stderr with the log."""
    caplog.set_level("INFO", "fastnst")

    def run(*arguments: object) -> tuple[int, bytes, str]:
        caplog.clear()
        code = exit_code_of(monkeypatch, "visualize", *arguments)
        output = capfdbinary.readouterr()
        err = output.err.decode()
        return code, output.out, "\n".join([err, *(line for line in caplog.messages if line not in err)])

    return run


@pytest.fixture
def visualize(
    fastnst: Callable[..., tuple[int, bytes, str]], tmp_path: Path
) -> Callable[..., tuple[Page, set[str], str]]:
    """Run `fastnst visualize … --out tmp_path/out`, check what it wrote; returns page, names of the files and stderr.

    The page and exactly the files that it links to must be printed and written.
    """

    def run(*arguments: object, out: str = "out") -> tuple[Page, set[str], str]:
        folder = tmp_path / out
        code, printed, err = fastnst(*arguments, "--out", folder)
        assert code == 0, err
        paths = [Path(os.fsdecode(line)) for line in printed.splitlines()]
        assert paths[0] == folder / "index.html"
        names = {path.name for path in paths}
        assert {path.name for path in folder.iterdir()} == names
        page = Page(paths[0].read_bytes())
        assert {os.fsdecode(name) for name in page.files} == names - {"index.html"}
        for path in paths:
            if path.suffix == ".png":
                with Image.open(path) as image:
                    assert image.mode == "RGB"
                    image.load()
        return page, names - {"index.html"}, err

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
