"""Run probes in worker processes: a probe that raises, crashes or hangs loses its own result only.

A driver can hang inside the kernel, where no thread could be stopped, and a crashing library takes its process along.
Each worker process runs its probes in order and prints one line of JSON per probe. If a worker dies or exceeds a
probe's time limit, it is killed, that probe fails, and a new process runs the worker's remaining probes.
"""

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Probe:
    """One measurement: `function` is `module:name`, takes no arguments and returns a JSON value."""

    name: str
    function: str
    limit: float
    """Time limit in seconds, including process start and imports."""


class ProbeError(Exception):
    """A probe failed; the message says why."""


class Results:
    """Results of the probes, by name."""

    def __init__(self, answers: Mapping[str, Any], failures: Mapping[str, str]) -> None:
        self._answers, self._failures = answers, failures

    def __getitem__(self, probe: str) -> Any:
        """Raises ProbeError if the probe failed."""
        if probe in self._failures:
            raise ProbeError(self._failures[probe])
        return self._answers[probe]

    def get(self, probe: str) -> Any:
        """Return the result, or {} if the probe failed: for optional details."""
        return self._answers.get(probe, {})


def run_probes(workers: Sequence[Sequence[Probe]]) -> Results:
    """Run the workers in parallel, the probes of each in order, until each has answered or failed."""
    answers: dict[str, Any] = {}
    failures: dict[str, str] = {}
    processes = [_Worker(probes) for probes in workers]
    try:
        while busy := [worker for worker in processes if worker.waiting]:
            for worker in busy:
                worker.start()
            timeout = min(worker.deadline for worker in busy) - time.monotonic()
            ready, _, _ = select.select([worker.pipe for worker in busy], [], [], max(0.0, timeout))
            for worker in busy:
                if worker.pipe in ready:
                    worker.receive(answers, failures)
                elif time.monotonic() >= worker.deadline:
                    worker.fail(failures, f"no answer within {worker.waiting[0].limit:g} s")
    finally:
        for worker in processes:
            worker.stop()
    return Results(answers, failures)


class _Worker:
    def __init__(self, probes: Sequence[Probe]) -> None:
        self.waiting = list(probes)
        self.deadline = 0.0
        self.pipe = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def start(self) -> None:
        """Start a process for the waiting probes, unless one is running."""
        if self._process is not None:
            return
        # The child finds modules where this process does, and none in the working directory by accident.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        functions = [probe.function for probe in self.waiting]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import main; main()", *functions],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.pipe = self._process.stdout.fileno()
        self._received = b""
        self._set_deadline()

    def receive(self, answers: dict[str, Any], failures: dict[str, str]) -> None:
        """Read answers from the pipe, or the end of the process."""
        if not (block := os.read(self.pipe, 1 << 16)):
            self.fail(failures, self._exit_reason())
            return
        *lines, self._received = (self._received + block).split(b"\n")
        for line in lines:
            probe = self.waiting.pop(0)
            answer = json.loads(line)
            if "error" in answer:
                failures[probe.name] = answer["error"]
            else:
                answers[probe.name] = answer["result"]
        if self.waiting:
            self._set_deadline()
        else:
            self.stop()

    def fail(self, failures: dict[str, str], reason: str) -> None:
        """Record `reason` as the current probe's failure and end the process."""
        failures[self.waiting.pop(0).name] = reason
        self.stop()

    def stop(self) -> None:
        """Kill the process and its children."""
        if (process := self._process) is None:
            return
        self._process = None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()
        # A process that hangs in a driver does not die: do not wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2.0)

    def _set_deadline(self) -> None:
        self.deadline = time.monotonic() + self.waiting[0].limit

    def _exit_reason(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return "its process closed its pipe"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"its process crashed ({signal.Signals(-code).name})"
        return f"its process ended with code {code}"


def main() -> None:
    """Run the functions named in argv (child process) and print a line of JSON for each."""
    # A hanging child must not survive its parent, not even a parent killed by SIGKILL.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries may print to stdout: point it at stderr and keep the pipe for answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for function in sys.argv[1:]:
            module, _, name = function.partition(":")
            try:
                line = json.dumps({"result": getattr(importlib.import_module(module), name)()})
            except (Exception, SystemExit) as error:
                line = json.dumps({"error": format_error(error)})
            print(line, file=answers, flush=True)


def format_error(error: BaseException) -> str:
    """Return `Type: first line` of an error, the line cut at 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    text = text if len(text) <= 200 else text[:199] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
