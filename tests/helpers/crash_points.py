"""Named moments of a run at which a test may strike.

A point is a moment in the life of `fastnst train`, named like `before-fsync:tensors`. Nothing in the product knows of
it: a child process replaces a few functions of the operating system and of the product, before its run begins, by ones
that report in passing. At the wanted one the process sends real signals to itself.
"""

import dataclasses
import functools
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRAPHS: list[Any] = []
"""The networks' graph, which is slow to trace, and the same for all runs here."""


@dataclass(frozen=True)
class Case:
    """One process: a command line of fastnst, and how it is to be disturbed."""

    argv: tuple[str, ...]
    folder: str
    """Of the test's own: receives what the process prints and the steps that it began; also its cache."""
    point: str = ""
    """Where the process sends itself `signals`, one after the other; empty: nowhere."""
    occurrence: int = 1
    """At which passing of the point, counted from 1."""
    signals: tuple[int, ...] = (signal.SIGKILL,)
    meetings: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Points at which the process leaves a file of the point's name in `folder`, and waits until others exist."""
    ignored: tuple[int, ...] = ()
    """Signals that the process ignores from its start, as below `nohup`."""
    kill_after: float | None = None
    """Seconds after which the process is killed from outside."""
    real_loader: bool = False
    """Keep the loader's own processes; else images are read by the same code in the process itself."""
    whole_group: bool = False
    """Signals go to all processes of the run, as a terminal and most supervisors send them."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that this process has beside those of the test."""
    poisoned_step: int | None = None
    """The step before which a weight of this process's network becomes NaN."""
    in_double: bool = False
    """Train in fp64, which no option does: what is left of a difference is then none of rounding."""
    removed: tuple[str, ...] = ()
    """Files that this process removes before step 2."""


