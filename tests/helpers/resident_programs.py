"""Run kernels with a barrier in Triton's interpreter: one process per program, shared memory.

The interpreter runs a grid's programs one after another, so the first to wait at a barrier would wait for ever. Here
each is a process of its own, forked at the launch, and the tensors of the launch are in shared memory. The
interpreter's atomics act on that memory, so waiting is real, and so is a deadlock: a timeout ends it.
"""

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from helpers.byte_counter import Traffic

_PREFIX = "one_pass_"
_TIMEOUT_S = 120.0
_PAUSE_S = 2e-4  # before an atomic, so that a program that waits leaves the processor to those it waits for


class _Over(BaseException):
    """The one program of this process is over; not an Exception, which the interpreter would wrap."""


@contextmanager
def programs_at_once(traffic: Traffic | None = None, timeout: float = _TIMEOUT_S) -> Iterator[list[str]]:
    """Within, every one-pass kernel runs all its programs at once; other kernels run as ever.

    Args:
        traffic: what an enclosing `count_bytes` yields, to which the processes' loads and stores are added.
        timeout: seconds after which a launch is killed and reported as hanging.

    Yields:
        The names of the one-pass kernels launched so far.

    Raises:
        AssertionError: at the launch, if a program fails or hangs.
    """
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__
    launched: list[str] = []

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        if not name.startswith(_PREFIX):
            run(self, *args, **kwargs)
            return
        launched.append(name)
        for argument in args:
            if isinstance(argument, torch.Tensor):
                argument.share_memory_()
        with tempfile.TemporaryDirectory(prefix="programs-") as folder:
            outcomes = [Path(folder) / str(i) for i in range(self.grid[0])]
            processes = [
                _fork(lambda i=i: _run_program(i, lambda: run(self, *args, **kwargs), traffic), outcomes[i])
                for i in range(self.grid[0])
            ]
            hanging = _wait(processes, timeout)
            assert not hanging, f"{name}: {len(hanging)} of {self.grid[0]} programs still waited after {timeout} s"
            for i, outcome in enumerate(outcomes):
                error, moved = pickle.loads(outcome.read_bytes())
                assert not error, f"{name}, program {i}:\n{error}"
                if traffic is not None:
                    traffic.add(moved)
        if traffic is not None:
            traffic.launches += 1

    with mock.patch.object(interpreter.GridExecutor, "__call__", launch):
        yield launched


def _fork(program: Any, outcome: Path) -> int:
    process = os.fork()
    if process:
        return process
    try:
        error, moved = "", None
        try:
            moved = program()
        except BaseException:
            error = traceback.format_exc()
        outcome.write_bytes(pickle.dumps((error, moved)))
    finally:
        os._exit(0)  # whatever happens, this process must not go on as a second pytest


def _run_program(i: int, run: Any, traffic: Traffic | None) -> Traffic | None:
    """In its own process: what `run` does for program `i` of the grid."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_grid_idx, atomic = builder.set_grid_idx, builder.create_atomic_rmw

    def only_this(x: int, y: int, z: int) -> None:
        if x > 0:
            raise _Over
        set_grid_idx(i, y, z)

    def patient(*args: Any) -> Any:
        time.sleep(_PAUSE_S)
        return atomic(*args)

    builder.set_grid_idx, builder.create_atomic_rmw = only_this, patient
    if traffic is not None:
        traffic.__init__()  # type: ignore[misc]  # of what the parent has counted, this process knows a copy
    with suppress(_Over):
        run()
    return traffic


def _wait(processes: list[int], timeout: float) -> list[int]:
    """Waits for all; kills, and returns, those that are not over in time."""
    running, deadline = list(processes), time.monotonic() + timeout
    while running and time.monotonic() < deadline:
        running = [process for process in running if os.waitpid(process, os.WNOHANG)[0] == 0]
        time.sleep(0.002)
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return running
