"""What a run leaves to look at: `metrics.jsonl`; for TensorBoard the graph, scalars, histograms, images and text."""

import contextlib
import json
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from fastnst.config import Config, to_toml
from fastnst.errors import DataError
from fastnst.losses.perceptual import LossTerms, PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.run_log import protos
from fastnst.run_log.graph import GraphRecorder
from fastnst.storage import storage_error, sync_file, write_atomic
from fastnst.visualize.deconv.transform_net import TransformDeconvnet
from fastnst.visualize.deconv.vgg import Deconvnet

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef

METRICS_NAME = "metrics.jsonl"


def loss_scalars(terms: LossTerms) -> dict[str, float]:
    """Loss terms by tag (`loss/total`, …, `loss/style/relu1_1`), in one transfer from the device."""
    named = {
        "loss/total": terms.total,
        "loss/content": terms.content,
        "loss/style": terms.style,
        "loss/tv": terms.tv,
    } | {f"loss/{layer}": value for layer, value in terms.layers.items()}
    values = torch.stack([value.detach().float() for value in named.values()]).tolist()
    return dict(zip(named, values, strict=True))


def training_graph(net: TransformNet, loss: PerceptualLoss, *, image_size: int, batch_size: int = 4) -> "GraphDef":
    """One training step's forward pass, and both deconvnets, as TensorBoard's graph (the paper's Figures 4 and 5).

    At the top level are `X_content`, `transform_net`, `vgg_transformed`, `vgg_content`, `loss` (in it content, style,
    tv and total, as far as they are weighted) and `visualization`; each opens down to layers. Nothing is computed, and
    neither network is changed.

    Args:
        net: in the mode in which it trains.
        loss: its style is set.
        image_size: side of the square training images.
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
            painted = transform_deconvnet.record(content, net.layer_names[-1:])
        with graph.scope("visualization/transform_net"):
            transform_deconvnet.project_layer(painted, net.layer_names[-1], batch_size=batch_size)
        with graph.scope("loss"):
            loss.terms(stylized, recording.activations, targets)
    return graph.graph_def()


class RunLog:
    """The metrics and the TensorBoard log of one run directory; a context manager.

    Args:
        run: the run directory, which exists.
        start_step: 0 for a new run; the checkpoint's step when resuming. Whatever an interrupted process wrote about
            later steps is dropped, so that each step is logged once.

    A line that cannot be written ends the run, like a checkpoint that cannot: resumed, it writes that line, and a log
    with a gap never looks like a whole one.

    Raises:
        StorageError: from any method, that the storage refuses; TensorBoard's own thread may have met it earlier.
    """

    def __init__(self, run: Path, *, start_step: int = 0) -> None:
        self._path = run / METRICS_NAME
        self._has_hyper_parameters = start_step > 0
        self._failure: BaseException | None = None
        self._excepthook, threading.excepthook = threading.excepthook, self._heed_event_files
        try:
            with self._storage(), contextlib.ExitStack() as opened:
                _drop_rows_after(self._path, start_step)
                # A link may lead out of the run, to a file that is to be made there.
                self._metrics: TextIO = opened.enter_context(
                    open(self._path, "a", encoding="utf-8", opener=_open_no_link)
                )
                # Step 0 is written by a run that begins, and by one killed before its first checkpoint, again.
                purge_step = start_step + 1 if start_step else 0
                self._writer = _summary_writer(run, purge_step=purge_step, flush_secs=30)
                opened.pop_all()
        except BaseException:
            _put_back_excepthook(self._excepthook)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self._has_hyper_parameters:
                with self._storage():
                    self._writer.file_writer.add_summary(protos.session_end(time.time()))
            self.close()
        else:
            # What went wrong first is what matters; the end of the log may fail for the same reason.
            with contextlib.suppress(DataError):
                self.close()

    def config(self, config: Config) -> None:
        """The resolved configuration, as a text page and as hyper-parameters."""
        self._has_hyper_parameters = True
        with self._storage():
            self._writer.add_text("config", "\n".join("    " + line for line in to_toml(config).splitlines()), 0)
            for summary in protos.session_start(protos.hyper_parameters(config), time.time()):
                self._writer.file_writer.add_summary(summary, 0)

    def graph(self, graph: "GraphDef") -> None:
        """The networks' graph: see `training_graph`."""
        from tensorboard.compat.proto.event_pb2 import Event

        with self._storage():
            self._writer.file_writer.add_event(Event(graph_def=graph.SerializeToString()), 0)

    def layout(self, layers: Sequence[str]) -> None:
        """The custom-scalars page: all loss terms in one chart, then the terms of `layers`, then speed."""
        with self._storage():
            self._writer.add_custom_scalars(protos.chart_layout(layers))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One row of `metrics.jsonl`, and one point of each scalar chart."""
        # JSON has no NaN; null keeps the row readable by every parser.
        row = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        with self._storage():
            self._metrics.write(json.dumps({"step": step, **row}) + "\n")
            self._metrics.flush()
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def histograms(self, step: int, net: nn.Module) -> None:
        """The distribution of each weight, scale and shift, by layer: `conv1/weight`, `conv1/scale`, ….

        Source: the paper's Figures 9 and 10.
        """
        for name, parameter in net.named_parameters():
            values = protos.histogram(parameter.detach().float().cpu().numpy())
            if values is not None:
                with self._storage():
                    self._writer.add_histogram_raw(name.replace(".", "/"), **values, global_step=step)

    def images(self, step: int, tag: str, images: Tensor, captions: Iterable[str]) -> None:
        """Images `[N, 3, H, W]` in [0, 1] (clamped), each below `tag/caption` with a slider over the steps."""
        for image, caption in zip(images, captions, strict=True):
            self.image(step, f"{tag}/{caption}", image)

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """One image `[3, H, W]` in [0, 1] (clamped), below `tag` with a slider over the steps."""
        scaled = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        with self._storage():
            self._writer.add_image(tag, scaled, step)

    def flush(self) -> None:
        """Make everything durable, so that a log is never behind its checkpoint."""
        with self._storage():
            self._metrics.flush()
            self._writer.flush()
            for path in (self._path, *self._path.parent.glob("events.out.tfevents.*")):
                sync_file(path)

    def close(self) -> None:
        """Flush and close both files."""
        try:
            with self._storage(), contextlib.closing(self._writer):
                self._metrics.close()
            # What its thread met last comes up in no further call.
            if isinstance(self._failure, OSError):
                raise storage_error(self._path.parent, self._failure) from self._failure
        finally:
            _put_back_excepthook(self._excepthook)

    def _storage(self) -> contextlib.AbstractContextManager[None]:
        return _storage(self._path.parent)

    def _heed_event_files(self, args: threading.ExceptHookArgs) -> None:
        is_ours = _is_of_event_files(args)
        if is_ours:
            self._failure = args.exc_value
        # Of several logs that are open, this is asked for the newest; the thread may be an older one's.
        if not is_ours or getattr(self._excepthook, "__func__", None) is RunLog._heed_event_files:
            self._excepthook(args)


def log_visualization(run: Path, sheets: Mapping[str, np.ndarray], *, step: int, text: str) -> None:
    """Add images to the TensorBoard log of a run, in a file of their own: one that trains on is not disturbed.

    Args:
        run: the run directory.
        sheets: tag → uint8 `[H, W, 3]`.
        step: of training, at which the networks were as the images show them.
        text: what is to be known of them, Markdown, under each of the tags.

    Raises:
        DataError: the storage refuses.
    """
    excepthook, threading.excepthook = threading.excepthook, _quiet_about_event_files
    try:
        # Without `purge_step`: it would hide what the training has written about later steps.
        with _storage(run), contextlib.closing(_summary_writer(run, filename_suffix=".visualize")) as writer:
            for tag, sheet in sheets.items():
                writer.add_image(tag, sheet, step, dataformats="HWC")
                writer.add_text(tag, text, step)
    finally:
        _put_back_excepthook(excepthook)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`, in order; a last line cut by a crash is left out."""
    rows = []
    for line in (run / METRICS_NAME).read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return rows


def _summary_writer(run: Path, **options: Any) -> Any:
    # TensorBoard is slow to import, and a program that only looks at a configuration has no use for it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(run), **options)


@contextlib.contextmanager
def _storage(run: Path) -> Iterator[None]:
    """TensorBoard writes in a thread of its own, whose error comes up in the next call."""
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


def _quiet_about_event_files(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writing thread would print a traceback; its error is raised again where it can be handled."""
    if not _is_of_event_files(args):
        threading.__excepthook__(args)


def _put_back_excepthook(excepthook: Callable[[threading.ExceptHookArgs], Any]) -> None:
    # A thread that failed shows so a moment before it comes to the hook.
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("tensorboard.") and getattr(thread, "exception", None) is not None:
            thread.join()
    threading.excepthook = excepthook


def _is_of_event_files(args: threading.ExceptHookArgs) -> bool:
    return issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard.")
