"""Estimate the memory of a training step and the disk space of a run, before it starts."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from fastnst.config import Config
from fastnst.device import DTYPES
from fastnst.losses.fused import FusedPerceptualLoss
from fastnst.losses.perceptual import PerceptualLoss
from fastnst.models.transform_net import OutputMapping, TransformNet
from fastnst.models.vgg19 import VGG19, deepest_layer

_ADAM_TENSORS = 2
SMALLEST_STYLE = 32  # pixels; a Gram matrix does not depend on the size, and every layer accepts this one


@dataclass(frozen=True)
class Estimate:
    """Bytes, without the allocator's overhead and the convolutions' workspaces."""

    weights: int
    """Both networks, a copy of φ in the run's 16-bit type, gradients and Adam's moments."""
    activations: int
    """Tensors of one batch saved for backward, by autograd and by the fused loss."""
    disk: int
    """The most checkpoints at one time, and the style model; the log is not included."""

    @property
    def memory(self) -> int:
        return self.weights + self.activations


def estimate(config: Config, *, device_type: str, styles: int = 1) -> Estimate:
    """Count the bytes of a run's tensors with fake tensors, which have no storage.

    Args:
        config: with the resolved precision (not `auto`).
        device_type: `cuda` or `cpu`, for autocast's rules.
        styles: number of transform nets trained together, one after the other in each step.
    """
    net = TransformNet(config.model.architecture, config.model.norm)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vgg = VGG19(last_layer=deepest_layer([*config.loss.content_layers, *config.loss.style_layers]))
    loss = PerceptualLoss(vgg, config.loss)
    loss.set_style(torch.zeros(1, 3, SMALLEST_STYLE, SMALLEST_STYLE))
    dtype = DTYPES[config.train.precision]
    fused = config.train.engine == "fused" and not config.train.compile
    loss_pass: nn.Module = _FusedPass(loss, None if dtype == torch.float32 else dtype) if fused else loss
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    mode = FakeTensorMode()
    fake_net, fake_loss = _fake_tensors(net, mode), _fake_tensors(loss_pass, mode)
    fixed = {tensor.untyped_storage()._cdata for tensor in [*fake_net.values(), *fake_loss.values()]}
    side = config.data.image_size
    with (
        mode,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32),
    ):
        shape = (config.train.batch_size, side, side, 3)
        batch = torch.empty(shape, dtype=torch.uint8 if fused else torch.float32).permute(0, 3, 1, 2)
        output = functional_call(net, fake_net, (batch,), {"pre_activation": fused})
        mapping = {"mapping": net.output_mapping(output.shape[2:], batch.shape[2:])} if fused else {}
        loss_tensors = functional_call(loss_pass, fake_loss, (output, batch), mapping)
    if fused:
        for tensor in loss_tensors:
            keep(tensor)
    activations = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in fixed)
    del loss_tensors  # not earlier: freed storages' addresses, the keys of `saved`, are reused
    trained, frozen = (sum(p.nbytes for p in module.parameters()) for module in (net, vgg))
    cast = frozen // 4 * dtype.itemsize if fused and dtype != torch.float32 else 0
    trained *= styles
    per_checkpoint = trained * (1 + _ADAM_TENSORS)
    return Estimate(
        weights=frozen + cast + trained * (2 + _ADAM_TENSORS),
        activations=activations,
        # The oldest checkpoint is removed after the new one is written.
        disk=per_checkpoint * (config.train.keep_checkpoints + 1) + trained,
    )


class _FusedPass(nn.Module):
    """The fused loss's forward as a module, so that `functional_call` can replace its weights."""

    def __init__(self, loss: PerceptualLoss, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.loss, self.dtype = loss, dtype

    def forward(self, pre_activation: Tensor, content: Tensor, mapping: OutputMapping) -> list[Tensor]:
        """Return all tensors alive when the backward begins."""
        engine = FusedPerceptualLoss(self.loss, self.dtype)
        targets = engine.content_targets(content)
        u, _ = engine.preprocess(pre_activation, mapping)
        kept = [x for stage in engine.forward(u) for x in (*stage.outputs().values(), stage.switches)]
        return [x for x in (pre_activation, *targets.values(), *kept) if x is not None]


def _fake_tensors(module: nn.Module, mode: FakeTensorMode) -> dict[str, Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: mode.from_tensor(tensor) for name, tensor in named}
