"""`fastnst visualize …`, every command: files that fastnst did not write, and inputs, are kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import TransformNet
from helpers.html_page import Page

Fastnst = Callable[..., tuple[int, bytes, str]]

VGG = ("--vgg", "random", "--size", 32)
COMMANDS = {
    "deconvnet": ("deconvnet", "PHOTO", "--layer", "relu1_1", "--maps", "0", *VGG),
    "top": ("top", "FOLDER", "--layer", "conv1_1", "--maps", "0", "--count", 1, *VGG),
    "saliency": ("saliency", "PHOTO", "--target", "conv1_1:0", *VGG),
    "occlusion": ("occlusion", "PHOTO", "--target", "conv1_1:0", "--patch", 16, "--stride", 16, *VGG),
    "transform": ("transform", "MODEL", "PHOTO", "--size", 32, "--layer", "out"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A style model of random weights."""
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_style_model(path, TransformNet("johnson", generator=torch.Generator().manual_seed(0)), metadata={})
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_visualize_keeps_foreign_files(
    command: str, fastnst: Fastnst, model: Path, few_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo, out = next(few_photos.iterdir()), tmp_path / "out"
    places = {"PHOTO": photo, "FOLDER": few_photos, "MODEL": model}
    arguments = [places.get(word, word) if isinstance(word, str) else word for word in COMMANDS[command]]

    def run(*more: object) -> tuple[int, list[str], str]:
        code, text, err = fastnst(*arguments, "--out", out, "--device", "cpu", *more)
        return code, sorted(Path(line).name for line in text.decode().splitlines()), err

    code, results, err = run()
    assert code == 0, err
    assert run()[:2] == (0, results)  # its own results are replaced
    sheets = [name for name in results if name != "index.html"]
    before = {}
    for name in sheets:
        Image.new("RGB", (8, 8)).save(out / f"{name}.png")
        (out / f"{name}.png").rename(out / name)
        before[name] = (out / name).read_bytes()
    code, numbered, err = run()
    assert code == 0, err
    assert "kept files that fastnst did not write" in err
    assert len(numbered) == len(results)
    assert not set(sheets) & set(numbered)
    assert Page((out / "index.html").read_bytes()).files == {name.encode() for name in numbered} - {b"index.html"}
    assert {name: (out / name).read_bytes() for name in sheets} == before
    assert run("--overwrite")[:2] == (0, results)

    (out / "index.html").write_text("<html>mine</html>")

    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(f"fastnst.visualize.commands.{command}.{command}_report", work)
    code, results, err = run()
    assert (code, results) == (2, [])
    assert err == (
        f"fastnst: {out / 'index.html'} exists, and fastnst did not write it; choose another --out, or give "
        "--overwrite to replace it\n"
    )
    assert (out / "index.html").read_text() == "<html>mine</html>"
