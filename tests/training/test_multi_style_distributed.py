"""Several styles in several processes: each as if two processes trained it alone, also if stopped or killed."""

import signal
from pathlib import Path

import pytest

from fastnst.training.run_dir.checkpoint import checkpoint_steps
from fastnst.training.run_dir.style_folder import STYLES_NAME
from helpers.fork_server import ForkServer, arguments
from helpers.run_comparison import assert_same_outcome
from helpers.torchrun_helpers import codes, run_ranks

STEPS = 4
SETTINGS = ("train.batch_size=4", "train.checkpoint_every=2", "train.keep_checkpoints=5")
NAMES = ("image_00", "image_01")


def command(photos: Path, out: Path, *names: str) -> tuple[str, ...]:
    """That of a small run of these styles."""
    given = arguments(photos, out, steps=STEPS, settings=SETTINGS)
    position = given.index("--style")
    styles = [word for name in names for word in ("--style", str(next(photos.glob(f"{name}.*"))))]
    return (*given[:position], *styles, *given[position + 2 :])


@pytest.fixture(scope="module")
def alone(fork_server: ForkServer, few_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each style, by two processes."""
    folder = tmp_path_factory.mktemp("alone")
    for name in NAMES:
        assert codes(run_ranks(fork_server, command(few_photos, folder / name, name), folder / f"of-{name}")) == [0, 0]
    return folder


def test_train_styles_distributed_gives_each_what_it_has_alone(
    fork_server: ForkServer, few_photos: Path, alone: Path, tmp_path: Path
) -> None:
    ended = run_ranks(fork_server, command(few_photos, tmp_path / "runs", *NAMES), tmp_path)
    assert codes(ended) == [0, 0]
    assert ended[1].printed == ""
    assert ended[0].printed.count("training: 2 styles, 4 steps of 4 images") == 1
    for name in NAMES:
        assert_same_outcome(tmp_path / "runs" / name, alone / name)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".lock", *NAMES, STYLES_NAME]


def test_train_styles_distributed_stops_all_at_the_same_step(
    fork_server: ForkServer, few_photos: Path, alone: Path, tmp_path: Path
) -> None:
    argv = command(few_photos, tmp_path / "runs", *NAMES)
    # Its fifth step is the third of the first style.
    ended = run_ranks(
        fork_server,
        argv,
        tmp_path / "stopped",
        point={1: "after-step"},
        occurrence={1: 5},
        signals={1: (signal.SIGTERM,)},
    )
    assert codes(ended) == [143, 143]
    assert [max(checkpoint_steps(tmp_path / "runs" / name)) for name in NAMES] == [3, 3]
    assert codes(run_ranks(fork_server, (*argv, "--resume"), tmp_path / "resumed")) == [0, 0]
    for name in NAMES:
        run = tmp_path / "runs" / name
        assert (run / "checkpoints/step_00000004/state.safetensors").read_bytes() == (
            alone / name / "checkpoints/step_00000004/state.safetensors"
        ).read_bytes()


@pytest.mark.campaign
def test_train_styles_distributed_says_what_is_saved_if_a_process_is_killed(
    fork_server: ForkServer, few_photos: Path, alone: Path, tmp_path: Path
) -> None:
    argv = command(few_photos, tmp_path / "runs", *NAMES)
    ended = run_ranks(fork_server, argv, tmp_path / "killed", point={1: "after-step"}, occurrence={1: 5})
    assert ended[1].killed
    assert ended[0].code == 5, ended[0].printed
    assert "step 2 is the last that is saved; go on by the same torchrun command with --resume" in ended[0].printed
    assert codes(run_ranks(fork_server, (*argv, "--resume"), tmp_path / "resumed")) == [0, 0]
    for name in NAMES:
        assert_same_outcome(tmp_path / "runs" / name, alone / name)
