"""Batches of the center crops of a folder, each image exactly once."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastnst.config import DataConfig
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import Manifest
from fastnst.data.sampler import Sampler
from fastnst.errors import DataError
from fastnst.images import printable
from fastnst.visualize.attribution.targets import check_at_least_one, check_choice
from fastnst.visualize.deconv.receptive_field import check_size

LOADERS = ("pillow", "dali")


@dataclass(frozen=True)
class CenterCrops:
    """The center crops of a folder's images; iterating loads each once, in an order of its own.

    An image's crop is the same in every pass.

    Attributes:
        manifest: the images, at least one.
        size: side of the crops, in pixels.
        device: of the batches.
        loader: `dali` (decodes on the GPU if `device` is one) or `pillow`.
        batch_size: images at a time; the last batch may hold fewer. It may change the last digits of activations, as
            convolutions round.
        workers: threads or processes that decode; None: one per core.

    Raises:
        DataError: no images; while iterating, see `fastnst.data.loaders.open_loader`.
        UserError: size, batch size or loader out of range; while iterating, DALI is not installed.
    """

    manifest: Manifest
    size: int
    device: torch.device
    loader: str = "pillow"
    batch_size: int = 16
    workers: int | None = None

    def __post_init__(self) -> None:
        if not self.manifest.images:
            folder = printable(self.manifest.folder)
            raise DataError(f"{folder} holds no images that can be used; give a folder of photos")
        check_size(self.size)
        check_at_least_one("batch_size", self.batch_size)
        check_choice("loader", self.loader, LOADERS)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.manifest.images)

    def __iter__(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield int64 `[B]` on the CPU, positions in `manifest.images`, and uint8 `[B, size, size, 3]`."""
        # The loader fills the last batch from its next pass; these images are cut off below.
        batch_size = min(self.batch_size, len(self))
        order = Sampler(0, len(self), batch_size, -(-len(self) // batch_size), fit="center_crop", flip=False)
        settings = {"loader": self.loader, "image_size": self.size, "workers": self.workers}
        with open_loader(self.manifest, order, DataConfig.model_validate(settings), device=self.device) as batches:
            for step, batch in enumerate(batches):
                count = min(batch_size, len(self) - step * batch_size)
                yield torch.from_numpy(order.batch(step).indices[:count]), batch[:count]

    def subset(self, images: Iterable[int]) -> "CenterCrops":
        """Keep these images only."""
        manifest = replace(self.manifest, images=[self.manifest.images[index] for index in images])
        return replace(self, manifest=manifest)


def to_images(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 `[B, S, S, 3]` to `[B, 3, S, S]` in [0, 1], channels_last."""
    return batch.permute(0, 3, 1, 2).to(dtype).div_(255)
