"""Batches of the real loaders, and the expected ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastnst.config import DataConfig
from fastnst.data.crop import crop_box, resize_crop
from fastnst.data.loaders import open_loader, pillow
from fastnst.data.manifest import Manifest
from fastnst.data.sampler import Sampler
from fastnst.images import read_image
from helpers.crash_points import InThisProcess

CPU = torch.device("cpu")
# Two resamplers round alike except where a value lies within their arithmetic's error of one half.
MAX_DIFFERENCE, MAX_MEAN_DIFFERENCE = 1, 0.3


def load_pillow_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Pillow loader reads as always, but without worker processes, which take long to start."""
    monkeypatch.setattr(pillow, "ProcessPoolExecutor", InThisProcess)


def data_config(loader: str = "pillow", size: int = 32, **values: Any) -> DataConfig:
    return DataConfig(loader=loader, image_size=size, **{"workers": 1, "prefetch": 2, **values})


def load(
    manifest: Manifest, sampler: Sampler, loader: str = "pillow", size: int = 32, workers: int = 1, **options: Any
) -> list[torch.Tensor]:
    config = data_config(loader, size, workers=workers)
    with open_loader(manifest, sampler, config, **{"device": CPU, **options}) as batches:
        return list(batches)


def one_epoch(manifest: Manifest, batch_size: int = 4, **values: Any) -> Sampler:
    count = len(manifest.images)
    return Sampler(1, count, batch_size, -(-count // batch_size), **values)


def pixels_of(folder: Path) -> dict[str, np.ndarray]:
    """Of each image by name, before anything happens to the files."""
    return {path.name: read_image(path) for path in folder.iterdir()}


def expected_batch(
    manifest: Manifest,
    sampler: Sampler,
    step: int,
    size: int,
    pixels: Mapping[str, np.ndarray],
    failed: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """A loader's batch, computed image by image; `failed`: by path, the first step (from 1) without an image."""
    samples = sampler.batch(step)
    crops = []
    for index, crop, flip in zip(samples.indices.tolist(), samples.crop, samples.flip, strict=True):
        while failed and failed.get(manifest.images[index].path, step + 2) <= step + 1:
            index = 0 if index + 1 == len(manifest.images) else index + 1
        entry = manifest.images[index]
        box = crop_box(entry.width, entry.height, sampler.fit, crop, size)
        crops.append(resize_crop(Image.fromarray(pixels[entry.path]), box, size, bool(flip)))
    return torch.from_numpy(np.stack(crops))


def assert_close(batch: torch.Tensor, expected: torch.Tensor) -> None:
    assert (batch.int() - expected.int()).abs().max() <= MAX_DIFFERENCE


def assert_loaders_agree(manifest: Manifest, sampler: Sampler, size: int, workers: int = 1) -> None:
    """No image may fail here: one that a loader cannot read raises."""
    one, other = (torch.cat(load(manifest, sampler, name, size, workers)).int() for name in ("pillow", "dali"))
    assert one.shape == other.shape == (sampler.steps * sampler.batch_size, size, size, 3)
    difference = (one - other).abs()
    indices = np.concatenate([sampler.batch(step).indices for step in range(sampler.steps)])
    wrong = [
        manifest.images[index]
        for index, each in zip(indices, difference, strict=True)
        if each.max() > MAX_DIFFERENCE or each.double().mean() > MAX_MEAN_DIFFERENCE
    ]
    assert not wrong
