"""Show the progress of long work on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 5.0
START_INTERVAL_S = 1.0
"""While a command starts, when nobody knows yet whether it works."""
_START_S = 10.0

_is_silent = False
_phases: list[tuple[str, float]] = []
"""Label and start of those that are entered, the outermost first."""
_last_said = time.monotonic()


class ProgressReport:
    """Counts items of work and shows the speed; a context manager.

    Args:
        label: what is being done, for example `train`.
        total: items in all; None where that is not known.
        unit: what one item is, in the plural.
        rate_per_item: how many of `rate_unit` one item stands for (a training step stands for a batch of images).
        rate_unit: unit of the speed that is shown.
        start: items done before, by an earlier process; they count as done but not towards the speed.
        interval_s: seconds between plain lines, after more frequent ones at the start.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        rate_per_item: float = 1.0,
        rate_unit: str | None = None,
        start: int = 0,
        interval_s: float = PLAIN_INTERVAL_S,
        stream: TextIO | None = None,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.rate_per_item, self.rate_unit = rate_per_item, rate_unit or unit
        self.done = self._start = start
        # sys.stderr is None in a process that was started with a closed stderr.
        shown = stream or (io.StringIO() if _is_silent or sys.stderr is None else sys.stderr)
        self._stream: TextIO = _Unfailing(shown)  # type: ignore[assignment]
        self._note, self._interval_s = "", interval_s
        self._done_printed = start
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(label, total=total, completed=start, rate="", note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self.done > self._done_printed:
            self._print_line()

    def advance(self, items: int = 1, note: str | None = None) -> None:
        """Count `items` as done; `note` (a loss, say) stays at the end of the line until the next one."""
        global _last_said
        self.done += items
        self._note = self._note if note is None else note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate_text(), note=self._note)
            _last_said = time.monotonic()
            return
        now = time.monotonic()
        interval = self._interval_s if now - self._started > _START_S else START_INTERVAL_S
        if now - self._printed >= interval:
            self._print_line()
            _last_said = now

    @property
    def rate(self) -> float:
        """`rate_unit` per second since this process began."""
        elapsed = time.monotonic() - self._started
        return (self.done - self._start) * self.rate_per_item / elapsed if elapsed > 0 else 0.0

    def _rate_text(self) -> str:
        return f"{_short(self.rate)} {self.rate_unit}/s"

    def _print_line(self) -> None:
        self._printed, self._done_printed = time.monotonic(), self.done
        of_total = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.label}: {self.done}{of_total} {self.unit}", self._rate_text()]
        if self.total is not None and self.done < self.total and self.rate > 0:
            parts.append(f"{duration((self.total - self.done) * self.rate_per_item / self.rate)} left")
        if self._note:
            parts.append(self._note)
        print(", ".join(parts), file=self._stream, flush=True)


class _Unfailing:
    """A stream whose writes never raise: a terminal that is gone must not end the work whose progress it showed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Show no progress within this block: another process shows the same."""
    global _is_silent
    before, _is_silent = _is_silent, True
    try:
        yield
    finally:
        _is_silent = before


@contextlib.contextmanager
def counted(label: str, unit: str, *, scale: float = 1.0) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that shows progress; call it with the amount done and the total.

    Args:
        label: what is being done.
        unit: what is shown.
        scale: how many of what the callback receives make one `unit`.
    """
    with contextlib.ExitStack() as stack:
        report: ProgressReport | None = None

        def count(done: int, total: int) -> None:
            nonlocal report
            done, total = int(done / scale), int(total / scale)
            if report is None:
                # The first amount came from a cache or an earlier try, and is no measure of speed.
                options: dict[str, Any] = {"start": done, "interval_s": START_INTERVAL_S}
                report = stack.enter_context(ProgressReport(label, total, unit, **options))
            report.advance(done - report.done)

        yield count


def duration(seconds: float) -> str:
    """Format as `h:mm:ss`, or `m:ss` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def byte_count(count: float) -> str:
    """Format a number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


@contextlib.contextmanager
def phase(label: str) -> Iterator[None]:
    """Say on stderr what is being done whenever nothing was said for some seconds, from a thread of its own.

    For work that cannot count: an import, a compilation. Of nested phases the innermost speaks.
    """
    if _is_silent:
        yield
        return
    _phases.append((label, time.monotonic()))
    ended = threading.Event()
    speaker = threading.Thread(target=_speak, args=(ended,), name="phase", daemon=True)
    is_outermost = len(_phases) == 1
    if is_outermost:
        speaker.start()
    try:
        yield
    finally:
        _phases.pop()
        if is_outermost:
            ended.set()
            speaker.join()


def _speak(ended: threading.Event) -> None:
    global _last_said
    # Not at once, however long ago the last line was: most phases are quick.
    wait, interval = START_INTERVAL_S / 4, START_INTERVAL_S
    while not ended.wait(max(wait, _last_said + interval - time.monotonic())):
        now = time.monotonic()
        if now - _last_said < interval:
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError, IndexError):  # no stderr, or the phase has ended
            label, started = _phases[-1]
            print(f"{label} … {now - started:.0f} s", file=sys.stderr, flush=True)
        _last_said, interval = now, 2 * START_INTERVAL_S
