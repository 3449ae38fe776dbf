"""Real processes without the seconds that importing torch takes: a server that forks one per case.

The server has imported everything and rehearsed a run. Its children know nothing of one another, run the command line
as a user would, and end by real signals.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.crash_points import GRAPHS, Case, InThisProcess, install
from helpers.run_command import exit_code_of

TESTS = Path(__file__).resolve().parents[1]
LONGEST_S = 300.0


@dataclass(frozen=True)
class Ended:
    """How a case ended."""

    code: int
    """As a shell has it: 128+n after a signal that nothing caught."""
    killed: bool
    """Whether the signal itself ended the process."""
    seconds: float
    printed: str
    """stdout and stderr."""
    steps: list[int] = field(default_factory=list)
    """The steps that were begun, in order."""
    after_signal: float | None = None
    """Seconds between the process's signal to itself and its end."""


class ForkServer:
    """A process that forks one run after the other; a context manager."""

    def __enter__(self) -> "ForkServer":
        path = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "kernels"), *filter(None, sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            # More threads than one would be lost in a fork, together with what they hold.
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def run(self, case: Case) -> Ended:
        """Fork, run, and wait until the end."""
        return self.run_together([case])[0]

    def run_together(self, cases: list[Case]) -> list[Ended]:
        """Processes that start at the same moment; waits until all have ended."""
        for case in cases:
            Path(case.folder).mkdir(parents=True, exist_ok=True)
            for name in ("printed", "steps", "struck", "ended"):
                (Path(case.folder) / name).unlink(missing_ok=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([asdict(case) for case in cases]) + "\n")
        self._process.stdin.flush()
        answers = json.loads(self._answer())
        return [_ended(Path(case.folder), *answer) for case, answer in zip(cases, answers, strict=True)]

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has ended"
        return line.strip()


def _ended(folder: Path, code: int, seconds: float, end: float) -> Ended:
    assert seconds < LONGEST_S, "the process had to be killed"
    steps, struck = folder / "steps", folder / "struck"
    return Ended(
        128 - code if code < 0 else code,
        code < 0,
        seconds,
        (folder / "printed").read_text(errors="replace") if (folder / "printed").exists() else "",
        [int(step) for step in steps.read_text().split()] if steps.exists() else [],
        end - float(struck.read_text()) if struck.exists() else None,
    )


def next_command(argv: tuple[str, ...]) -> tuple[str, ...]:
    """The command after an interruption of `argv`: the same again, or `--resume` once there is a run."""
    out = argv[argv.index("--out") + 1]
    return ("train", "--resume", "--out", out) if (Path(out) / "config.toml").exists() else argv


def arguments(photos: Path, out: Path, *, steps: int, settings: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The command line of a run as small as can be: 32 px images, a shallow random VGG19."""
    style = min(photos.iterdir())
    small = ("data.image_size=32", "train.batch_size=1", "data.workers=1", "style.size=32", "train.samples=1")
    # The architecture that does not pad 32 px to 112.
    small += ("model.architecture=lengstrom", "visualize.every=0")
    log = ("train.log_every=1", "train.checkpoint_every=2", "train.keep_checkpoints=1", "train.sample_every=3")
    assigned = [word for setting in (*small, *log, *settings) for word in ("--set", setting)]
    fixed = ("--preset", "vgg-conv3", "--vgg", "random", "--device", "cpu", "--loader", "pillow")
    paths = ("--style", str(style), "--data", str(photos), "--out", str(out))
    return ("train", *fixed, *paths, "--steps", str(steps), *assigned)


# The server's side.


def serve() -> None:
    """Rehearse a run; then, for each line of stdin, fork a process per case in it and answer how they ended."""
    os.fsync = lambda _: None  # what the kernel has outlives a killed process; `Points` still counts the calls
    rehearse()
    print("ready", flush=True)
    for line in sys.stdin:
        cases = [Case(**fields) for fields in json.loads(line)]
        # Where there are several they start at the same moment.
        begin = time.monotonic() + (0.3 if len(cases) > 1 else 0.0)
        children = []
        for case in cases:
            pid = os.fork()
            if not pid:
                time.sleep(max(0.0, begin - time.monotonic()))
                run_child(case)
            children.append(pid)
        answers = watch(children, [case.kill_after for case in cases], begin)
        print(json.dumps(answers), flush=True)


def watch(children: list[int], kill_after: list[float | None], begin: float) -> list[tuple[int, float, float]]:
    """Wait for all, kill those whose time has come: exit code, seconds and time of the end of each."""
    kill_at = {pid: begin + (after or LONGEST_S) for pid, after in zip(children, kill_after, strict=True)}
    descriptors = {os.pidfd_open(pid): pid for pid in children}
    answers = {}
    while descriptors:
        now = time.monotonic()
        for pid in [pid for pid, when in kill_at.items() if when <= now]:
            # A child that has ended is there until it is waited for: the number is nobody else's.
            os.kill(pid, signal.SIGKILL)
            del kill_at[pid]
        left = min(kill_at.values(), default=now + LONGEST_S) - now
        for descriptor in select.select(list(descriptors), [], [], max(0.0, left))[0]:
            pid = descriptors.pop(descriptor)
            os.close(descriptor)
            kill_at.pop(pid, None)
            _, status = os.waitpid(pid, 0)
            end = time.monotonic()
            answers[pid] = os.waitstatus_to_exitcode(status), end - begin, end
    return [answers[pid] for pid in children]


def run_child(case: Case) -> None:
    """One run by the command line, in a process just forked; does not return."""
    code = 1
    try:
        folder = Path(case.folder)
        output = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for descriptor, source in ((0, null), (1, output), (2, output)):
            os.dup2(source, descriptor)
        os.environ["FASTNST_CACHE"] = str(folder / "cache")
        os.environ.update(case.environment)
        os.setsid()
        for signum in case.ignored:
            signal.signal(signum, signal.SIG_IGN)
        install(case)
        code = exit_code_of(pytest.MonkeyPatch(), *case.argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (Path(case.folder) / "ended").touch()
        # The server's own exit handlers are none of this process's business.
        os._exit(code)


def rehearse() -> None:
    """Import and warm up all that a run needs, and leave no thread behind: a fork copies only its own."""
    import numpy as np
    from PIL import Image

    import fastnst.data.loaders.pillow
    import fastnst.training.monitoring.snapshots

    trace = fastnst.training.monitoring.snapshots.training_graph

    def traced(*args: Any, **kwargs: Any) -> Any:
        GRAPHS.append(trace(*args, **kwargs))
        return GRAPHS[-1]

    fastnst.training.monitoring.snapshots.training_graph = traced
    narrow_the_net()
    real = fastnst.data.loaders.pillow.ProcessPoolExecutor
    fastnst.data.loaders.pillow.ProcessPoolExecutor = InThisProcess  # type: ignore[misc,assignment]
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as null:  # noqa: PTH123
        folder = Path(name)
        (folder / "photos").mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        for index in range(2):
            Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
        os.environ["FASTNST_CACHE"] = str(folder / "cache")
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            argv = arguments(folder / "photos", folder / "run", steps=2)
            code = exit_code_of(pytest.MonkeyPatch(), *argv)
    assert code == 0, code
    assert threading.active_count() == 1, threading.enumerate()
    fastnst.data.loaders.pillow.ProcessPoolExecutor = real  # type: ignore[misc]


def narrow_the_net() -> None:
    """A quarter of the channels: most of the time of runs so short went into saving weights."""
    from fastnst.models.transform_net import ConvLayer, UpLayer

    def narrow(layer: Any, original: Callable[..., None]) -> None:
        def init(self: Any, *channels: int, **kwargs: Any) -> None:
            inputs, outputs = (count if count == 3 else count // 4 for count in channels[:2])
            original(self, inputs, outputs, *channels[2:], **kwargs)

        layer.__init__ = init

    for layer in (ConvLayer, UpLayer):
        narrow(layer, layer.__init__)


if __name__ == "__main__":
    serve()
