"""Runs shared by several processes: what one process alone would have done, whatever happens to one of them."""

import json
import signal
from pathlib import Path

import pytest
from fork_server import ForkServer, arguments
from ranks import run_ranks
from run_evidence import assert_same_outcome, metrics_of

STEPS = 4
SETTINGS = ("train.batch_size=4", "train.checkpoint_every=2", "train.keep_checkpoints=5")


@pytest.fixture(scope="module")
def shared(fork_server: ForkServer, few_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("shared")
    argv = arguments(few_photos, folder / "run", steps=STEPS, settings=SETTINGS)
    ended = run_ranks(fork_server, argv, folder)
    assert [each.code for each in ended] == [0, 0], [each.printed for each in ended]
    assert ended[1].printed == ""
    return folder / "run"


def test_x(shared: Path) -> None:
    print(metrics_of(shared))
