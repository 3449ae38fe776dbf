"""Images and histograms that a run logs: stylized samples and projections, always of the same photos."""

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
from fastnst.run_log.writer import RunLog, training_graph
from fastnst.training.inputs import Inputs
from fastnst.visualize.evolution import ProjectionMonitor

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef


class SampleLogger:
    """Logs what the networks make of the first images of the data folder, as training goes on.

    Args:
        inputs: configuration, images and style.
        net: the transform net, on the device; logging neither changes it nor draws a random number.
        loss: with its style set.
    """

    def __init__(self, inputs: Inputs, net: TransformNet, loss: PerceptualLoss) -> None:
        self._inputs, self._net, self._loss = inputs, net, loss
        train, visualize = inputs.config.train, inputs.config.visualize
        names, images = _read_crops(inputs, max(train.samples, visualize.images))
        self._samples, self._names = images[: train.samples], names[: train.samples]
        self._projections: ProjectionMonitor | None = None
        if visualize.every:
            self._projections = ProjectionMonitor(
                net,
                inputs.vgg,
                visualize,
                loss_layers=loss.layers,
                images=images[: visualize.images],
                names=names[: visualize.images],
            )

    def log_start(self, run_log: RunLog, graph: "GraphDef | None" = None) -> "GraphDef":
        """Log what does not change (configuration, graph, style, content), and the untrained network.

        Returns:
            The networks' graph; pass it to the next style as `graph`, since tracing it takes seconds.
        """
        config = self._inputs.config
        run_log.config(config)
        run_log.layout(self._loss.layers)
        batch_size, image_size = config.train.batch_size, config.data.image_size
        if graph is None:
            graph = training_graph(self._net, self._loss, image_size=image_size, batch_size=batch_size)
        run_log.graph(graph)
        run_log.images(0, "style", self._inputs.style, ["picture"])
        run_log.images(0, "content", self._samples, self._names)
        self.log_samples(run_log, 0)
        if self._projections is not None:
            for tag, image in self._projections.content_strips():
                run_log.image(0, tag, image)
            self.log_projections(run_log, 0)
        return graph

    def log_samples(self, run_log: RunLog, step: int) -> None:
        """Log histograms and stylized samples."""
        run_log.histograms(step, self._net)
        if len(self._samples):
            # One at a time: what fits in training by batches must fit here, whatever `train.samples` is.
            images = [stylize(self._net, sample[None]) for sample in self._samples]
            run_log.images(step, "stylised", torch.cat(images), self._names)

    def log_projections(self, run_log: RunLog, step: int) -> None:
        """Log the projections of the watched maps."""
        assert self._projections is not None
        for tag, image in self._projections.projections():
            run_log.image(step, tag, image)


def _read_crops(inputs: Inputs, count: int) -> tuple[list[str], Tensor]:
    """Read the folder's first `count` readable images: names, and crops `[P, 3, S, S]` in [0, 1]."""
    side = inputs.config.data.image_size
    paths: list[str] = []
    crops: list[Image.Image] = []
    first_error: DataError | None = None
    for entry in inputs.manifest.images:
        if len(crops) == count:
            break
        try:
            pixels = read_pixels(inputs.manifest, entry)
        except DataError as error:
            # It became unreadable after the check; the loader decides whether too many did.
            first_error = first_error or error
            continue
        paths.append(entry.path)
        crops.append(ImageOps.fit(Image.fromarray(pixels), (side, side)))
    if not crops and first_error is not None:
        raise first_error
    if not crops:
        return [], torch.empty(0, 3, side, side)
    names = [printable(Path(path).stem) for path in paths]
    if len(set(names)) < len(names):
        names = [printable(path) for path in paths]
    return names, torch.cat([to_tensor(np.asarray(crop)) for crop in crops])
