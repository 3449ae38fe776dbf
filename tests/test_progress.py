"""Progress: what a log file gets, what a terminal gets, and the numbers in both."""

import io
import re
import threading
import time

import pytest

from fastnst import progress
from fastnst.progress import ProgressReport, byte_count, counted, duration


class Clock:
    """A clock that tests move by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_progress_report_prints_plain_lines_every_few_seconds_and_once_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressReport("train", 100, "steps", rate_per_item=4, rate_unit="images", stream=stream) as report:
        for _ in range(17):
            clock.now += 1.0
            report.advance(note="loss 3.2")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "train: 2/100 steps, 4.0 images/s, 1:38 left, loss 3.2",
        "train: 4/100 steps, 4.0 images/s, 1:36 left, loss 3.2",
        "train: 6/100 steps, 4.0 images/s, 1:34 left, loss 3.2",
        "train: 8/100 steps, 4.0 images/s, 1:32 left, loss 3.2",
        "train: 10/100 steps, 4.0 images/s, 1:30 left, loss 3.2",
        "train: 15/100 steps, 4.0 images/s, 1:25 left, loss 3.2",
        "train: 17/100 steps, 4.0 images/s, 1:23 left, loss 3.2",
    ]


def test_progress_report_rate_leaves_out_earlier_processes(clock: Clock) -> None:
    report = ProgressReport("train", 100, "steps", start=50, stream=io.StringIO())
    clock.now += 10.0
    report.advance(5)
    assert report.rate == pytest.approx(0.5)
    assert report.done == 55


def test_progress_report_prints_nothing_if_nothing_is_done(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressReport("check", None, "images", stream=stream):
        clock.now += 60.0
    assert stream.getvalue() == ""


def test_counted_leaves_the_first_amount_out_of_the_speed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with counted("download", "MB", scale=1e6) as count:
        count(300_000_000, 500_000_000)
        clock.now += 10.0
        count(400_000_000, 500_000_000)
    assert stream.getvalue() == "download: 400/500 MB, 10.0 MB/s, 0:10 left\n"


def test_progress_report_shows_a_bar_on_a_terminal(clock: Clock) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ProgressReport("train", 2, "steps", stream=stream) as report:
        clock.now += 1.0
        report.advance(note="loss 3.2")
    assert "train" in stream.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_report_goes_on_where_its_stream_fails(clock: Clock, is_terminal: bool) -> None:
    """A terminal that was closed answers EIO; a full disk ENOSPC."""

    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

        def write(self, _: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

    with ProgressReport("train", 2, "steps", stream=Gone()) as report:
        for _ in range(2):
            clock.now += 9.0
            report.advance(note="loss 3.2")
    assert report.done == 2


def test_progress_report_without_stderr(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys, "stderr", None)
    with ProgressReport("train", 2, "steps") as report:
        clock.now += 9.0
        report.advance()
    assert report.done == 1


class Said(io.StringIO):
    """A log file that waits until something has been written."""

    def wait(self, times: int, text: str) -> None:
        deadline = time.monotonic() + 30
        while len(re.findall(text, self.getvalue())) < times:
            assert time.monotonic() < deadline, self.getvalue()
            time.sleep(0.005)


def test_phase_says_again_and_again_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "START_INTERVAL_S", 0.02)
    monkeypatch.setattr(progress.sys, "stderr", stream := Said())
    with progress.phase("load VGG19"):
        stream.wait(3, r"load VGG19 … \d+ s\n")
        with progress.phase("something inside"):
            stream.wait(3, r"something inside … \d+ s\n")
        stream.wait(4, r"load VGG19 … \d+ s\n")
    said = stream.getvalue()
    time.sleep(0.1)
    assert said == stream.getvalue()
    with pytest.raises(KeyError):
        _fail_after(stream, r"next … \d+ s\n")
    assert not [thread for thread in threading.enumerate() if thread.name == "phase"]


def test_phase_leaves_the_word_to_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "START_INTERVAL_S", 0.5)
    monkeypatch.setattr(progress.sys, "stderr", stream := Said())
    with progress.phase("compute"), ProgressReport("train", 100, "steps", stream=io.StringIO()) as report:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            report.advance(0)
            report._printed = 0.0  # the next one prints, too
            time.sleep(0.005)
    assert stream.getvalue() == ""


def _fail_after(stream: Said, text: str) -> None:
    with progress.phase("next"):
        stream.wait(1, text)
        raise KeyError


def test_phase_says_nothing_of_what_is_quick_or_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "START_INTERVAL_S", 0.01)
    monkeypatch.setattr(progress.sys, "stderr", stream := Said())
    with progress.silenced(), progress.phase("load VGG19"):
        time.sleep(0.1)
    monkeypatch.setattr(progress, "START_INTERVAL_S", 60.0)
    with progress.phase("load VGG19"):
        pass
    assert stream.getvalue() == ""


def test_phase_needs_no_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "START_INTERVAL_S", 0.005)
    monkeypatch.setattr(progress.sys, "stderr", None)
    with progress.phase("load VGG19"):
        time.sleep(0.05)


def test_duration() -> None:
    assert list(map(duration, (0, 59.6, 61, 3600, 36_061))) == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]


def test_byte_count() -> None:
    counts = (0, 1023, 1536, 574_673_361, 2**45)
    assert list(map(byte_count, counts)) == ["0 B", "1023 B", "1.5 KiB", "548.1 MiB", "32.0 TiB"]
