"""SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 finish the step, save a checkpoint and print the resume command.

A second signal exits without a save. SIGXCPU, by which the kernel announces the end of a limit of CPU time, saves
too; it comes every second from then on, and only the first counts.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from fastnst.errors import STOP_SIGNALS, StoppedBySignal

__all__ = ["STOP_SIGNALS", "StopRequest", "stopped_by"]

_FORWARDED_S = 5.0


class StopRequest:
    """A stop signal, if one came; the training loop polls it between steps.

    | signal                         | outside `deferred()`     | inside `deferred()`              |
    |--------------------------------|--------------------------|----------------------------------|
    | the first                      | raises `StoppedBySignal` | sets `signum`: the loop saves    |
    | the next                       | ends the process at once | raises `StoppedBySignal`         |
    | any after one that has raised  | ends the process at once | ends the process at once         |
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._deferred = False
        self._raised: int | None = None
        self._received = 0.0
        self._heeded: list[signal.Signals] = []
        self._is_disregarded = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopRequest"]:
        """Handle the stop signals within this block (in the main thread; elsewhere Python allows no handlers).

        A signal that was ignored when the process started stays ignored: `nohup` does so with SIGHUP, a shell's `&`
        may do so with SIGINT.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        heeded = [
            signum for signum in (*STOP_SIGNALS, signal.SIGXCPU) if signal.getsignal(signum) is not signal.SIG_IGN
        ]
        previous = {signum: signal.signal(signum, self._handle) for signum in heeded}
        self._heeded = heeded
        try:
            yield self
        finally:
            self._heeded = []
            for signum, handler in previous.items():
                signal.signal(signum, signal.SIG_IGN if self._is_disregarded else handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block a first signal waits until the loop polls it."""
        # A signal may have raised inside code that swallows every exception.
        self.signum = self.signum or self._raised
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block, inside `deferred()`, a signal raises; so does one that came before."""
        before, self._deferred = self._deferred, False
        try:
            if self.signum is not None:
                raise stopped_by(self.signum)
            yield
        finally:
            self._deferred = before

    def disregard(self) -> None:
        """Ignore all further signals, also after `installed`: this process is ending already."""
        for signum in self._heeded:
            signal.signal(signum, signal.SIG_IGN)
        self._is_disregarded = True

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self._is_repeated(signum):
            return
        self._received = time.monotonic()
        if self._raised is not None:
            # Not `print`, which is not reentrant.
            os.write(2, f"fastnst: stopped at once by {signal.Signals(signum).name}\n".encode())
            os._exit(128 + signum)
        if self._deferred and self.signum is None:
            self.signum = signum
            return
        self._raised = signum
        if self._deferred:
            raise stopped_by(signum, ", a second time; what was done since the last checkpoint is lost")
        raise stopped_by(signum)

    def _is_repeated(self, signum: int) -> bool:
        """Return whether a signal is the one before, which nobody sent twice."""
        earlier = self._raised or self.signum
        if signum == signal.SIGXCPU:
            return earlier is not None
        # A batch system signals all processes, and torchrun passes on to its children what it receives.
        is_below_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        return is_below_torchrun and signum == earlier and time.monotonic() - self._received < _FORWARDED_S


def stopped_by(signum: int, circumstance: str = "") -> StoppedBySignal:
    """Return the exception for a signal; `circumstance` follows its name in the message."""
    return StoppedBySignal(signum, f"stopped by {signal.Signals(signum).name}{circumstance}")
