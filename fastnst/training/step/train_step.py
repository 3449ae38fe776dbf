"""One training step: a uint8 batch in, loss terms out, weights changed in between.

    batch ─► transform net ─► φ and loss ─► gradient ─► backward ─► unscale, Adam ─► finite checks

`train_step` makes it for each style's net; `NetTrainer` does it for one net.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastnst.config import TrainConfig
from fastnst.device import DTYPES, resolve_precision
from fastnst.losses.fused import FusedPerceptualLoss
from fastnst.losses.perceptual import LossTerms, PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.training.monitoring.profiler import record_span
from fastnst.training.step.finite_checks import FiniteCheck, SkippedSteps, not_finite


def train_step(step: int | Tensor, batch: Tensor, trainers: "Sequence[NetTrainer]") -> list[LossTerms]:
    """Train each net on a batch; nets that share φ share its pass over the content, too.

    Args:
        step: counted from 1; 0-d int64 on the device where a CUDA graph counts.
        batch: uint8 `[N, H, W, 3]` on the device.
        trainers: one per style; the later ones share φ with the first.

    Returns:
        The detached terms of each, still on the device.
    """
    if len(trainers) == 1:
        return [trainers[0].train_step(step, batch)]
    content = trainers[0].content_features(batch)
    return [trainer.train_step(step, batch, content) for trainer in trainers]


def to_unit(batch: Tensor) -> Tensor:
    """uint8 `[N, H, W, 3]` → float32 `[N, 3, H, W]` in [0, 1], channels_last."""
    return batch.permute(0, 3, 1, 2).float().div_(255.0)


def as_images(batch: Tensor) -> Tensor:
    """uint8 `[N, H, W, 3]` → the same memory as `[N, 3, H, W]`, channels_last."""
    return batch.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ContentFeatures:
    """The part of a step that several nets share: the images and φ's features of them."""

    images: Tensor
    """`[N, 3, H, W]`, uint8."""
    targets: dict[str, Tensor]
    """φ of them, by content layer."""