class Points:
    """Counts the passings of one point, and sends the signals at the wanted one."""

    def __init__(self, case: Case) -> None:
        self._case, self._left = case, case.occurrence
        self._meetings = dict(case.meetings)

    def due(self, name: str) -> bool:
        """Whether this passing is the wanted one."""
        if name != self._case.point:
            return False
        self._left -= 1
        return self._left == 0

    def strike(self) -> None:
        (Path(self._case.folder) / "struck").write_text(str(time.monotonic()))
        for signum in self._case.signals:
            if self._case.whole_group:
                os.killpg(os.getpgrp(), signum)
            else:
                os.kill(os.getpid(), signum)

    def __call__(self, name: str) -> None:
        if name in self._meetings:
            (Path(self._case.folder) / name).touch()
            while not all(Path(file).exists() for file in self._meetings[name]):
                time.sleep(0.01)
        if self.due(name):
            self.strike()

    def around(self, owner: Any, name: str, label: Callable[..., str] | str) -> None:
        """Report `before-LABEL` and `after-LABEL` of each call; a label that is a function receives the arguments."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def reported(*args: Any, **kwargs: Any) -> Any:
            what = label if isinstance(label, str) else label(*args, **kwargs)
            self(f"before-{what}")
            result = original(*args, **kwargs)
            self(f"after-{what}")
            return result

        setattr(owner, name, reported)


def kind_of(path: Any) -> str:
    """What a path of a run directory is: `tensors`, `manifest`, `model`, …, `checkpoint`, `old`; temporary or not."""
    if isinstance(path, int):
        path = Path(f"/proc/self/fd/{path}").readlink()
    name = Path(os.fsdecode(path)).name
    if re.fullmatch(r"\.step_\d+\.old\.part", name):
        return "old"
    if re.fullmatch(r"\.?step_\d+(\.part)?", name):
        return "checkpoint"
    name = re.sub(r"\.[^.]+\.part$", "", name.removeprefix("."))
    known = {
        "state.safetensors": "tensors",
        "state.json": "state",
        "manifest.json": "manifest",
        "model.safetensors": "model",
        "metrics.jsonl": "metrics",
        "config.toml": "config",
        "checkpoints": "folder",
    }
    return known.get(name, "other")


class HalfWritten:
    """A file of which, at the wanted point, the first half of a write reaches the disk and no more."""

    def __init__(self, file: Any, points: Points, kind: str) -> None:
        self._file, self._points, self._kind = file, points, kind

    def write(self, data: Any) -> Any:
        if self._points.due(f"mid-write:{self._kind}"):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._points.strike()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def install(case: Case) -> None:
    """Put the points in place, in a process that has not begun its run."""
    import torch
    from tensorboard.summary.writer.record_writer import RecordWriter

    import fastnst.data.loaders.pillow
    import fastnst.data.manifest
    import fastnst.training.monitoring.snapshots
    import fastnst.training.train
    from fastnst.run_log.writer import RunLog
    from fastnst.training.monitoring.snapshots import SampleLogger
    from fastnst.training.step.train_step import NetTrainer

    points = Points(case)
    # The save path, as the operating system sees it.
    points.around(os, "fsync", lambda descriptor: f"fsync:{kind_of(descriptor)}")
    points.around(os, "mkdir", lambda path, *_, **__: f"mkdir:{kind_of(path)}")
    points.around(os, "replace", lambda source, *_, **__: f"rename:{kind_of(source)}")
    points.around(os, "rename", lambda source, target, **__: f"rename:{_renamed(source, target)}")
    points.around(os, "unlink", lambda *_, dir_fd=None, **__: f"unlink:{'file' if dir_fd is None else kind_of(dir_fd)}")
    points.around(os, "open", _opened)
    fdopen = os.fdopen
    os.fdopen = lambda descriptor, *args, **kwargs: HalfWritten(  # type: ignore[assignment]
        fdopen(descriptor, *args, **kwargs), points, kind_of(descriptor)
    )

    # The step.
    points.around(NetTrainer, "train_step", "step")
    points.around(torch.Tensor, "backward", "backward")
    points.around(torch.optim.Adam, "step", "optimiser")

    # The log.
    points.around(RunLog, "metrics", "metrics")
    points.around(RunLog, "flush", "flush")
    points.around(RunLog, "close", "close")
    opened = RunLog.__init__

    def open_log(self: RunLog, *args: Any, **kwargs: Any) -> None:
        opened(self, *args, **kwargs)
        self._metrics = HalfWritten(self._metrics, points, "row")  # type: ignore[assignment]

    RunLog.__init__ = open_log  # type: ignore[method-assign]
    write = RecordWriter.write

    def write_record(self: RecordWriter, data: bytes) -> None:
        if not points.due("mid-write:event"):
            write(self, data)
            return
        record: list[bytes] = []
        whole = RecordWriter(type("Buffer", (), {"write": lambda _, part: record.append(part)})())
        write(whole, data)
        self._writer.write(record[0][: len(record[0]) // 2])
        self._writer.flush()
        points.strike()

    RecordWriter.write = write_record

    # What comes before, between and after.
    points.around(fastnst.data.manifest, "_check", "check")
    points.around(SampleLogger, "log_samples", "samples")
    points.around(SampleLogger, "log_projections", "projections")
    points.around(fastnst.training.train, "read_inputs", "inputs")
    points.around(fastnst.training.train, "lock_run", "lock")
    points.around(fastnst.training.train, "train", "run")
    # A function of the configuration, and slow to trace; the server has done it.
    fastnst.training.monitoring.snapshots.training_graph = lambda *_, **__: GRAPHS[0]  # type: ignore[attr-defined]
    if not case.real_loader:
        fastnst.data.loaders.pillow.ProcessPoolExecutor = InThisProcess  # type: ignore[misc,assignment]
    if case.in_double:
        compute_in_double()
    began = NetTrainer.train_step

    def note_step(self: NetTrainer, step: int, *args: Any) -> Any:
        if step == case.poisoned_step:
            weight = self.net.conv1.weight.data
            weight[(0,) * weight.ndim] = float("nan")
        for name in case.removed if step == 2 else ():
            Path(name).unlink(missing_ok=True)
        with (Path(case.folder) / "steps").open("a") as file:
            file.write(f"{step}\n")
        return began(self, step, *args)

    NetTrainer.train_step = note_step  # type: ignore[method-assign]


def compute_in_double() -> None:
    """Both networks and all images; for runs that show no samples."""
    from fastnst.training import style_run
    from fastnst.training import train as training
    from fastnst.training.step import train_step as step

    read, net = training.read_inputs, style_run.TransformNet

    def read_inputs(*args: Any, **kwargs: Any) -> Any:
        inputs = read(*args, **kwargs)
        inputs.vgg.double()
        return dataclasses.replace(inputs, style=inputs.style.double())

    training.read_inputs = read_inputs
    style_run.TransformNet = lambda *args: net(*args).double()  # type: ignore[misc,assignment]
    step.to_unit = lambda batch: batch.permute(0, 3, 1, 2).double() / 255


def _opened(path: Any, flags: int, *_: object, **__: object) -> str:
    return f"{'open' if flags & os.O_CREAT else 'read'}:{kind_of(path)}"


def _renamed(source: Any, target: Any) -> str:
    return "old" if kind_of(target) == "old" else kind_of(source)


class InThisProcess(Executor):
    """Stands in for the Pillow loader's pool: the same work, at once, without processes that take seconds to start."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
