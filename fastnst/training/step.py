"""One optimisation step: a uint8 batch in, loss terms out, weights changed in between."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnst.config import TrainConfig
from fastnst.device import DTYPES, resolve_precision
from fastnst.losses import LossTerms, PerceptualLoss
from fastnst.models.transform_net import TransformNet


def to_unit(batch: Tensor) -> Tensor:
    """uint8 `[N, H, W, 3]` → float32 `[N, 3, H, W]` in [0, 1], channels_last, as the permuted view is already."""
    return batch.permute(0, 3, 1, 2).float().div_(255.0)


@dataclass(frozen=True)
class Health:
    """Device-side record of what went wrong, read only when something is logged: no synchronisation between."""

    first_bad_step: Tensor
    """0-d int64: the first step with a non-finite loss, 0 while there is none."""

    @classmethod
    def on(cls, device: torch.device) -> "Health":
        return cls(torch.zeros((), dtype=torch.int64, device=device))

    def record(self, step: int, total: Tensor) -> None:
        is_first = ~torch.isfinite(total) & (self.first_bad_step == 0)
        self.first_bad_step.copy_(torch.where(is_first, step, self.first_bad_step))


class TrainingStep:
    """Forward, loss, backward and Adam for one batch, in the asked precision.

    Args:
        net: the transform net, in training mode, on the device.
        loss: its style is set.
        config: learning rate, precision (resolved: not `auto`) and compile.
        device: where both are.
    """

    def __init__(self, net: TransformNet, loss: PerceptualLoss, config: TrainConfig, device: torch.device) -> None:
        self.net = net
        self.device = device
        self.health = Health.on(device)
        self._dtype = DTYPES[resolve_precision(config.precision, device)]
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._dtype == torch.float16)
        self._forward: Callable[[Tensor], LossTerms] = self._loss_of
        self._loss = loss
        if config.compile:
            self._forward = torch.compile(self._loss_of)

    def __call__(self, step: int, batch: Tensor) -> LossTerms:
        """Train on `batch` (uint8 `[N, H, W, 3]` on the device); returns the detached terms, still on the device."""
        terms = self._forward(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(terms.total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        detached = terms.detach()
        self.health.record(step, detached.total)
        return detached

    def state_tensors(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, by dotted name; weights are below `model.`."""
        tensors = {f"model.{name}": tensor for name, tensor in self.net.state_dict().items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.net.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            tensors |= {f"optimizer.{key}.{names[parameter]}": value for key, value in moments.items()}
        return tensors

    def state_values(self) -> dict[str, float | int]:
        """The gradient scaler's state (empty unless training in fp16)."""
        return dict(self.scaler.state_dict())

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
        self.scaler.load_state_dict(scaler)

    def _loss_of(self, batch: Tensor) -> LossTerms:
        content = to_unit(batch)
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            return self._loss(self.net(content), content)
