"""Every command that reads images gets the same pixels from files that look alike."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnst.config import StyleConfig
from fastnst.data.cache.build import build_cache
from fastnst.data.cache.format import as_manifest
from fastnst.data.loaders.cache import read_pixels
from fastnst.data.manifest import build_manifest
from fastnst.images import read_image
from fastnst.inference import stylize_files
from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.training.inputs import read_style
from fastnst.visualize.attribution.folder_batches import CenterCrops
from fastnst.visualize.commands.options import read_crops
from helpers.batches import CPU, load, load_pillow_in_this_process, one_epoch
from helpers.lookalike_images import LOOKALIKES

SIDE = 32
Reader = Callable[[Path], dict[str, np.ndarray]]


def style(folder: Path) -> dict[str, np.ndarray]:
    """`train --style`."""
    return {path.name: _from_unit(read_style(StyleConfig(image=path))[0]) for path in folder.iterdir()}


def crops(folder: Path) -> dict[str, np.ndarray]:
    """`visualize deconvnet`, `saliency`, `occlusion` and `transform`."""
    return {path.name: _from_unit(read_crops([path], SIDE)[0]) for path in folder.iterdir()}


def top(folder: Path) -> dict[str, np.ndarray]:
    """`visualize top`."""
    manifest = build_manifest(folder, cache=False)
    batches = [batch.numpy() for _, batch in CenterCrops(manifest, SIDE, CPU)]
    return dict(zip((entry.path for entry in manifest.images), np.concatenate(batches), strict=True))


def training(loader: str) -> Reader:
    """`data check` and `train --data`."""

    def read(folder: Path) -> dict[str, np.ndarray]:
        manifest = build_manifest(folder, cache=False, allow_uniform=False)
        sampler = one_epoch(manifest, 1, fit="squash", flip=False)
        order = [int(sampler.batch(step).indices[0]) for step in range(sampler.steps)]
        batches = load(manifest, sampler, loader, SIDE)
        return {manifest.images[at].path: batch[0].numpy() for at, batch in zip(order, batches, strict=True)}

    return read


def cache(folder: Path) -> dict[str, np.ndarray]:
    """`data cache`."""
    built = as_manifest(
        build_cache(build_manifest(folder, cache=False), folder.parent / "c", size=SIDE, fit="squash").cache
    )
    return {entry.path: read_pixels(built, entry) for entry in built.images}


def samples(folder: Path) -> dict[str, np.ndarray]:
    """The samples of a training, on the folder itself."""
    manifest = build_manifest(folder, cache=False)
    return {entry.path: read_pixels(manifest, entry) for entry in manifest.images}


def _from_unit(image: torch.Tensor) -> np.ndarray:
    return (image[0].permute(1, 2, 0) * 255).round().numpy()


READERS: dict[str, Reader] = {
    "style": style,
    "crops": crops,
    "top": top,
    "pillow": training("pillow"),
    "dali": training("dali"),
    "cache": cache,
    "samples": samples,
}


def place(kind: str, folder: Path) -> tuple[str, int]:
    """Make the files of a kind; return the name of the first, and how many levels the others may differ from it."""
    make, tolerance = LOOKALIKES[kind]
    folder.mkdir()
    files = make()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return next(iter(files)), tolerance


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", LOOKALIKES)
def test_readers_get_equal_pixels(kind: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")
    load_pillow_in_this_process(monkeypatch)
    first, tolerance = place(kind, tmp_path / "images")
    found = READERS[reader](tmp_path / "images")
    assert len(found) == len(list((tmp_path / "images").iterdir()))
    expected = found[first].astype(int)
    assert np.ptp(expected) > 50
    for name, pixels in found.items():
        difference = np.abs(pixels - expected)
        # DALI and Pillow resample apart by 1.
        assert difference.max() <= tolerance + (reader == "dali"), name
        assert difference.mean() <= tolerance / 4 + (reader == "dali"), name


@pytest.mark.parametrize(("kind", "largest"), [("hidden", 0), ("profiles", 6), ("depths", 0), ("formats", 12)])
def test_stylize_gives_equal_images(kind: str, largest: int, tmp_path: Path) -> None:
    first, _ = place(kind, tmp_path / "images")
    # The network multiplies the rounding of 8 bits, and JPEG's noise most of all.
    sources = [path for path in sorted((tmp_path / "images").iterdir()) if path.suffix != ".jpg"]
    net = TransformNet("johnson", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.out.weight.mul_(40)  # new weights give nearly black images, which hide differences
        net.out.bias.fill_(127.0)
    save_style_model(tmp_path / "model.safetensors", net, metadata={})
    results = {}
    for path in sources:
        out = tmp_path / f"{path.name}.png"
        stylize_files(tmp_path / "model.safetensors", [path], out, device="cpu")
        results[path.name] = read_image(out).astype(int)
    for name, result in results.items():
        assert np.abs(result - results[first]).mean() <= largest, name


def test_stylize_keeps_transparency(tmp_path: Path) -> None:
    place("hidden", tmp_path / "images")
    with Image.open(tmp_path / "images" / "white.png") as image:
        alpha = np.asarray(image)[..., 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_image(tmp_path / "images" / "white.png", alpha=True)[..., 3], alpha)
