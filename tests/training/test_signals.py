"""Stop requests: when a signal waits, when it raises, when it ends the process, and that handlers are put back."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from fastnst.errors import StoppedBySignal
from fastnst.training import signals
from fastnst.training.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_deferred_keeps_the_first_signal_and_raises_the_second(signum: signal.Signals) -> None:
    with StopRequest().installed() as stop, stop.deferred():
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        with pytest.raises(StoppedBySignal, match=f"{signum.name}, a second time; .* lost") as raised:
            os.kill(os.getpid(), signum)
    assert raised.value.exit_code == 128 + signum


def test_installed_raises_a_signal_at_once() -> None:
    with StopRequest().installed() as stop:
        with pytest.raises(StoppedBySignal, match=r"^stopped by SIGTERM$") as raised:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum is None
    assert raised.value.exit_code == 143


def test_at_once_raises_a_signal() -> None:
    with StopRequest().installed() as stop, stop.deferred():
        with pytest.raises(StoppedBySignal, match=r"^stopped by SIGHUP$"), stop.at_once():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signum is None


def test_at_once_raises_a_signal_that_waited() -> None:
    with StopRequest().installed() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(StoppedBySignal, match="SIGHUP"), stop.at_once():
            pytest.fail("the work was begun")


def test_disregard_ignores_all_further_signals() -> None:
    before = {signum: signal.getsignal(signum) for signum in (*STOP_SIGNALS, signal.SIGXCPU)}
    try:
        with StopRequest().installed() as stop:
            stop.disregard()
            for signum in STOP_SIGNALS:
                os.kill(os.getpid(), signum)
        for signum in STOP_SIGNALS:
            os.kill(os.getpid(), signum)
        assert stop.signum is None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_installed_raises_no_exception_that_a_decoder_takes_for_damage() -> None:
    with StopRequest().installed(), pytest.raises(StoppedBySignal), contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)


def test_deferred_keeps_a_signal_that_was_swallowed() -> None:
    with StopRequest().installed() as stop:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            assert stop.signum is None
        with stop.deferred():
            assert stop.signum == signal.SIGTERM


def test_deferred_counts_sigxcpu_once() -> None:
    """The kernel sends it every second."""
    with StopRequest().installed() as stop, stop.deferred():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGXCPU)
        assert stop.signum == signal.SIGXCPU
        with pytest.raises(StoppedBySignal, match="SIGTERM, a second time"):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_deferred_counts_once_what_torchrun_passes_on(monkeypatch: pytest.MonkeyPatch, signum: signal.Signals) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with StopRequest().installed() as stop, stop.deferred():
        os.kill(os.getpid(), signum)
        now += 1.0
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        now += 10.0
        with pytest.raises(StoppedBySignal, match="a second time"):
            os.kill(os.getpid(), signum)


def test_stop_signals_hold_those_of_batch_systems() -> None:
    assert {signal.SIGUSR1, signal.SIGUSR2} < set(STOP_SIGNALS)


FORCED = """
import os, signal, sys
from fastnst.errors import StoppedBySignal
from fastnst.training.signals import StopRequest
with StopRequest().installed() as stop:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        print("cleaning up", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print("still here")
"""


def test_installed_ends_the_process_at_a_signal_after_one_that_raised() -> None:
    done = subprocess.run([sys.executable, "-c", FORCED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "cleaning up\n")
    assert done.stderr == "fastnst: stopped at once by SIGTERM\n"


def test_installed_handles_each_stop_signal_and_restores_its_handler() -> None:
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with StopRequest().installed():
        assert not any(signal.getsignal(signum) in before for signum in STOP_SIGNALS)
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before


def test_installed_leaves_an_ignored_signal_ignored() -> None:
    """As below `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().installed() as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signum is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_installed_does_nothing_in_another_thread() -> None:
    outcome: list[int | None] = []

    def work() -> None:
        with StopRequest().installed() as stop:
            outcome.append(stop.signum)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [None]
