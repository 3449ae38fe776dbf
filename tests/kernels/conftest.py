"""Three tiers of kernel tests under one plain `pytest`: the PyTorch path, the interpreter, the GPU.

A test that takes the fixture `tier` runs once per tier. Triton chooses between compiler and interpreter when a kernel
is defined, which is once per process, so the interpreter's tests run in one child pytest with `TRITON_INTERPRET=1`. It
starts with the first kernel test, works beside this process, and streams its reports, which appear here as if the tests
had run in place. Under pytest-xdist one worker waits for it, and the others run all other tests: `tests/conftest.py`.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton

from fastnst_kernels import runtime

_REPORTS = "KERNEL_TEST_REPORTS"  # in the child's environment: the pipe that its reports go to
_ONE_ELEMENT = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"  # by Triton 3.6, see below
_CHILD = pytest.StashKey["_InterpreterRun"]()


@dataclass(frozen=True)
class Tier:
    name: str
    device: torch.device
    implementation: str


@pytest.fixture(params=["reference", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def tier(request: pytest.FixtureRequest) -> Tier:
    """Where the test runs; made sure of, so that no tier can silently test another one's code."""
    name = request.param
    if name == "interpreter" and (reason := _why_interpreter_cannot_loop()):
        pytest.skip(reason)
    device = torch.device("cuda" if name == "gpu" else "cpu")
    expected = "reference" if name == "reference" else "triton"
    assert runtime.implementation(torch.empty(1, device=device)) == expected
    return Tier(name, device, expected)


def _why_interpreter_cannot_loop() -> str:
    """Triton 3.6's interpreter converts arrays of one element to int, which NumPy 2.4 refuses."""
    versions = triton.__version__, np.__version__
    triton_version, numpy_version = (tuple(int(part) for part in version.split(".")[:2]) for version in versions)
    if triton_version < (3, 7) and numpy_version >= (2, 4):
        return (
            f"the interpreter of Triton {versions[0]} cannot run loops with NumPy {versions[1]}; it needs 2.3 or older"
        )
    return ""


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill allocations with NaN (bytes with 255), so that an unwritten element cannot pass for a zero."""
    allocate: Callable[..., torch.Tensor] = runtime.allocate

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

    monkeypatch.setattr(runtime, "allocate", poisoned)


class _InterpreterRun:
    """A child pytest that runs `items` in Triton's interpreter and sends its reports through a pipe."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="kernel-tests-")
        self._log, selection = (Path(self._folder.name) / name for name in ("log", "selection"))
        selection.write_text("\n".join(item.nodeid for item in items))
        receiver, sender = os.pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", _ONE_ELEMENT, f"@{selection}"],
                cwd=config.rootpath,
                env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", _REPORTS: str(sender)},
                pass_fds=(sender,),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        os.close(sender)
        self._arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # A thread empties the pipe, so that the child never waits for a reader.
        threading.Thread(target=self._receive, args=(receiver,), daemon=True).start()
        self._reports: dict[str, list[pytest.TestReport]] = {}

    def _receive(self, receiver: int) -> None:
        with open(receiver, encoding="utf-8") as pipe:
            for line in pipe:
                self._arrived.put(line)
        self._arrived.put(None)

    def reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Waits until `item` has run. Should the child end first, a failed report with its last words."""
        while (reports := self._reports.setdefault(item.nodeid, [])) == [] or reports[-1].when != "teardown":
            line = self._arrived.get()
            if line is None:
                self._arrived.put(None)  # for the items after this one
                code, words = self._process.wait(), self._log.read_text(errors="replace")[-4000:]
                message = f"the interpreter's pytest ended with code {code} before this test was over:\n{words}"
                return [*reports, pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")]
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=json.loads(line))
            if isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)  # why a test was skipped; JSON has no tuples
            self._reports.setdefault(report.nodeid, []).append(report)
        return reports

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _is_for_interpreter(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("tier") == "interpreter"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """In the parent, an interpreter's test is its child's report."""
    if _REPORTS in os.environ:
        return None
    session = item.session
    # A worker of pytest-xdist knows all tests, and only the one with the interpreter's shall start the child.
    wanted = "PYTEST_XDIST_WORKER" not in os.environ or _is_for_interpreter(item)
    if (
        wanted
        and _CHILD not in session.stash
        and (chosen := [other for other in session.items if _is_for_interpreter(other)])
    ):
        session.stash[_CHILD] = _InterpreterRun(session.config, chosen)
        session.config.add_cleanup(session.stash[_CHILD].close)
    if not _is_for_interpreter(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in session.stash[_CHILD].reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child, every report goes to the parent."""
    if (sender := os.environ.get(_REPORTS)) and _config is not None:
        data = _config.hook.pytest_report_to_serializable(config=_config, report=report)
        os.write(int(sender), json.dumps(data).encode() + b"\n")


_config: pytest.Config | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _config
    _config = config
