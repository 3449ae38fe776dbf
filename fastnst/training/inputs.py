"""Check and read what a run needs from outside, before its directory is touched."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastnst.config import Config, DataConfig, StyleConfig, TrainConfig
from fastnst.data.cache.format import is_cache
from fastnst.data.cache.verify import open_cache
from fastnst.data.folder import check_folder
from fastnst.data.manifest import Manifest, build_manifest
from fastnst.data.replacements import REJECTED_NAME, ReadFailure, with_failed
from fastnst.device import resolve_device, resolve_precision
from fastnst.errors import UserError
from fastnst.images import printable, read_image, to_tensor
from fastnst.models.vgg19 import VGG19, deepest_layer
from fastnst.models.weights import load_vgg19
from fastnst.progress import counted
from fastnst.storage import sha256_of

log = logging.getLogger(__name__)

LARGEST_STYLE_SIDE = 1024


@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads from outside."""

    config: Config
    device: torch.device
    style: Tensor
    """`[1, 3, H, W]` in [0, 1], on the CPU."""
    style_sha256: str
    manifest: Manifest
    vgg: VGG19
    steps: int
    late: tuple[ReadFailure, ...] = ()
    """Images of the manifest that failed in the run that is resumed."""

    def fingerprints(self) -> dict[str, str]:
        """Return SHA-256s that must be the same when the run is resumed: of images, style and VGG19."""
        return {"data": self.manifest.fingerprint, "style": self.style_sha256, "vgg": self._vgg_sha256}

    @cached_property
    def _vgg_sha256(self) -> str:
        # Only the layers that the loss needs: projections may need more.
        loss = self.config.loss
        needed = self.vgg.layers[: self.vgg.layers.index(deepest_layer([*loss.content_layers, *loss.style_layers])) + 1]
        digest = hashlib.sha256(self.vgg.flavour.encode())
        for name, tensor in self.vgg.state_dict().items():
            if name.partition(".")[0] in needed:
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def resolve(config: Config) -> tuple[Config, torch.device]:
    """Return the configuration with `auto` replaced by this machine's precision, and the device.

    Raises:
        DeviceError: no such device, or it does not compute in that precision.
    """
    device = resolve_device(config.train.device)
    train_config = config.train.model_copy(update={"precision": resolve_precision(config.train.precision, device)})
    return config.model_copy(update={"train": train_config}), device


def read_inputs(config: Config, device: torch.device, late: Sequence[ReadFailure] = ()) -> Inputs:
    """Check and read all that a run needs, cheapest first, so that mistakes show early.

    Args:
        config: resolved.
        device: where training runs.
        late: images that failed in the run that is resumed; they keep their places in the manifest.
    """
    style, style_sha256 = read_style(config.style)
    check_folder(config.data.folder)
    watched_layers = [name.partition(":")[0] for name in config.visualize.vgg_maps]
    vgg = load_vgg19(
        config.loss.vgg,
        last_layer=deepest_layer([*config.loss.content_layers, *config.loss.style_layers, *watched_layers]),
        flavour=config.loss.vgg_flavour,
        seed=config.train.seed,
    )
    manifest = read_manifest(config.data)
    log_rejected(manifest)
    manifest = with_failed(manifest, late)
    check_batch(config, len(manifest.images))
    steps = total_steps(config.train, len(manifest.images))
    return Inputs(config, device, style, style_sha256, manifest, vgg, steps, tuple(late))


def read_style(config: StyleConfig) -> tuple[Tensor, str]:
    """Return the style image, `[1, 3, H, W]` in [0, 1], at `style.size`, and the SHA-256 of its file."""
    if config.image is None:
        raise UserError("no style image; give one with --style IMAGE")
    pixels = Image.fromarray(read_image(config.image))
    side = min(config.size or LARGEST_STYLE_SIDE, max(pixels.size))
    if side < max(pixels.size):
        scale = side / max(pixels.size)
        size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    return to_tensor(np.asarray(pixels)), sha256_of(config.image)


def read_manifest(config: DataConfig) -> Manifest:
    """Return the checked images of the data folder, or of a cache."""
    folder = check_folder(config.folder)
    if is_cache(folder):
        with counted("verify cache", "MB", scale=1e6) as progress:
            manifest: Manifest = open_cache(folder, size=config.image_size, fit=config.fit, progress=progress)
    else:
        with counted("check images", "images") as progress:
            manifest = build_manifest(folder, progress=progress, allow_uniform=False)
    return manifest


def log_rejected(manifest: Manifest) -> None:
    """Warn of images that the check refused."""
    if manifest.rejected:
        first = manifest.rejected[0]
        log.warning(
            "%d of %d images refused (the first: %s: %s); all are listed in %s",
            len(manifest.rejected),
            len(manifest.rejected) + len(manifest.images),
            printable(first.path),
            first.reason,
            REJECTED_NAME,
        )


def check_batch(config: Config, num_images: int) -> None:
    """Raise UserError if a step would read more images than there are: it would see some of them twice."""
    if num_images < config.train.batch_size:
        raise UserError(
            f"train.batch_size is {config.train.batch_size}, and {printable(str(config.data.folder))} holds "
            f"{num_images} usable images; add some, or use --set train.batch_size={num_images} or less"
        )


def total_steps(config: TrainConfig, num_images: int) -> int:
    """Return the steps of the whole run: `train.steps`, else enough for `train.epochs` passes."""
    return config.steps or max(1, math.ceil(config.epochs * num_images / config.batch_size))
