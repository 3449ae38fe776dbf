"""Stop requests: when a signal waits, when it raises, and that handlers are put back."""

import os
import signal
import threading

import pytest

from fastnst.errors import StoppedBySignal
from fastnst.training.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_the_first_signal_waits_and_the_second_raises(signum: signal.Signals) -> None:
    with StopRequest().installed() as stop, stop.deferred():
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        with pytest.raises(StoppedBySignal, match=f"{signum.name}, a second time") as raised:
            os.kill(os.getpid(), signum)
    assert raised.value.exit_code == 128 + signum


def test_before_training_a_signal_raises_at_once() -> None:
    with StopRequest().installed() as stop:
        with pytest.raises(StoppedBySignal, match="SIGTERM, before training began") as raised:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum is None
    assert raised.value.exit_code == 143


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with StopRequest().installed():
        assert [signal.getsignal(signum) for signum in STOP_SIGNALS] != before
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before


def test_a_thread_that_may_not_install_handlers_goes_on_without() -> None:
    outcome: list[int | None] = []

    def work() -> None:
        with StopRequest().installed() as stop:
            outcome.append(stop.signum)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome == [None]
