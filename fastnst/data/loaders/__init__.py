"""Load the batches of a run: decoded by DALI or by Pillow, or read from a cache."""

from typing import TYPE_CHECKING

from fastnst.data.cache.format import CachedManifest
from fastnst.data.loaders.base import MAX_WORKERS, Loader, LoaderArgs
from fastnst.data.manifest import Manifest
from fastnst.data.replacements import ImageReplacer
from fastnst.data.sampler import Sampler
from fastnst.errors import UserError

# torch is imported in functions only: the Pillow loader's worker processes do without it.
if TYPE_CHECKING:
    import torch

    from fastnst.config import DataConfig

__all__ = ["MAX_WORKERS", "Loader", "loader_name", "open_loader"]


def open_loader(
    manifest: Manifest,
    sampler: Sampler,
    config: "DataConfig",
    *,
    device: "torch.device",
    start_step: int = 0,
    rank: int = 0,
    replacer: ImageReplacer | None = None,
) -> Loader:
    """Open the loader for steps `start_step` … `sampler.steps` - 1.

    All loaders deliver the same images in the same order. On a CPU, DALI and Pillow differ by at most 1 of 255 in any
    value and by less than 0.3 on average over an image, since two resamplers round differently; for a cache, see
    `fastnst.data.cache.format`. A batch depends on its step, not on `start_step`.

    Args:
        manifest: images of the run; a `CachedManifest` is read from its cache, whatever `config.loader` says.
        sampler: made for `len(manifest.images)` images; determines fit and flips.
        config: `loader`, `image_size`, `workers` and `prefetch` are used.
        device: device of the batches; DALI decodes there if it is a GPU.
        start_step: first step to deliver.
        rank: which slice of each batch to read.
        replacer: replaces images that changed, vanished or crash their decoder since the check. Default: none may fail.

    Raises:
        UserError: DALI is requested and not installed.
        DataError: a shard of a cache is missing or changes. While iterating: more images failed than allowed, worker
            processes crash repeatedly, or DALI failed twice in one step.
    """
    assert sampler.num_images == len(manifest.images), (sampler.num_images, len(manifest.images))
    loader = _loader_class(loader_name(manifest, config))
    return loader(LoaderArgs(manifest, sampler, config, device, replacer or ImageReplacer(manifest), start_step, rank))


def loader_name(manifest: Manifest, config: "DataConfig") -> str:
    """Return which loader `open_loader` opens: `cache`, `dali` or `pillow`."""
    return "cache" if isinstance(manifest, CachedManifest) else config.loader


def _loader_class(name: str) -> type[Loader]:
    if name == "cache":
        from fastnst.data.loaders.cache import CacheLoader

        return CacheLoader
    if name == "pillow":
        from fastnst.data.loaders.pillow import PillowLoader

        return PillowLoader
    try:
        from fastnst.data.loaders.dali import DaliLoader
    except ImportError as error:
        raise UserError(
            f"data.loader is 'dali', which cannot be used here ({error}); "
            "use --loader pillow, or install nvidia-dali-cuda130 (Linux on x86-64 only)"
        ) from error
    return DaliLoader
