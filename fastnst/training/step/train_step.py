"""One optimisation step: a uint8 batch in, loss terms out, weights changed in between."""

from collections.abc import Callable
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


def to_unit(batch: Tensor) -> Tensor:
    """uint8 `[N, H, W, 3]` → float32 `[N, 3, H, W]` in [0, 1], channels_last, as the permuted view is already."""
    return batch.permute(0, 3, 1, 2).float().div_(255.0)


def as_images(batch: Tensor) -> Tensor:
    """uint8 `[N, H, W, 3]` → the same memory as `[N, 3, H, W]`, channels_last."""
    return batch.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ContentFeatures:
    """What steps of several networks on one batch have in common."""

    images: Tensor
    """`[N, 3, H, W]`, uint8."""
    targets: dict[str, Tensor]
    """φ of them, by content layer."""


class TrainingStep:
    """Forward, loss, backward and Adam for one batch, in the asked precision.

    Each step also takes down whether the loss, a gradient, a weight or a running statistic is not finite (`health`),
    and whether the gradient scaler left it out (`skipped`, in fp16 alone), without waiting for the device. On a GPU
    that reads gradients and weights once more, 13 MB for the largest preset, in about a dozen launches.

    Args:
        net: the transform net, in training mode, on the device.
        loss: its style is set.
        config: learning rate, precision (resolved: not `auto`), engine and compile.
        device: where both are.
        parallel: what is called in place of `net`, to share its gradients with other processes.
        beside: the step of another network with the same φ, layers and configuration; φ's weights are kept once.
    """

    def __init__(
        self,
        net: TransformNet,
        loss: PerceptualLoss,
        config: TrainConfig,
        device: torch.device,
        *,
        parallel: nn.Module | None = None,
        beside: "TrainingStep | None" = None,
    ) -> None:
        self.net = net
        self._called = net if parallel is None else parallel
        self.device = device
        self.health = FiniteCheck(device)
        self.skipped = SkippedSteps(device)
        self._dtype = DTYPES[resolve_precision(config.precision, device)]
        # Fused Adam computes the same whether or not it is capturable, which a CUDA graph wants to be told.
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True, capturable=True)
        self.scaler = self._new_scaler()
        self.loads = 0
        """How often `load_state` or `discard_step` has put other tensors in the place of those that a step changes."""
        self._loss = loss
        self._parameters = dict(net.named_parameters())
        self._state: dict[str, Tensor] = {**self._parameters, **dict(net.named_buffers())}
        self._engine: FusedPerceptualLoss | None = None
        self._forward: Callable[[Tensor], LossTerms] = self._loss_of
        if config.compile:
            self._forward = torch.compile(self._loss_of)
        elif config.engine == "fused":
            self._engine = FusedPerceptualLoss(
                loss,
                None if self._dtype == torch.float32 else self._dtype,
                shared_vgg=beside._engine if beside is not None else None,
            )

    def __call__(self, step: int | Tensor, batch: Tensor, content: ContentFeatures | None = None) -> LossTerms:
        """Train on a batch.

        Args:
            step: counted from 1; 0-d int64 on the device where a CUDA graph counts (see `captured`).
            batch: uint8 `[N, H, W, 3]` on the device.
            content: `content_of` the batch, from this step or one beside it, where several share it.

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
            updates = self._updates().clone()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        detached = terms.detach()
        self._record(step, detached, skipped=self._updates() == updates)
        return detached

    def content_of(self, batch: Tensor) -> ContentFeatures | None:
        """What steps beside this one may share of a batch; None where each has to compute it itself (autograd)."""
        if self._engine is None:
            return None
        images = as_images(batch)
        with record_span("content pass"):
            return ContentFeatures(images, self._engine.content_targets(images))

    def state_tensors(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, by dotted name; weights are below `model.`."""
        tensors = {f"model.{name}": tensor for name, tensor in self.net.state_dict().items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.net.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            tensors |= {f"optimizer.{key}.{names[parameter]}": value for key, value in moments.items()}
        return tensors

    def state_values(self) -> dict[str, float | int]:
        """The gradient scaler's state and what it skipped (empty unless training in fp16)."""
        if not self.scaler.is_enabled():
            return {}
        total, in_a_row = self.skipped.read()
        return {**self.scaler.state_dict(), "skipped_steps": total, "skipped_in_a_row": in_a_row}

    def load_state(self, tensors: dict[str, Tensor], scaler: dict[str, float | int]) -> None:
        """Continue from what `state_tensors` and `state_values` gave."""
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
        self.skipped.restore(int(scaler.get("skipped_steps", 0)), int(scaler.get("skipped_in_a_row", 0)))
        self.loads += 1

    def discard_step(self) -> None:
        """Forget a step that was begun and did not reach its end, of which the device has computed nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            # One that knows of no step, since this one refuses to begin another.
            begun, self.scaler = self.scaler, self._new_scaler()
            self.scaler.load_state_dict(begun.state_dict())
        self.loads += 1

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self._dtype == torch.float16)

    def _loss_of(self, batch: Tensor) -> LossTerms:
        content = to_unit(batch)
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            stylized = self._transformed(content, raw=False)
            with record_span("loss network"):
                return self._loss(stylized, content)

    def _fused_pass(self, engine: FusedPerceptualLoss, batch: Tensor, content: ContentFeatures | None) -> LossTerms:
        """Forward and backward of one batch."""
        # First, while the transform net holds nothing: a pass without gradient needs its two largest layers at once.
        content = content or self.content_of(batch)
        assert content is not None
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            raw = self._transformed(content.images, raw=True)
        painted = self.net.output_mapping(raw.shape[2:], content.images.shape[2:])
        scale = self.scaler.scale(torch.ones((), device=self.device)) if self.scaler.is_enabled() else None
        with record_span("loss network"):
            terms, gradient = engine.loss_and_grad(raw.detach(), painted, content.targets, scale)
        del content  # and its targets, unless the next network wants them
        with record_span("backward"):
            raw.backward(gradient)
        return terms

    def _transformed(self, content: Tensor, *, raw: bool) -> Tensor:
        """The one place that calls the transform net."""
        with record_span("transform net"):
            made: Tensor = self._called(content, pre_activation=raw)
        return made

    def _updates(self) -> Tensor:
        """How many updates Adam has made, 0-d on the device; a step that the scaler left out is none."""
        state = self.optimizer.state.get(next(iter(self._parameters.values())))
        return state["step"] if state else torch.zeros((), device=self.device)

    @torch.no_grad()
    def _record(self, step: int | Tensor, terms: LossTerms, *, skipped: Tensor) -> None:
        losses = {"total": terms.total, "tv": terms.tv} | terms.layers
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        names = [f"loss/{name}" for name in losses]
        names += [f"the gradient of {name}" for name in gradients]
        passing = len(names)
        names += [f"model.{name}" for name in self._state]
        bad = not_finite([*losses.values(), *gradients.values(), *self._state.values()])
        if self.scaler.is_enabled():
            self.skipped.record(skipped)
            # What a skipped step computed is gone; what it left in the network is not.
            bad[:passing] &= ~skipped
        self.health.record(step, names, bad)
