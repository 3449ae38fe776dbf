"""Processes that are killed, at named points of a run and at random, and what the resumed run comes to.

Each case kills a real process with SIGKILL, resumes until the end, and compares with a run that nobody disturbed: every
byte of the checkpoint and of the style model, every row of metrics, every point, histogram and picture in TensorBoard.

All points five times over, and a hundred random kills:

    python -m pytest -m campaign tests/test_crash.py
"""

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_points import Case
from fork_server import Ended, ForkServer, arguments, next_command
from run_evidence import assert_same_outcome, leftovers

from fastnst.training.checkpoint import checkpoint_steps

EVERY = 2
"""Steps between two checkpoints, as `arguments` has it."""

IN_A_SAVE = (
    "before-fsync:metrics",
    "before-mkdir:checkpoint",
    "before-open:tensors",
    "after-open:tensors",
    "mid-write:tensors",
    "before-fsync:tensors",
    "after-fsync:tensors",
    "before-rename:tensors",
    "mid-write:state",
    "before-open:manifest",
    "mid-write:manifest",
    "after-rename:manifest",
    "before-rename:checkpoint",
    "after-rename:checkpoint",
    "after-fsync:folder",
    "before-rename:old",
    "before-unlink:old",
    "before-open:model",
    "mid-write:model",
    "before-rename:model",
    "after-rename:model",
)
IN_A_STEP = (
    "before-step",
    "after-backward",
    "after-optimiser",
    "after-step",
    "before-metrics",
    "mid-write:row",
    "mid-write:event",
    "before-samples",
    "before-flush",
    "after-flush",
)
IN_EACH_PROCESS = (
    "before-check",
    "before-open:config",
    "mid-write:config",
    "before-rename:config",
    "after-rename:config",
    "before-close",
    "after-close",
    "after-run",
)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def photos(generated_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures: more than one pass in the runs here."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(generated_photos.iterdir())[:5]:
        shutil.copy2(path, folder)
    return folder


Reference = tuple[Path, Ended]


@pytest.fixture(scope="module")
def undisturbed(server: ForkServer, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """The run that a disturbed one must equal, by its number of steps and settings."""
    known: dict[tuple[int, tuple[str, ...]], Reference] = {}

    def run(steps: int, settings: tuple[str, ...] = ()) -> Reference:
        if (steps, settings) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            argv = arguments(photos, folder / "run", steps=steps, settings=settings)
            ended = server.run(Case(argv, str(folder)))
            assert ended.code == 0, ended.printed
            assert ended.steps == list(range(1, steps + 1))
            known[steps, settings] = folder / "run", ended
        return known[steps, settings]

    return run


def assert_no_more_is_lost_than_since_the_last_save(disturbed: list[Ended], last: Ended, steps: int) -> None:
    """The next process begins behind the newest checkpoint, which is at most one interval back."""
    for before, after in itertools.pairwise([*disturbed, last]):
        if before.steps:
            resumed_at = after.steps[0] - 1 if after.steps else steps
            assert 0 <= before.steps[-1] - resumed_at <= EVERY
    for ended in (*disturbed, last):
        assert ended.steps == list(range(ended.steps[0], ended.steps[-1] + 1)) if ended.steps else True


def kill_at(
    point: str,
    occurrence: int,
    *,
    times: int = 1,
    steps: int,
    server: ForkServer,
    undisturbed: Callable[..., Reference],
    photos: Path,
    tmp_path: Path,
) -> None:
    argv = arguments(photos, tmp_path / "run", steps=steps)
    disturbed = []
    for _ in range(times):
        ended = server.run(Case(next_command(argv), str(tmp_path), point=point, occurrence=occurrence))
        assert (ended.killed, ended.code) == (True, 137), f"{point} was not passed: {ended.printed}"
        disturbed.append(ended)
    last = server.run(Case(next_command(argv), str(tmp_path)))
    assert last.code == 0, last.printed
    assert "passed over" not in last.printed
    assert_no_more_is_lost_than_since_the_last_save(disturbed, last, steps)
    assert_same_outcome(tmp_path / "run", undisturbed(steps)[0])


@pytest.mark.parametrize("point", [*IN_A_SAVE, *IN_A_STEP, *IN_EACH_PROCESS])
def test_a_run_killed_at_any_point_ends_as_if_it_had_not_been(
    server: ForkServer, undisturbed: Callable[..., Reference], photos: Path, tmp_path: Path, point: str
) -> None:
    occurrence = 1 if point in IN_EACH_PROCESS else 2
    if point in ("before-rename:old", "before-unlink:old"):
        occurrence = 1
    kill_at(point, occurrence, steps=4, server=server, undisturbed=undisturbed, photos=photos, tmp_path=tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("point", [*IN_A_SAVE, *IN_A_STEP, *IN_EACH_PROCESS])
def test_each_point_at_five_moments(
    server: ForkServer, undisturbed: Callable[..., Reference], photos: Path, tmp_path: Path, point: str, number: int
) -> None:
    """python -m pytest -m campaign tests/test_crash.py -k five_moments"""
    # What happens once in a process is struck in so many processes, one after the other.
    occurrence, times = (1, number) if point in IN_EACH_PROCESS else (number, 1)
    kill_at(
        point,
        occurrence,
        times=times,
        steps=5 if point in ("before-step", "after-step") else 12,
        server=server,
        undisturbed=undisturbed,
        photos=photos,
        tmp_path=tmp_path,
    )


def kill_at_random(
    kills: int,
    seed: int,
    *,
    steps: int,
    settings: tuple[str, ...] = (),
    real_loader: bool = False,
    server: ForkServer,
    undisturbed: Callable[..., Reference],
    photos: Path,
    tmp_path: Path,
) -> None:
    """Kill at times drawn evenly over the length of a run, again and again, until so many processes were killed."""
    reference, whole = undisturbed(steps, settings)
    random_number = random.Random(seed)
    for run in itertools.count():
        folder = tmp_path / str(run)
        argv = arguments(photos, folder / "run", steps=steps, settings=settings)
        disturbed: list[Ended] = []
        ended = None
        while ended is None or ended.killed:
            delay = random_number.uniform(0, whole.seconds) if kills else None
            case = Case(next_command(argv), str(folder), kill_after=delay, real_loader=real_loader)
            ended = server.run(case)
            if ended.killed:
                disturbed.append(ended)
                kills -= 1
        assert ended.code == 0, ended.printed
        assert "passed over" not in ended.printed
        assert_no_more_is_lost_than_since_the_last_save(disturbed, ended, steps)
        assert_same_outcome(folder / "run", reference)
        shutil.rmtree(folder)
        if not kills:
            return


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(
    server: ForkServer, undisturbed: Callable[..., Reference], photos: Path, tmp_path: Path, seed: int
) -> None:
    kill_at_random(5, seed, steps=6, server=server, undisturbed=undisturbed, photos=photos, tmp_path=tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(100, 120))
def test_a_hundred_random_kills(
    server: ForkServer, undisturbed: Callable[..., Reference], photos: Path, tmp_path: Path, seed: int
) -> None:
    """python -m pytest -m campaign tests/test_crash.py -k a_hundred"""
    kill_at_random(5, seed, steps=12, server=server, undisturbed=undisturbed, photos=photos, tmp_path=tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("loader", ["pillow", "dali"])
def test_random_kills_with_the_processes_and_threads_of_the_loaders(
    server: ForkServer, undisturbed: Callable[..., Reference], photos: Path, tmp_path: Path, loader: str
) -> None:
    """python -m pytest -m campaign tests/test_crash.py -k of_the_loaders"""
    settings = (f"data.loader={loader}",)
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")
    kill_at_random(
        8,
        7,
        steps=12,
        settings=settings,
        real_loader=True,
        server=server,
        undisturbed=undisturbed,
        photos=photos,
        tmp_path=tmp_path,
    )


def test_what_a_killed_save_leaves_is_gone_after_the_next(server: ForkServer, photos: Path, tmp_path: Path) -> None:
    argv = arguments(photos, tmp_path / "run", steps=4)
    server.run(Case(argv, str(tmp_path), point="mid-write:tensors", occurrence=2))
    (part, file) = leftovers(tmp_path / "run")
    assert file.startswith(f"{part}/.state.safetensors.")
    server.run(Case(next_command(argv), str(tmp_path), point="before-rename:model"))
    assert checkpoint_steps(tmp_path / "run") == [4]
    assert [path for path in leftovers(tmp_path / "run") if path.startswith("checkpoints")] == []
