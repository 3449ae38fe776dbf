"""Batches of the center crops of a folder, each image exactly once."""

from collections.abc import Generator

import torch
from torch import Tensor

from fastnst.config import DataConfig
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import Manifest
from fastnst.data.sampler import Sampler
from fastnst.errors import DataError, UserError
from fastnst.images import MIN_SIDE, printable

LOADERS = ("pillow", "dali")
LARGEST_SIDE = 2048
"""Pixels, as for training."""


def check_crops(manifest: Manifest, size: int, batch_size: int, loader: str) -> None:
    """Check the arguments of `center_crops` before any work.

    Raises:
        DataError: the manifest holds no images.
        UserError: size or batch size out of range, or an unknown loader.
    """
    if not manifest.images:
        raise DataError(
            f"{printable(manifest.folder)} holds no images that can be used; give a folder of JPEG, PNG or WebP"
        )
    if not MIN_SIDE <= size <= LARGEST_SIDE:
        raise UserError(f"crops of {size} px are out of range; choose a size from {MIN_SIDE} to {LARGEST_SIDE}")
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} images is empty; choose a batch size of at least 1")
    if loader not in LOADERS:
        raise UserError(f"unknown loader {loader!r}; choose one of {', '.join(LOADERS)}")


def center_crops(
    manifest: Manifest, size: int, *, batch_size: int, loader: str, device: torch.device, workers: int | None = None
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Load each image's center crop once, in an order of its own; an image's crop is the same in every pass.

    Args:
        manifest: of the folder; at least one image.
        size: side of the crops, in pixels.
        batch_size: images at a time; the last batch may hold fewer.
        loader: `dali` (decodes on the GPU if `device` is one) or `pillow`.
        device: of the crops.
        workers: threads or processes that decode; None: one per core.

    Yields:
        int64 `[B]` on the CPU, positions in `manifest.images`; and uint8 `[B, size, size, 3]` on the device.

    Raises:
        DataError: see `fastnst.data.open_loader`.
        UserError: DALI is not installed; or see `check_crops`.
    """
    check_crops(manifest, size, batch_size, loader)
    total = len(manifest.images)
    # The loader fills the last batch from its next pass; these images are cut off below.
    batch_size = min(batch_size, total)
    order = Sampler(0, total, batch_size, -(-total // batch_size), fit="center_crop", flip=False)
    config = DataConfig.model_validate({"loader": loader, "image_size": size, "workers": workers})
    with open_loader(manifest, order, config, device=device) as batches:
        for step, batch in enumerate(batches):
            count = min(batch_size, total - step * batch_size)
            yield torch.from_numpy(order.batch(step).indices[:count]), batch[:count]


def to_images(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 `[B, S, S, 3]` to `[B, 3, S, S]` in [0, 1], channels_last."""
    return batch.permute(0, 3, 1, 2).to(dtype).div_(255)
