"""The images of a folder as VGG19 looks at them: the middle square of each, exactly once."""

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
"""Pixels of a square, as for training."""


def check_squares(manifest: Manifest, size: int, batch_size: int, loader: str) -> None:
    """What `squares` is asked for, before any work.

    Raises:
        DataError: the manifest holds no images.
        UserError: a size, batch size or loader that cannot be used.
    """
    if not manifest.images:
        raise DataError(
            f"{printable(manifest.folder)} holds no images that can be used; give a folder of JPEG, PNG or WebP"
        )
    if not MIN_SIDE <= size <= LARGEST_SIDE:
        raise UserError(f"squares of {size} px cannot be had; choose a size from {MIN_SIDE} to {LARGEST_SIDE}")
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} images holds nothing; choose a batch size of at least 1")
    if loader not in LOADERS:
        raise UserError(f"unknown loader {loader!r}; choose one of {', '.join(LOADERS)}")


def squares(
    manifest: Manifest, size: int, *, batch_size: int, loader: str, device: torch.device, workers: int | None = None
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """One pass over the images, in an order of its own.

    An image becomes the same square in every pass: what it is does not depend on its neighbours.

    Args:
        manifest: of the folder; at least one image.
        size: side of the squares, in pixels.
        batch_size: images at a time; the last batch may hold fewer.
        loader: `dali` (decodes on the GPU where `device` is one) or `pillow`.
        device: where the squares go.
        workers: threads or processes that decode; None: one for each core.

    Yields:
        int64 `[B]` on the CPU, positions in `manifest.images`; and uint8 `[B, size, size, 3]` on the device.

    Raises:
        DataError: see `fastnst.data.open_loader`.
        UserError: DALI is asked for and not installed; or see `check_squares`.
    """
    check_squares(manifest, size, batch_size, loader)
    total = len(manifest.images)
    # Runs read full batches: where images run out, the next pass begins, and its images are cut off below.
    batch_size = min(batch_size, total)
    order = Sampler(0, total, batch_size, -(-total // batch_size), fit="center_crop", flip=False)
    config = DataConfig.model_validate({"loader": loader, "image_size": size, "workers": workers})
    with open_loader(manifest, order, config, device=device) as batches:
        for step, batch in enumerate(batches):
            once = min(batch_size, total - step * batch_size)
            yield torch.from_numpy(order.batch(step).indices[:once]), batch[:once]


def to_images(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 `[B, S, S, 3]` as `[B, 3, S, S]` in [0, 1], channels_last."""
    return batch.permute(0, 3, 1, 2).to(dtype).div_(255)
