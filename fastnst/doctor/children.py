"""Facts gathered in processes of their own: one that raises, crashes or hangs costs its own answer and no other.

A driver that hangs does so in the kernel, where no thread of this process could be stopped; a library that crashes
takes its process along. So the probes run in child processes, one after another in each of a few *lanes*, and answer
by one line of JSON each. A child that is silent for longer than its probe may be, or that dies, is given up for that
probe; a new one goes on with the rest of its lane.
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
    """Something to find out: `function` is `module:name`, takes nothing and returns what JSON can hold."""

    name: str
    function: str
    limit: float
    """Seconds until it counts as hanging; those to start its process and import its modules are part of them."""


class ProbeError(Exception):
    """What a probe was to find out is not known; the message says why."""


class Facts:
    """What the probes found, by their names."""

    def __init__(self, answers: Mapping[str, Any], failures: Mapping[str, str]) -> None:
        self._answers, self._failures = answers, failures

    def __getitem__(self, probe: str) -> Any:
        """Raises ProbeError if the probe failed."""
        if probe in self._failures:
            raise ProbeError(self._failures[probe])
        return self._answers[probe]

    def get(self, probe: str) -> Any:
        """An empty dictionary if the probe failed: for what is good to know and decides nothing."""
        return self._answers.get(probe, {})


def collect(lanes: Sequence[Sequence[Probe]]) -> Facts:
    """Run the probes: the lanes side by side, each front to back. Returns when all have answered or been given up."""
    answers: dict[str, Any] = {}
    failures: dict[str, str] = {}
    children = [_Child(lane) for lane in lanes]
    try:
        while busy := [child for child in children if child.waiting]:
            for child in busy:
                child.start()
            patience = min(child.deadline for child in busy) - time.monotonic()
            ready, _, _ = select.select([child.pipe for child in busy], [], [], max(0.0, patience))
            for child in busy:
                if child.pipe in ready:
                    child.receive(answers, failures)
                elif time.monotonic() >= child.deadline:
                    child.give_up(failures, f"no answer within {child.waiting[0].limit:g} s")
    finally:
        for child in children:
            child.stop()
    return Facts(answers, failures)


class _Child:
    def __init__(self, probes: Sequence[Probe]) -> None:
        self.waiting = list(probes)
        self.deadline = 0.0
        self.pipe = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def start(self) -> None:
        """Have a process at work on what is waiting."""
        if self._process is not None:
            return
        # It finds modules where this process does, and nowhere else: not by chance in the working directory.
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
        """Take what has come: answers, or the end of the process."""
        if not (block := os.read(self.pipe, 1 << 16)):
            self.give_up(failures, self._last_words())
            return
        *lines, self._received = (self._received + block).split(b"\n")
        for line in lines:
            probe = self.waiting.pop(0)
            answer = json.loads(line)
            if "error" in answer:
                failures[probe.name] = answer["error"]
            else:
                answers[probe.name] = answer["facts"]
        if self.waiting:
            self._set_deadline()
        else:
            self.stop()

    def give_up(self, failures: dict[str, str], reason: str) -> None:
        """End the process; its present probe has failed because of `reason`."""
        failures[self.waiting.pop(0).name] = reason
        self.stop()

    def stop(self) -> None:
        """End the process, and whatever it has started."""
        if (process := self._process) is None:
            return
        self._process = None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()
        # One that hangs in a driver does not even die; nothing is gained by waiting for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2.0)

    def _set_deadline(self) -> None:
        self.deadline = time.monotonic() + self.waiting[0].limit

    def _last_words(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return "its process fell silent"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"its process crashed ({signal.Signals(-code).name})"
        return f"its process ended with code {code}"


def main() -> None:
    """In a child: carry out the functions that the arguments name, and print an answer for each."""
    # One that hangs must not stay behind when its parent is killed and cannot give it up.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries may print what they like; answers go where only this function writes.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for function in sys.argv[1:]:
            module, _, name = function.partition(":")
            try:
                answer = {"facts": getattr(importlib.import_module(module), name)()}
                line = json.dumps(answer)
            # Whatever goes wrong in there is what was to be found out.
            except (Exception, SystemExit) as error:
                line = json.dumps({"error": in_words(error)})
            print(line, file=answers, flush=True)


def in_words(error: BaseException) -> str:
    """One line about `error`, cut where it grows long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else ""
    said = said if len(said) <= 200 else said[:199] + "…"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
