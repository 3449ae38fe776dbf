"""What a run shows of itself beside numbers: histograms, stylised samples and projections, and what these cost."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastnst.data.loaders.cache import read_pixels
from fastnst.errors import DataError
from fastnst.images import printable, to_tensor
from fastnst.inference import stylize
from fastnst.losses.perceptual import PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.progress import duration
from fastnst.run_log.writer import RunLog, training_graph
from fastnst.training.inputs import Inputs
from fastnst.visualize.evolution import ProjectionMonitor

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef


class SampleLogger:
    """Fixed images of the data folder, and what the networks make of them as training goes on.

    Args:
        inputs: configuration, images and style.
        net: the transform net, on the device; no look changes it or draws a random number.
        loss: its style is set.
        share: of `visualize.max_percent`, what these may take; others take the rest.
    """

    def __init__(self, inputs: Inputs, net: TransformNet, loss: PerceptualLoss, *, share: float = 1.0) -> None:
        self._inputs, self._net, self._loss = inputs, net, loss
        config = inputs.config
        self._names, images = _read_crops(inputs, max(config.train.samples, config.visualize.images))
        self._samples = images[: config.train.samples]
        watched = config.visualize.images
        self._evolution = (
            ProjectionMonitor(
                net,
                inputs.vgg,
                config.visualize,
                loss_layers=loss.layers,
                images=images[:watched],
                names=self._names[:watched],
            )
            if config.visualize.every
            else None
        )
        self._limit = config.visualize.max_percent * share
        self._allowance = _Allowance(self._limit / 100, inputs.device)

    def begin(self, log: RunLog, graph: "GraphDef | None" = None) -> "GraphDef":
        """What does not change: configuration, the networks' graph, style and content, and the untrained network.

        Args:
            log: of a run that begins.
            graph: of networks like these, if it is known: to trace it takes seconds.

        Returns:
            The graph.
        """
        config = self._inputs.config
        log.config(config)
        log.layout(self._loss.layers)
        batch_size, image_size = config.train.batch_size, config.data.image_size
        if graph is None:
            graph = training_graph(self._net, self._loss, image_size=image_size, batch_size=batch_size)
        log.graph(graph)
        log.images(0, "style", self._inputs.style, ["picture"])
        log.images(0, "content", self._samples, self._names[: len(self._samples)])
        self.look(log, 0)
        if self._evolution is not None:
            for tag, image in self._evolution.content_strips():
                log.image(0, tag, image)
            self._project(log, 0, self._evolution)
        return graph

    def look(self, log: RunLog, step: int) -> None:
        """Histograms and stylised samples."""
        log.histograms(step, self._net)
        if len(self._samples):
            # One at a time: what fits in training by batches must fit here, whatever `train.samples` is.
            images = [stylize(self._net, sample[None]) for sample in self._samples]
            log.images(step, "stylised", torch.cat(images), self._names[: len(self._samples)])

    def projections_due(self, step: int, last: int) -> bool:
        """Whether `project` has something to do after `step` of `last` steps."""
        every = self._inputs.config.visualize.every
        if not every:
            return False
        return step == last or (step % every == 0 and self._allowance.grants_another())

    def project(self, log: RunLog, step: int) -> None:
        """What the watched maps respond to now."""
        assert self._evolution is not None
        self._project(log, step, self._evolution)

    def cost(self) -> dict[str, float]:
        """Scalars: the share of this process's training time that projections took."""
        return {} if self._evolution is None else {"speed/projections_percent": 100 * self._allowance.share}

    def report(self, notify: Callable[[str], None]) -> None:
        """Say what the projections took, and which were left out."""
        if self._evolution is None:
            return
        taken = self._allowance
        most = self._inputs.config.visualize.max_percent
        own = f", of which {self._limit:.2g} for each style," if self._limit < most else ""
        left_out = (
            f"; {taken.refused} more would have passed visualize.max_percent = {most:g}{own} and were left out"
            if taken.refused
            else ""
        )
        notify(
            f"projections: {taken.count} sets in {duration(taken.spent)}, {100 * taken.share:.2g}% of the training "
            f"time{left_out}"
        )

    def _project(self, log: RunLog, step: int, evolution: ProjectionMonitor) -> None:
        with self._allowance:
            for tag, image in evolution.projections():
                log.image(step, tag, image)


class _Allowance:
    """A share of the time since it was made, and a clock of what was taken of it; a context manager around each use."""

    def __init__(self, share: float, device: torch.device) -> None:
        self._limit, self._device = share, device
        self._made = self._begin = time.perf_counter()
        self.spent = self._longest = 0.0
        self.count = self.refused = 0

    def grants_another(self) -> bool:
        """Whether one more use, as long as the longest so far, stays within the share; a refusal is counted."""
        elapsed = time.perf_counter() - self._made
        granted = self.spent + self._longest <= self._limit * elapsed
        self.refused += not granted
        return granted

    @property
    def share(self) -> float:
        """Of the time since this object was made, between 0 and 1."""
        return self.spent / max(time.perf_counter() - self._made, 1e-9)

    def __enter__(self) -> None:
        # What the device still has to do of the training is not counted as ours.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        took = time.perf_counter() - self._begin
        self.spent, self._longest, self.count = self.spent + took, max(self._longest, took), self.count + 1


def _read_crops(inputs: Inputs, count: int) -> tuple[list[str], Tensor]:
    """Names of the folder's first `count` images that can be read, and they themselves, `[P, 3, S, S]` in [0, 1]."""
    side = inputs.config.data.image_size
    paths: list[str] = []
    squares: list[Image.Image] = []
    first_error: DataError | None = None
    for entry in inputs.manifest.images:
        if len(squares) == count:
            break
        try:
            pixels = read_pixels(inputs.manifest, entry)
        except DataError as error:
            # It went away since the check; whether too many did is for the loader to say.
            first_error = first_error or error
            continue
        paths.append(entry.path)
        squares.append(ImageOps.fit(Image.fromarray(pixels), (side, side)))
    if not squares and first_error is not None:
        raise first_error
    if not squares:
        return [], torch.empty(0, 3, side, side)
    names = [printable(Path(path).stem) for path in paths]
    if len(set(names)) < len(names):
        names = [printable(path) for path in paths]
    return names, torch.cat([to_tensor(np.asarray(square)) for square in squares])