class NetTrainer:
    """Trains one transform net: forward, loss, backward and Adam in the configured precision.

    Each step records, without waiting for the device, whether the loss, a gradient, a weight or a running statistic is
    not finite (`finite_check`), and whether the fp16 gradient scaler skipped it (`skipped_steps`). On a GPU that reads
    gradients and weights once more: 13 MB for the largest preset, in about a dozen launches.

    Args:
        net: the transform net, in training mode, on the device.
        loss: with its style set.
        config: learning rate, precision (resolved: not `auto`), engine and compile.
        device: where both are.
        parallel: the DistributedDataParallel wrapper of `net`, which is called in its place.
        shared_vgg: the trainer of another net with the same φ, layers and configuration; φ's prepared weights are
            kept once.
    """

    def __init__(
        self,
        net: TransformNet,
        loss: PerceptualLoss,
        config: TrainConfig,
        device: torch.device,
        *,
        parallel: nn.Module | None = None,
        shared_vgg: "NetTrainer | None" = None,
    ) -> None:
        self.net = net
        self._forward_net = net if parallel is None else parallel
        self.device = device
        self.finite_check = FiniteCheck(device)
        self.skipped_steps = SkippedSteps(device)
        self._dtype = DTYPES[resolve_precision(config.precision, device)]
        # Fused Adam computes the same whether or not it is capturable; a CUDA graph needs it to be.
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True, capturable=True)
        self.scaler = self._new_scaler()
        self.state_version = 0
        """Counts how often `load_state` or `discard_step` replaced tensors that a step changes."""
        self._loss = loss
        self._parameters = dict(net.named_parameters())
        self._state: dict[str, Tensor] = {**self._parameters, **dict(net.named_buffers())}
        self._engine: FusedPerceptualLoss | None = None
        self._forward: Callable[[Tensor], LossTerms] = self._autograd_loss
        if config.compile:
            self._forward = torch.compile(self._autograd_loss)
        elif config.engine == "fused":
            self._engine = FusedPerceptualLoss(
                loss,
                None if self._dtype == torch.float32 else self._dtype,
                shared_vgg=shared_vgg._engine if shared_vgg is not None else None,
            )

    def train_step(self, step: int | Tensor, batch: Tensor, content: ContentFeatures | None = None) -> LossTerms:
        """Train the net on a batch.

        Args:
            step: counted from 1; 0-d int64 on the device where a CUDA graph counts.
            batch: uint8 `[N, H, W, 3]` on the device.
            content: `content_features` of the batch, if several nets share them.

        Returns:
            The detached terms, still on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self._engine is None:
            terms = self._forward(batch)
            with record_span("backward"):
                self.scaler.scale(terms.total).backward()
        else:
            terms = self._fused_pass(self._engine, batch, content)
        with record_span("optimiser"):
            self.scaler.unscale_(self.optimizer)
            updates = self._num_updates().clone()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        detached = terms.detach()
        self._record_findings(step, detached, skipped=self._num_updates() == updates)
        return detached

    def content_features(self, batch: Tensor) -> ContentFeatures | None:
        """Return what other nets may share of this batch; None with autograd, where each computes it itself."""
        if self._engine is None:
            return None
        images = as_images(batch)
        with record_span("content pass"):
            return ContentFeatures(images, self._engine.content_targets(images))

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that the next step depends on, by dotted name; weights are below `model.`."""
        tensors = {f"model.{name}": tensor for name, tensor in self.net.state_dict().items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.net.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            tensors |= {f"optimizer.{key}.{names[parameter]}": value for key, value in moments.items()}
        return tensors

    def state_values(self) -> dict[str, float | int]:
        """Return the gradient scaler's state and its counts of skipped steps (empty unless training in fp16)."""
        if not self.scaler.is_enabled():
            return {}
        total, in_a_row = self.skipped_steps.read()
        return {**self.scaler.state_dict(), "skipped_steps": total, "skipped_in_a_row": in_a_row}

    def load_state(self, tensors: dict[str, Tensor], scaler: dict[str, float | int]) -> None:
        """Continue from what `state_tensors` and `state_values` returned."""
        model = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        self.net.load_state_dict(model)
        for name, parameter in self.net.named_parameters():
            moments = {
                key: tensors[f"optimizer.{key}.{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{key}.{name}" in tensors
            }
            # Clones, in the parameter's own layout: Adam writes into them, and fused Adam wants equal strides.
            self.optimizer.state[parameter] = {
                key: torch.empty_like(parameter).copy_(value) if key != "step" else value.clone().to(self.device)
                for key, value in moments.items()
            }
        if scaler:  # empty where the run was not in fp16 before
            self.scaler.load_state_dict(scaler)
        self.skipped_steps.restore(int(scaler.get("skipped_steps", 0)), int(scaler.get("skipped_in_a_row", 0)))
        self.state_version += 1

    def discard_step(self) -> None:
        """Discard a step whose capture failed; nothing ran on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            # The old scaler refuses another step before the begun one is updated.
            begun, self.scaler = self.scaler, self._new_scaler()
            self.scaler.load_state_dict(begun.state_dict())
        self.state_version += 1

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self._dtype == torch.float16)

    def _autograd_loss(self, batch: Tensor) -> LossTerms:
        content = to_unit(batch)
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            stylized = self._transform(content, pre_activation=False)
            with record_span("loss network"):
                terms: LossTerms = self._loss(stylized, content)
                return terms

    def _fused_pass(self, engine: FusedPerceptualLoss, batch: Tensor, content: ContentFeatures | None) -> LossTerms:
        """Forward and backward of one batch, with the engine's own gradient of the loss."""
        # First, while the transform net holds nothing: a pass without gradient needs its two largest layers at once.
        content = content or self.content_features(batch)
        assert content is not None
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            pre_activation = self._transform(content.images, pre_activation=True)
        mapping = self.net.output_mapping(pre_activation.shape[2:], content.images.shape[2:])
        scale = self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else None
        with record_span("loss network"):
            terms, gradient = engine.loss_and_grad(pre_activation.detach(), mapping, content.targets, scale)
        del content  # and its targets, unless the next net needs them
        with record_span("backward"):
            pre_activation.backward(gradient)
        return terms

    def _transform(self, content: Tensor, *, pre_activation: bool) -> Tensor:
        with record_span("transform net"):
            made: Tensor = self._forward_net(content, pre_activation=pre_activation)
        return made

    def _num_updates(self) -> Tensor:
        """Updates that Adam has made, 0-d on the device; a step that the scaler skipped is none."""
        state = self.optimizer.state.get(next(iter(self._parameters.values())))
        return state["step"] if state else torch.zeros((), device=self.device)

    @torch.no_grad()
    def _record_findings(self, step: int | Tensor, terms: LossTerms, *, skipped: Tensor) -> None:
        losses = {"total": terms.total, "tv": terms.tv} | terms.layers
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        names = [f"loss/{name}" for name in losses]
        names += [f"the gradient of {name}" for name in gradients]
        num_transient = len(names)
        names += [f"model.{name}" for name in self._state]
        bad = not_finite([*losses.values(), *gradients.values(), *self._state.values()])
        if self.scaler.is_enabled():
            self.skipped_steps.record(skipped)
            # A skipped step's loss and gradients are gone; what it left in the net is not.
            bad[:num_transient] &= ~skipped
        self.finite_check.record(step, names, bad)
