"""Stop signals in each phase of a training run: the exit code, one message, and nothing lost.

All three signals in all phases:

    python -m pytest -m campaign tests/training/test_signals_in_training.py
"""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fastnst.training.signals import STOP_SIGNALS
from helpers.crash_points import Case
from helpers.fork_server import Ended, ForkServer, arguments, next_command
from helpers.run_comparison import assert_same_outcome, leftovers

STEPS = 4
SETTINGS = (
    "train.sample_every=2",
    "visualize.every=2",
    "visualize.images=1",
    "visualize.transform_maps=['up2:0']",
    "visualize.vgg_maps=['relu1_1:0']",
)

# Phase → where the signal comes, at which passing, and what the message says beside the signal's name.
PHASES = {
    "start": ("before-inputs", 1, ""),
    "indexing": ("before-check", 2, ""),
    "first-samples": ("before-samples", 1, ""),
    "step": ("after-backward", 3, "stopped at step 3 of 4, which is saved; go on with: fastnst train --resume"),
    "save": ("mid-write:tensors", 1, "stopped at step 3 of 4, which is saved"),
    "style-model": ("before-rename:model", 1, "stopped at step 3 of 4, which is saved"),
    "samples": ("before-samples", 2, "stopped at step 3 of 4, which is saved"),
    "projections": ("after-projections", 2, "stopped at step 3 of 4, which is saved"),
    "last-save": ("before-rename:checkpoint", 2, "all 4 steps are done and saved"),
    "end": ("before-close", 1, "all 4 steps are done and saved"),
    "last-words": ("after-run", 1, ""),
}


@pytest.fixture(scope="module")
def undisturbed(fork_server: ForkServer, few_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = fork_server.run(Case(arguments(few_photos, folder / "run", steps=STEPS, settings=SETTINGS), str(folder)))
    assert ended.code == 0, ended.printed
    return folder / "run"


def assert_ended_in_good_order(ended: Ended, signum: signal.Signals, message: str) -> None:
    assert (ended.code, ended.killed) == (128 + signum, False), ended.printed
    printed = ended.printed.splitlines()
    assert not [line for line in printed if re.search("(?i)traceback|unexpectedly|warn", line)]
    (said,) = [line for line in printed if line.startswith("fastnst: ")]
    assert message in said
    # The step that is under way at its end names where, and not what: whoever reads it has just sent the signal.
    assert signum.name in said or "stopped at step" in said
    assert ended.after_signal is not None
    assert ended.after_signal < 20


@pytest.fixture
def stop_and_resume(
    fork_server: ForkServer, undisturbed: Path, few_photos: Path, tmp_path: Path
) -> Callable[..., list[int]]:
    """Send signals to a run, resume it, and compare it with the undisturbed one; returns the steps of both."""

    def stop_and_resume(point: str, occurrence: int, signals: Sequence[int], message: str, **how: bool) -> list[int]:
        argv = arguments(few_photos, tmp_path / "run", steps=STEPS, settings=SETTINGS)
        ended = fork_server.run(Case(argv, str(tmp_path), point, occurrence, tuple(signals), **how))
        assert_ended_in_good_order(ended, signal.Signals(signals[-1]), message)
        if len(signals) == 1:
            assert leftovers(tmp_path) == []
        last = fork_server.run(Case(next_command(argv), str(tmp_path)))
        assert last.code == 0, last.printed
        assert_same_outcome(tmp_path / "run", undisturbed)
        return [*ended.steps, *last.steps]

    return stop_and_resume


# All signals in all phases are a campaign.
EVERY_TIME = ("start", "step", "save", "projections", "last-save", "end", "last-words")
CASES = [
    pytest.param(
        *(phase, signum),
        marks=() if phase in EVERY_TIME and signum == STOP_SIGNALS[index % len(STOP_SIGNALS)] else pytest.mark.campaign,
    )
    for index, phase in enumerate(PHASES)
    for signum in STOP_SIGNALS
]


@pytest.mark.parametrize(("phase", "signum"), CASES)
def test_train_loses_nothing_on_a_signal_in_any_phase(
    stop_and_resume: Callable[..., list[int]], phase: str, signum: int
) -> None:
    point, occurrence, message = PHASES[phase]
    # Nothing is done twice: the signal made the run save what it had.
    assert stop_and_resume(point, occurrence, [signum], message) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("point", "signals"),
    [
        ("after-backward", (signal.SIGINT, signal.SIGINT)),
        ("mid-write:tensors", (signal.SIGTERM, signal.SIGHUP)),
    ],
)
def test_train_ends_on_a_second_signal_and_keeps_the_last_checkpoint(
    stop_and_resume: Callable[..., list[int]], point: str, signals: tuple[int, ...]
) -> None:
    stop_and_resume(point, 2, signals, "a second time; what was done since the last checkpoint is lost")


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, *(pytest.param(each, marks=pytest.mark.campaign) for each in STOP_SIGNALS[1:])]
)
def test_train_takes_a_signal_to_its_process_group_as_one(
    stop_and_resume: Callable[..., list[int]], signum: int
) -> None:
    """A terminal's Ctrl-C and hang-up, and a supervisor's SIGTERM, reach the processes that load images as well."""
    message = "stopped at step 2 of 4, which is saved"
    stop_and_resume("after-backward", 2, [signum], message, real_loader=True, whole_group=True)


# A fresh interpreter, in which the import of torch, the longest part of a start, is where the signal comes.
START = """
import os, signal, sys

_, module, signum, *argv = sys.argv

class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), int(signum))

sys.meta_path.insert(0, Strike())
from fastnst.cli.main import main
sys.argv = ["fastnst", *argv]
main()
"""


@pytest.mark.parametrize(
    ("module", "signum"),
    [
        ("torch", signal.SIGINT),
        ("torch.nn", signal.SIGTERM),
        pytest.param("torch", signal.SIGHUP, marks=pytest.mark.campaign),
    ],
)
def test_train_stops_on_a_signal_while_importing(
    few_photos: Path, tmp_path: Path, module: str, signum: signal.Signals
) -> None:
    command = [sys.executable, "-c", START, module, str(int(signum)), *arguments(few_photos, tmp_path / "run", steps=1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 128 + signum, done.stderr
    assert done.stderr == f"fastnst: stopped by {signum.name}\n"
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_train_below_nohup_outlives_its_terminal(fork_server: ForkServer, few_photos: Path, tmp_path: Path) -> None:
    argv = arguments(few_photos, tmp_path / "run", steps=2)
    case = Case(argv, str(tmp_path), "after-step", 1, (signal.SIGHUP,), ignored=(signal.SIGHUP,))
    ended = fork_server.run(case)
    assert ended.code == 0, ended.printed
    assert ended.steps == [1, 2]
    assert ended.after_signal is not None
