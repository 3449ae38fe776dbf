"""Training images: which there are (`manifest`), in which order (`order`), and how they are loaded.

Two loaders decode the files of a folder, by DALI or by Pillow; a third reads what was decoded once (`cache`).
"""

import os
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from fastnst.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastnst.config import DataConfig
    from fastnst.data.manifest import Manifest
    from fastnst.data.replacements import ImageReplacer
    from fastnst.data.sampler import Sampler


MOST_WORKERS = 16
"""Where `data.workers` is unset: more than this, one disk and one GPU have no use for."""


class Loader(Protocol):
    """Batches of a run, in order: uint8 `[B, S, S, 3]` on the device, each a tensor of its own."""

    def __iter__(self) -> "Iterator[torch.Tensor]": ...

    def __next__(self) -> "torch.Tensor": ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def seek(self, step: int) -> None:
        """Go on with `step`, read anew: images have failed that this loader does not know of."""

    def close(self) -> None:
        """End threads and processes; may be called twice."""


def open_loader(
    manifest: "Manifest",
    order: "Sampler",
    config: "DataConfig",
    *,
    device: "torch.device",
    start_step: int = 0,
    rank: int = 0,
    replacements: "ImageReplacer | None" = None,
) -> Loader:
    """The batches of steps `start_step` … `order.steps` - 1.

    All loaders deliver the same images in the same order. On a CPU no value of DALI's and Pillow's differs by more
    than 1 of 255, and the mean difference of an image is below 0.3: the rounding of two resamplers. How a cache
    relates to them says `fastnst.data.cache`. What a batch holds depends on its step alone, not on where the loader
    started.

    Args:
        manifest: of the folder; that of a cache (`CachedManifest`) is read as one, whatever `loader` says.
        order: made for `len(manifest.images)` images.
        config: `loader`, `image_size`, `workers` and `prefetch` are used; `fit` and `flip` are the order's.
        device: where batches go; DALI decodes there if it is a GPU.
        start_step: first step to deliver.
        rank: this process's share of each batch.
        replacements: what stands in for images that changed or went away since the folder was checked, or that kill
            what decodes them, and who is told. None: nothing does, and the first such image is an error.

    Raises:
        UserError: DALI is asked for and not installed.
        DataError: a shard of a cache is missing, or changes; or, while iterating: more images failed than may fail,
            loading processes are killed again and again, or DALI failed twice in one step.
    """
    from fastnst.data.cache.format import CachedManifest
    from fastnst.data.replacements import ImageReplacer

    assert order.num_images == len(manifest.images), (order.num_images, len(manifest.images))
    replacements = replacements or ImageReplacer(manifest)
    if config.workers is None:
        workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        config = config.model_copy(update={"workers": workers})
    if isinstance(manifest, CachedManifest):
        from fastnst.data.loaders.cache import CacheLoader

        return CacheLoader(
            manifest, order, config, device=device, replacements=replacements, start_step=start_step, rank=rank
        )
    if config.loader == "pillow":
        from fastnst.data.loaders.pillow import PillowLoader

        return PillowLoader(
            manifest, order, config, device=device, replacements=replacements, start_step=start_step, rank=rank
        )
    try:
        from fastnst.data.loaders.dali import DaliLoader
    except ImportError as error:
        raise UserError(
            f"data.loader is 'dali', which cannot be used here ({error}); "
            "use --loader pillow, or install nvidia-dali-cuda130 (Linux on x86-64 only)"
        ) from error
    return DaliLoader(
        manifest, order, config, device=device, replacements=replacements, start_step=start_step, rank=rank
    )


def loader_name(manifest: "Manifest", config: "DataConfig") -> str:
    """What `open_loader` would choose, for people."""
    from fastnst.data.cache.format import CachedManifest

    return "cache" if isinstance(manifest, CachedManifest) else config.loader
