"""Stop requests: SIGINT, SIGTERM and SIGHUP end a run in good order."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from fastnst.errors import StoppedBySignal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """What the training loop polls between steps.

    Outside `deferred()` a signal raises `StoppedBySignal` where the program stands: nothing needs saving there. Inside
    it the first signal only sets `signum`, so that the step is finished and saved; a second one raises.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._deferred = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopRequest"]:
        """Handle the stop signals within this block (in the main thread; elsewhere Python allows no handlers)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {signum: signal.signal(signum, self._handle) for signum in STOP_SIGNALS}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block a first signal waits until the loop asks for it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        if self._deferred and self.signum is None:
            self.signum = signum
            return
        forced = (
            "a second time; what was done since the last checkpoint is lost"
            if self._deferred
            else "before training began"
        )
        raise StoppedBySignal(signum, f"stopped by {name}, {forced}")
