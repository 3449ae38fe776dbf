"""Providers of a training step: `fastnst` itself, and the baselines as users run them.

Each provider owns a transform net with the same initial weights, the same VGG19, the style's Gram matrices, Adam. A
call takes one uint8 batch `[N, S, S, 3]` on the device and runs one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastnst.config import Config
from fastnst.device import DTYPES
from fastnst.losses.perceptual import PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.models.vgg19 import VGG19, deepest_layer
from fastnst.training.step.graphed_step import GraphedStep
from fastnst.training.step.train_step import NetTrainer
from step_bench.baseline import BaselineLoss, BaselineTransformNet, BaselineVGG19, common_name

STYLE_SIDE = 256


@dataclass(frozen=True)
class Task:
    """Networks, weights, style and loss for all providers."""

    config: Config
    """With device and precision resolved."""
    device: torch.device
    transform: dict[str, Tensor]
    """Initial weights of the transform net, on the CPU."""
    vgg: dict[str, Tensor]
    """VGG19's weights, on the CPU."""
    style: Tensor
    """`[1, 3, H, W]` in [0, 1], on the CPU."""

    @property
    def last_layer(self) -> str:
        loss = self.config.loss
        return deepest_layer([*loss.content_layers, *loss.style_layers])


class Provider(Protocol):
    """One implementation of the training step."""

    precision: str
    notes: dict[str, Any]
    net: nn.Module

    def __call__(self, batch: Tensor) -> Tensor:
        """Run a step; return the loss before it, 0-d, detached."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The transform net's parameters by `fastnst`'s names."""

    def persistent_tensors(self) -> Iterator[Tensor]:
        """Weights of both networks, the optimiser's state and the style's Grams: not "beyond the weights"."""


def make_task(config: Config, device: torch.device) -> Task:
    """Make seeded weights and a style of noise; a step's time does not depend on the values."""
    generator = torch.Generator().manual_seed(config.train.seed)
    net = TransformNet(config.model.architecture, config.model.norm, generator=generator)
    loss = config.loss
    vgg = VGG19(deepest_layer([*loss.content_layers, *loss.style_layers]), generator=generator)
    style = torch.rand(1, 3, STYLE_SIDE, STYLE_SIDE, generator=generator)
    return Task(config, device, net.state_dict(), vgg.state_dict(), style)


class Fastnst:
    """fastnst's own `NetTrainer`, captured or launched as by `fastnst train` with this configuration.

    `notes` holds whether the newest step was captured.
    """

    def __init__(self, task: Task) -> None:
        config, device = task.config, task.device
        self.precision = config.train.precision
        self.notes: dict[str, Any] = {"engine": config.train.engine, "compile": config.train.compile}
        self.net = TransformNet(config.model.architecture, config.model.norm)
        self.net.load_state_dict(task.transform)
        self.net.to(device=device, memory_format=torch.channels_last)
        self.net.train()
        vgg = VGG19(task.last_layer)
        vgg.load_state_dict(task.vgg)
        self._loss = PerceptualLoss(vgg, config.loss).to(device=device)
        self._loss.set_style(task.style.to(device))
        self._step = NetTrainer(self.net, self._loss, config.train, device)
        self._steps = GraphedStep(config.train, device)
        self._made = 0

    def __call__(self, batch: Tensor) -> Tensor:
        self._made += 1
        (terms,) = self._steps(self._made, batch, [self._step])
        self.notes["captured"] = self._steps.captured
        return terms.total

    def fetch(self, batches: Iterator[Tensor]) -> Tensor:
        """Fetch a loader's next batch as in training, for the next step."""
        return self._steps.fetch(batches)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def persistent_tensors(self) -> Iterator[Tensor]:
        yield from (*self._loss.parameters(), *self._loss.buffers())
        yield from self._step.state_tensors().values()


class Baseline:
    """The plain formulation of `step_bench.baseline` with Adam.

    Args:
        task: networks, weights, style, loss.
        precision: `fp32`, `bf16` or `fp16` by autocast, or `fp64`; VGG19, which is frozen, is cast to it.
        channels_last: the layout of weights and images; else contiguous.
        compiled: None, or the options of `torch.compile`.
    """

    def __init__(
        self, task: Task, precision: str, *, channels_last: bool, compiled: dict[str, Any] | None = None
    ) -> None:
        config, device = task.config, task.device
        self.precision = precision
        self.notes: dict[str, Any] = {"channels_last": channels_last}
        layout = torch.channels_last if channels_last else torch.contiguous_format
        dtype = torch.float64 if precision == "fp64" else DTYPES[precision]
        kept_dtype = torch.float64 if precision == "fp64" else torch.float32
        self.net = BaselineTransformNet(config.model.architecture)
        self.net.load_fastnst_state(task.transform)
        self.net.to(device=device, dtype=kept_dtype, memory_format=layout)
        loss = config.loss
        vgg = BaselineVGG19(tuple(dict.fromkeys((*loss.content_layers, *loss.style_layers))))
        vgg.load_state_dict(task.vgg)
        vgg.to(device=device, dtype=kept_dtype, memory_format=layout)
        self._loss = BaselineLoss(vgg, loss)
        # The Grams in full precision, before VGG19 is cast.
        self._loss.set_style(255.0 * task.style.to(device=device, dtype=kept_dtype).contiguous(memory_format=layout))
        for convolution in vgg.children():
            convolution.to(dtype)
        self._layout, self._dtype, self._kept_dtype, self._device = layout, dtype, kept_dtype, device
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.train.learning_rate, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._forward: Callable[[Tensor], Tensor] = self._loss_of
        if compiled is not None:
            self.notes |= {"torch.compile": compiled or "default"}
            self._forward = torch.compile(self._loss_of, **compiled)

    def __call__(self, batch: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._forward(batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {common_name(name): parameter for name, parameter in self.net.named_parameters()}

    def persistent_tensors(self) -> Iterator[Tensor]:
        yield from (*self._loss.parameters(), *self._loss.buffers(), *self._loss.grams.values())
        yield from (*self.net.parameters(), *self.net.buffers())
        for moments in self.optimizer.state.values():
            yield from (value for value in moments.values() if isinstance(value, Tensor))

    def _loss_of(self, batch: Tensor) -> Tensor:
        pixels = batch.permute(0, 3, 1, 2).to(self._kept_dtype).contiguous(memory_format=self._layout)
        mixed = self._dtype not in (torch.float32, torch.float64)
        with torch.autocast(self._device.type, dtype=self._dtype if mixed else None, enabled=mixed):
            return self._loss(self.net(pixels), pixels)


def _amp(task: Task) -> str:
    """bf16, or fp16 with loss scaling on GPUs that lack it."""
    on_gpu = task.device.type == "cuda"
    return "fp16" if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16"


def _compile(task: Task) -> Provider:
    # max-autotune needs a GPU, and bf16 is slower than fp32 on most CPUs.
    if task.device.type == "cpu":
        return Baseline(task, "fp32", channels_last=True, compiled={})
    return Baseline(task, _amp(task), channels_last=True, compiled={"mode": "max-autotune"})


PROVIDERS: dict[str, Callable[[Task], Provider]] = {
    "fastnst": Fastnst,
    "eager_fp32": lambda task: Baseline(task, "fp32", channels_last=False),
    "eager_channels_last": lambda task: Baseline(task, "fp32", channels_last=True),
    "eager_amp": lambda task: Baseline(task, _amp(task), channels_last=True),
    "compile": _compile,
}
EAGER = ("eager_fp32", "eager_channels_last", "eager_amp")
