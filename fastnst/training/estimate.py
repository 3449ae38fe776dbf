"""What a run will need, before it starts: memory of one training step and disk of its run directory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnst.config import Config
from fastnst.device import DTYPES
from fastnst.losses import PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.models.vgg19 import VGG19, deepest_layer

_ADAM_TENSORS = 2


@dataclass(frozen=True)
class Estimate:
    """Bytes, counted on tensors without storage; allocator overhead and convolution workspaces come on top."""

    weights: int
    """Both networks, the gradients and Adam's moments."""
    activations: int
    """What autograd keeps between forward and backward of one batch."""
    disk: int
    """Checkpoints at their most numerous and the style model; the log comes on top."""

    @property
    def memory(self) -> int:
        return self.weights + self.activations


def estimate(config: Config, *, device_type: str) -> Estimate:
    """Count the bytes of a run's tensors without allocating them.

    Args:
        config: architecture, loss layers, batch and picture size, precision (resolved: not `auto`).
        device_type: `cuda` or `cpu`, whose autocast rules apply.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    layers = [*config.loss.content_layers, *config.loss.style_layers]
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(), torch.device("cpu"):
        net = TransformNet(config.model.architecture, config.model.norm)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        vgg = VGG19(last_layer=deepest_layer(layers))
        loss = PerceptualLoss(vgg, config.loss)
        side = config.data.image_size
        loss.set_style(torch.empty(1, 3, side, side))
        fixed = {p.untyped_storage()._cdata for p in [*net.parameters(), *loss.parameters()]}
        batch: Any = torch.empty(config.train.batch_size, 3, side, side).to(memory_format=torch.channels_last)
        dtype = DTYPES[config.train.precision]
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            total = loss(net(batch), batch).total
        activations = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in fixed)
        trained = sum(p.nbytes for p in net.parameters())
        frozen = sum(p.nbytes for p in vgg.parameters())
        del total
    per_checkpoint = trained * (1 + _ADAM_TENSORS)
    return Estimate(
        weights=frozen + trained * (2 + _ADAM_TENSORS),
        activations=activations,
        # While one is written, the one that it replaces is still there.
        disk=per_checkpoint * (config.train.keep_checkpoints + 1) + trained,
    )
