"""Runs of a few milliseconds: the real training loop over one convolution, fed from numbers instead of files.

Real: configuration, manifest, style, loss, Adam, the log, checkpoints, the style model. Not real: the transform net is
one convolution, images are drawn from the sampler's indices, the graph is empty.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import numpy as np
import pytest
import torch
from tensorboard.compat.proto.graph_pb2 import GraphDef
from torch import Tensor, nn

from fastnst.config import Config, load_config
from fastnst.data.sampler import Sampler
from fastnst.models.transform_net import OutputMapping
from fastnst.run_log.writer import read_metrics
from fastnst.training import style_run, trainer
from fastnst.training import train as training
from fastnst.training.monitoring import snapshots
from fastnst.training.run_dir.checkpoint import Checkpoint, latest_checkpoint
from fastnst.training.step.train_step import NetTrainer
from fastnst.training.style_run import StyleRun

ASSIGNMENTS = (
    *("data.image_size=16", "data.loader=pillow", "data.workers=1", "train.batch_size=2", "style.size=16"),
    *("train.steps=5", "train.log_every=1", "train.sample_every=2", "train.samples=0", "train.checkpoint_every=2"),
    *("train.device=cpu", "visualize.every=0", 'loss.content_layers=["relu1_1"]', 'loss.style_layers=["relu1_1"]'),
    # So small that fp16 does not overflow at the loss scale it begins with.
    *("loss.style_layer_weights=[]", "loss.content_weight=1e-5", "loss.style_weight=1e-6", "loss.tv_weight=1e-5"),
)


class SmallNet(nn.Module):
    """Stands for `TransformNet`."""

    def __init__(self, architecture: str, norm: str) -> None:
        super().__init__()
        self.architecture, self.norm = architecture, norm
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.metadata = {"architecture": architecture, "norm": norm}

    def forward(self, x: Tensor, *, pre_activation: bool = False) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.to(self.conv1.weight.dtype) / 255
        x = self.conv1(x) / 2
        return x if pre_activation else x.tanh() / 2 + 0.5  # the convolution's sigmoid

    def output_mapping(self, _: object, wanted: Sequence[int]) -> OutputMapping:
        return OutputMapping((0, 0, *wanted), True, 0.5, 0.5)


class SmallLoader:
    """Batches that differ wherever the order does."""

    def __init__(self, _manifest: object, order: Sampler, config: Any, *, start_step: int, **_: object) -> None:
        self._order, self._size, self._start = order, config.image_size, start_step

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self._start, self._order.steps):
            samples = self._order.batch(step)
            draw = np.random.default_rng([*samples.indices.tolist(), *samples.flip.astype(int).tolist()])
            shape = (self._order.local_batch_size, self._size, self._size, 3)
            yield torch.from_numpy(draw.integers(0, 256, shape, dtype=np.uint8))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `train` and the command line make small runs from now on."""
    monkeypatch.setattr(style_run, "TransformNet", SmallNet)
    monkeypatch.setattr(trainer, "open_loader", SmallLoader)
    leave_out_graph(monkeypatch)


def leave_out_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log no graph of the networks, which is slow to trace."""
    monkeypatch.setattr(snapshots, "training_graph", lambda *_, **__: GraphDef())


def small_config(photos: Path, *assignments: str) -> Config:
    """Five steps of two images; a checkpoint after 2, 4 and 5."""
    options = {"data.folder": photos, "style.image": photos / "image_00.jpg", "loss.vgg": "random"}
    return load_config(preset="vgg-conv3", assignments=[*ASSIGNMENTS, *assignments], options=options, environment={})


def real_config(photos: Path, *assignments: str, preset: str = "vgg-conv3") -> Config:
    """One 16 px image a step for real networks and loaders, with a shallow random VGG19; no samples or projections."""
    small = ("data.image_size=16", "data.loader=pillow", "data.workers=1", "train.batch_size=1", "style.size=16")
    quiet = ("train.device=cpu", "train.samples=0", "visualize.every=0")
    options = {"data.folder": photos, "style.image": photos / "image_00.jpg", "loss.vgg": "random"}
    return load_config(preset=preset, assignments=[*small, *quiet, *assignments], options=options, environment={})


def small_arguments(photos: Path, out: Path, *assignments: str) -> list[str]:
    """The same as a command line."""
    sets = [word for assignment in (*ASSIGNMENTS, *assignments) for word in ("--set", assignment)]
    image = str(photos / "image_00.jpg")
    return [
        *("train", "--style", image, "--data", str(photos), "--preset", "vgg-conv3", "--vgg", "random"),
        *("--out", str(out), *sets),
    ]


def train_small(config: Config, out: Path, **options: Any) -> list[str]:
    """Train; return what the package logged."""
    with log_messages() as messages:
        models = training.train(config, out, **options)
    names = options.get("styles") or ("",)
    assert models == [out / name / "model.safetensors" for name in names]
    return messages


class Killed(Exception):
    """Ends a run as SIGKILL would: nothing is saved on the way out."""


def train_killed_at(
    step: int, config: Config, out: Path, name: str = "_save_checkpoint", *, style: str = "", **options: Any
) -> None:
    """Train; the run dies just before it calls method `name` for `step` of `style`, by default of any."""
    original = getattr(StyleRun, name)

    def die(run: StyleRun, *arguments: Any) -> None:
        if arguments[-1] == step and style in ("", run.out.name):
            raise Killed
        original(run, *arguments)

    with mock.patch.object(StyleRun, name, die), pytest.raises(Killed):
        train_small(config, out, **options)


def before_each_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[NetTrainer, int], object]) -> None:
    """Call `act` with the trainer and the step's number before each training step."""
    original = NetTrainer.train_step

    def train_step(net_trainer: NetTrainer, step: int, *arguments: Any) -> Any:
        act(net_trainer, step)
        return original(net_trainer, step, *arguments)

    monkeypatch.setattr(NetTrainer, "train_step", train_step)


def newest(run: Path) -> Checkpoint:
    """The latest checkpoint of a run that has one."""
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


@contextlib.contextmanager
def log_messages() -> Iterator[list[str]]:
    """Collect what the package logs within this block."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("fastnst"), Collect()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def logged(run: Path) -> list[dict[str, float]]:
    """The rows of the metrics without what depends on the clock."""
    return [{tag: value for tag, value in row.items() if "speed" not in tag} for row in read_metrics(run)]
