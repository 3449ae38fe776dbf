"""What a run leaves to look at: `metrics.jsonl`, and scalars, histograms, pictures and text for TensorBoard."""

import contextlib
import json
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

import torch
from torch import Tensor, nn

from fastnst.config import Config, to_toml
from fastnst.errors import DataError
from fastnst.losses import LossTerms
from fastnst.storage import storage_error, write_atomic

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


class RunLog:
    """The metrics and the TensorBoard log of one run directory; a context manager.

    Args:
        run: the run directory, which exists.
        start_step: 0 for a new run; the checkpoint's step when resuming. Whatever an interrupted process wrote about
            later steps is dropped, so that each step is logged once.
    """

    def __init__(self, run: Path, *, start_step: int = 0) -> None:
        # TensorBoard is slow to import, and a program that only looks at a configuration has no use for it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.utils.tensorboard import SummaryWriter

        self._path = run / METRICS_NAME
        _drop_rows_after(self._path, start_step)
        with self._storage():
            self._metrics: TextIO = self._path.open("a", encoding="utf-8")
            self._writer = SummaryWriter(str(run), purge_step=start_step + 1 if start_step else None, flush_secs=30)
        self._excepthook, threading.excepthook = threading.excepthook, _quiet_about_event_files

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            # What went wrong first is what matters; the end of the log may fail for the same reason.
            with contextlib.suppress(DataError):
                self.close()

    def config(self, config: Config) -> None:
        """The resolved configuration, as a text page."""
        with self._storage():
            self._writer.add_text("config", "\n".join("    " + line for line in to_toml(config).splitlines()), 0)

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
            # TensorBoard's bins end at 1e20, and it refuses a histogram with nothing in it.
            values = parameter.detach().float().clamp(-1e19, 1e19).cpu().numpy()
            with self._storage():
                self._writer.add_histogram(name.replace(".", "/"), values, step)

    def pictures(self, step: int, tag: str, pictures: Tensor, captions: Iterable[str]) -> None:
        """Pictures `[N, 3, H, W]` in [0, 1] (clamped), each below `tag/caption` with a slider over the steps."""
        scaled = (pictures.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        for picture, caption in zip(scaled, captions, strict=True):
            with self._storage():
                self._writer.add_image(f"{tag}/{caption}", picture, step)

    def flush(self) -> None:
        """Hand everything to the operating system, so that a log is never behind its checkpoint."""
        with self._storage():
            self._metrics.flush()
            self._writer.flush()

    def close(self) -> None:
        """Flush and close both files."""
        threading.excepthook = self._excepthook
        with self._storage():
            self._metrics.close()
            self._writer.close()

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        """TensorBoard writes in a thread of its own, whose error comes up in the next call."""
        try:
            yield
        except OSError as error:
            raise storage_error(self._path.parent, error) from error


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`, in order; a last line cut by a crash is left out."""
    rows = []
    for line in (run / METRICS_NAME).read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


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
    if not (issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(args)
