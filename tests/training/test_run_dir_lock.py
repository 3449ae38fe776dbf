"""A run directory has one owner: of several processes that start in it at once, one trains and the others end."""

from pathlib import Path

import pytest

from fastnst.storage import LOCK_NAME
from helpers.crash_points import Case
from helpers.fork_server import ForkServer, arguments, next_command
from helpers.run_comparison import assert_same_outcome

PROCESSES = 4
STEPS = 4


@pytest.fixture(scope="module")
def undisturbed(fork_server: ForkServer, few_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = fork_server.run(Case(arguments(few_photos, folder / "run", steps=STEPS), str(folder)))
    assert ended.code == 0, ended.printed
    return folder / "run"


@pytest.mark.parametrize("resume", [False, True], ids=["new", "after a kill"])
def test_lock_run_lets_one_of_several_processes_train(
    fork_server: ForkServer, undisturbed: Path, few_photos: Path, tmp_path: Path, resume: bool
) -> None:
    argv = arguments(few_photos, tmp_path / "run", steps=STEPS)
    if resume:
        ended = fork_server.run(Case(argv, str(tmp_path), point="after-backward", occurrence=3))
        assert ended.killed
        assert (tmp_path / "run" / LOCK_NAME).exists()
    folders = [tmp_path / f"process {number}" for number in range(PROCESSES)]
    # They come to the lock at the same moment, and the owner has not ended before the others have.
    all_there = tuple(str(folder / "before-lock") for folder in folders)
    cases = []
    for folder in folders:
        others_gone = tuple(str(other / "ended") for other in folders if other != folder)
        meetings = (("before-lock", all_there), ("before-close", others_gone))
        cases.append(Case(next_command(argv), str(folder), meetings=meetings))
    owner, *others = sorted(fork_server.run_together(cases), key=lambda ended: ended.code)
    assert owner.code == 0
    assert owner.steps
    for other in others:
        assert other.code == 2, other.printed
        (message,) = [line for line in other.printed.splitlines() if line.startswith("fastnst: ")]
        assert "is in use by another fastnst process; wait for it to end or choose another --out" in message
        assert other.steps == []
        assert "Traceback" not in other.printed
    assert_same_outcome(tmp_path / "run", undisturbed)


def test_lock_run_is_not_held_by_the_loader_processes_of_a_killed_run(
    fork_server: ForkServer, undisturbed: Path, few_photos: Path, tmp_path: Path
) -> None:
    argv = arguments(few_photos, tmp_path / "run", steps=STEPS)
    ended = fork_server.run(Case(argv, str(tmp_path), point="after-backward", occurrence=3, real_loader=True))
    assert ended.killed
    last = fork_server.run(Case(next_command(argv), str(tmp_path)))
    assert last.code == 0, last.printed
    assert_same_outcome(tmp_path / "run", undisturbed)


def test_lock_run_is_held_until_the_log_is_closed(fork_server: ForkServer, few_photos: Path, tmp_path: Path) -> None:
    argv = arguments(few_photos, tmp_path / "run", steps=2)
    folders = tmp_path / "first", tmp_path / "second"
    first = Case(argv, str(folders[0]), meetings=(("before-close", (str(folders[1] / "ended"),)),))
    second = Case(argv, str(folders[1]), meetings=(("before-inputs", (str(folders[0] / "before-close"),)),))
    owner, other = fork_server.run_together([first, second])
    assert owner.code == 0, owner.printed
    assert other.code == 2, other.printed
    assert "is in use by another fastnst process" in other.printed
