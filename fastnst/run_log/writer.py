"""The log of a run: `metrics.jsonl`, and scalars, histograms, images, text and graph for TensorBoard."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from fastnst.config import Config, to_toml
from fastnst.errors import DataError
from fastnst.losses.perceptual import LossTerms, PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.run_log import protos
from fastnst.run_log.event_file import EventFile
from fastnst.run_log.graph import GraphRecorder
from fastnst.storage import storage_error, sync_file, write_atomic
from fastnst.visualize.deconv.transform_net import TransformDeconvnet
from fastnst.visualize.deconv.vgg import Deconvnet

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef

METRICS_NAME = "metrics.jsonl"


def loss_scalars(terms: LossTerms) -> dict[str, float]:
    """Get the loss terms by tag (`loss/total`, …, `loss/style/relu1_1`), in one transfer from the device."""
    named = {
        "loss/total": terms.total,
        "loss/content": terms.content,
        "loss/style": terms.style,
        "loss/tv": terms.tv,
    } | {f"loss/{layer}": value for layer, value in terms.layers.items()}
    values = torch.stack([value.detach().float() for value in named.values()]).tolist()
    return dict(zip(named, values, strict=True))


def training_graph(net: TransformNet, loss: PerceptualLoss, *, image_size: int, batch_size: int = 4) -> "GraphDef":
    """Record one training step's forward pass and both deconvnets as a graph (the paper's Figures 4, 5).

    The top level holds `X_content`, `transform_net`, `vgg_transformed`, `vgg_content`, `loss` (with content, style, tv
    and total, unless their weight is 0) and `visualization`; each opens down to layers. Nothing is computed, and no
    network is changed.

    Args:
        net: in the mode in which it trains.
        loss: its style is set.
        image_size: side of the crops.
        batch_size: of a step.

    Raises:
        UserError: the images are too small for a layer of the loss.
    """
    vgg_deconvnet, transform_deconvnet = Deconvnet(loss.vgg), TransformDeconvnet(net)
    deepest = max(loss.layers, key=loss.vgg.layers.index)
    with GraphRecorder(net, loss.vgg, loss) as graph:
        content = graph.placeholder("X_content", (batch_size, 3, image_size, image_size), like=net.conv1.weight)
        with graph.scope("transform_net"):
            stylized = net(content)
        with graph.scope("vgg_transformed"):
            recording = vgg_deconvnet.record(stylized, loss.layers)
        with graph.scope("vgg_content"):
            targets = loss.vgg(content, loss.config.content_layers) if loss.content else {}
        with graph.scope("visualization/vgg_transformed"):
            vgg_deconvnet.project_layer(recording, deepest, batch_size=batch_size)
        with graph.scope("visualization/recording"):
            output = transform_deconvnet.record(content, net.layer_names[-1:])
        with graph.scope("visualization/transform_net"):
            transform_deconvnet.project_layer(output, net.layer_names[-1], batch_size=batch_size)
        with graph.scope("loss"):
            loss.terms(stylized, recording.activations, targets)
    return graph.graph_def()


class RunLog:
    """The metrics and the TensorBoard log of one run directory; a context manager.

    Args:
        run: the run directory, which exists.
        start_step: 0 for a new run; the checkpoint's step when resuming. Rows and events of later steps, from an
            interrupted process, are dropped, so that each step is logged once.

    A failed write ends the run, like a failed checkpoint: the resumed run writes that line, so that logs have no gaps.

    Raises:
        StorageError: from any method: the storage refuses.
    """

    def __init__(self, run: Path, *, start_step: int = 0) -> None:
        self._run, self._path = run, run / METRICS_NAME
        self._has_hyper_parameters = start_step > 0
        # Step 0 is written by a new run, and again by one killed before its first checkpoint.
        purge_step = start_step + 1 if start_step else 0
        with _storage(self._run), contextlib.ExitStack() as on_error:
            _drop_rows_after(self._path, start_step)
            self._metrics: TextIO = on_error.enter_context(
                open(self._path, "a", encoding="utf-8", opener=_open_no_link)
            )
            self._events = EventFile(run, purge_step=purge_step)
            on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                if self._has_hyper_parameters:
                    with _storage(self._run):
                        self._events.add_summary(protos.session_end(time.time()))
            finally:
                self.close()
        else:
            # The first error matters; closing may fail for the same reason.
            with contextlib.suppress(DataError):
                self.close()

    def config(self, config: Config) -> None:
        """Log the resolved configuration, as a text page and as hyper-parameters."""
        self._has_hyper_parameters = True
        with _storage(self._run):
            self._events.add_text("config", "\n".join("    " + line for line in to_toml(config).splitlines()), 0)
            for summary in protos.session_start(protos.hyper_parameters(config), time.time()):
                self._events.add_summary(summary)

    def graph(self, graph: "GraphDef") -> None:
        """Log the networks' graph: see `training_graph`."""
        from tensorboard.compat.proto.event_pb2 import Event

        with _storage(self._run):
            self._events.add_event(Event(graph_def=graph.SerializeToString()))

    def layout(self, layers: Sequence[str]) -> None:
        """Log the custom-scalars page: all loss terms in one chart, then the terms of `layers`, then speed."""
        with _storage(self._run):
            self._events.add_chart_layout(protos.chart_layout(layers))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row of `metrics.jsonl`, and a point of each scalar chart."""
        # JSON has no NaN; null keeps the row readable by every parser.
        row = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        with _storage(self._run):
            self._metrics.write(json.dumps({"step": step, **row}) + "\n")
            self._metrics.flush()
            for tag, value in values.items():
                self._events.add_scalar(tag, value, step)

    def histograms(self, step: int, net: nn.Module) -> None:
        """Log the distribution of each weight, scale and shift, by layer: `conv1/weight`, `conv1/scale`, ….

        Source: the paper's Figures 9 and 10.
        """
        for name, parameter in net.named_parameters():
            values = protos.histogram(parameter.detach().float().cpu().numpy())
            if values is not None:
                with _storage(self._run):
                    self._events.add_histogram(name.replace(".", "/"), values, step)

    def images(self, step: int, tag: str, images: Tensor, captions: Iterable[str]) -> None:
        """Log images `[N, 3, H, W]` in [0, 1] (clamped), each below `tag/caption`."""
        for image, caption in zip(images, captions, strict=True):
            self.image(step, f"{tag}/{caption}", image)

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Log an image `[3, H, W]` in [0, 1] (clamped), with a slider over the steps."""
        scaled = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        with _storage(self._run):
            self._events.add_image(tag, scaled.transpose(1, 2, 0), step)

    def flush(self) -> None:
        """Make everything durable, so that a log is never behind its checkpoint."""
        with _storage(self._run):
            self._metrics.flush()
            for path in (self._path, *self._run.glob("events.out.tfevents.*")):
                sync_file(path)

    def close(self) -> None:
        """Close both files."""
        with _storage(self._run), contextlib.closing(self._events):
            self._metrics.close()


def log_visualization(run: Path, sheets: Mapping[str, np.ndarray], *, step: int, text: str) -> None:
    """Add images to a run's TensorBoard log, in a file of their own: the run may still be training.

    Args:
        run: the run directory.
        sheets: tag → uint8 `[H, W, 3]`.
        step: training step of the networks that the images show.
        text: explanation under each tag, Markdown.

    Raises:
        StorageError: the storage refuses.
    """
    # Without `purge_step`, which would hide what training has logged about later steps.
    with _storage(run), contextlib.closing(EventFile(run, suffix=".visualize")) as events:
        for tag, sheet in sheets.items():
            events.add_image(tag, sheet, step)
            events.add_text(tag, text, step)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Read the rows of a run's `metrics.jsonl`, without a last line cut by a crash."""
    rows = []
    for line in (run / METRICS_NAME).read_text("utf-8-sig").splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return rows


@contextlib.contextmanager
def _storage(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(run, error) from error


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    try:
        rows = [row for row in read_metrics(path.parent) if row["step"] <= step]
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a metrics file of fastnst; move it away to resume") from error
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
