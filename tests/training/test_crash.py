"""Processes that are killed, at named points of a run and at random, and what the resumed run comes to.

Each case kills a real process with SIGKILL, resumes until the end, and compares with a run that nobody disturbed: every
byte of the checkpoint and of the style model, every row of metrics, every point, histogram and image in TensorBoard.

All points five times over, and a hundred random kills:

    python -m pytest -m campaign tests/training/test_crash.py
"""

import itertools
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fastnst.training.run_dir.checkpoint import checkpoint_steps
from helpers.crash_points import Case
from helpers.fork_server import Ended, ForkServer, arguments, next_command
from helpers.run_comparison import assert_same_outcome, leftovers

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
    "after-run",
)
AT_THE_END = ("before-close", "after-close")
POINTS = (*IN_A_SAVE, *IN_A_STEP, *IN_EACH_PROCESS, *AT_THE_END)


@dataclass
class Killer:
    """Runs that are killed and resumed until they end, and those that they must equal."""

    server: ForkServer
    photos: Path
    folder: Path
    undisturbed: dict[tuple[int, str], tuple[Path, Ended]] = field(default_factory=dict)

    def reference(self, steps: int, loader: str = "pillow") -> tuple[Path, Ended]:
        """The run that nobody disturbs."""
        if (steps, loader) not in self.undisturbed:
            folder = self.folder / f"undisturbed-{steps}-{loader}"
            ended = self.server.run(Case(self.command(folder, steps, loader), str(folder)))
            assert ended.code == 0, ended.printed
            assert ended.steps == list(range(1, steps + 1))
            self.undisturbed[steps, loader] = folder / "run", ended
        return self.undisturbed[steps, loader]

    def command(self, folder: Path, steps: int, loader: str) -> tuple[str, ...]:
        settings = () if loader == "pillow" else (f"data.loader={loader}",)
        return arguments(self.photos, folder / "run", steps=steps, settings=settings)

    def at(self, point: str, occurrence: int, folder: Path, *, steps: int, processes: int = 1) -> None:
        """Kill so many processes, one after the other, at a point, and the last of them none."""
        argv = self.command(folder, steps, "pillow")
        killed = []
        for _ in range(processes):
            ended = self.server.run(Case(next_command(argv), str(folder), point=point, occurrence=occurrence))
            assert (ended.killed, ended.code) == (True, 137), f"{point} was not passed: {ended.printed}"
            killed.append(ended)
        last = self.server.run(Case(next_command(argv), str(folder)))
        self.check(folder, killed, last, steps)

    def at_random(self, kills: int, seed: int, folder: Path, *, steps: int, real_loader: str = "") -> None:
        """Kill at times drawn evenly over the length of a run, until so many processes were killed."""
        loader = real_loader or "pillow"
        _, whole = self.reference(steps, loader)
        draw = random.Random(seed)
        for number in itertools.count():
            here = folder / str(number)
            argv = self.command(here, steps, loader)
            killed: list[Ended] = []
            while True:
                delay = draw.uniform(0, whole.seconds) if len(killed) < kills else None
                case = Case(next_command(argv), str(here), kill_after=delay, real_loader=bool(real_loader))
                ended = self.server.run(case)
                if not ended.killed:
                    break
                killed.append(ended)
            self.check(here, killed, ended, steps, loader)
            shutil.rmtree(here)
            kills -= len(killed)
            if not kills:
                return

    def check(self, folder: Path, killed: list[Ended], last: Ended, steps: int, loader: str = "pillow") -> None:
        assert last.code == 0, last.printed
        assert "passed over" not in last.printed
        begun: int | None = None
        for ended in (*killed, last):
            resumed_at = ended.steps[0] - 1 if ended.steps else steps if ended is last else None
            if begun is not None and resumed_at is not None:
                assert 0 <= begun - resumed_at <= EVERY, "more is lost than since the last save"
            if ended.steps:
                begun = ended.steps[-1]
                assert ended.steps == list(range(ended.steps[0], begun + 1))
        assert_same_outcome(folder / "run", self.reference(steps, loader)[0])


@pytest.fixture(scope="module")
def killer(fork_server: ForkServer, few_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Killer:
    return Killer(fork_server, few_photos, tmp_path_factory.mktemp("killer"))


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_any_point_ends_as_if_it_had_not_been(killer: Killer, tmp_path: Path, point: str) -> None:
    # Where there is a choice, behind the first checkpoint: what is restored from it decides the rest.
    occurrences = {"mid-write:event": 100, "before-rename:old": 1, "before-unlink:old": 1}
    occurrences |= dict.fromkeys(("before-samples", "before-flush", "after-flush"), 2)
    occurrences |= dict.fromkeys((*IN_EACH_PROCESS, *AT_THE_END), 1)
    killer.at(point, occurrences.get(point, 3 if point in IN_A_STEP else 2), tmp_path, steps=4)


@pytest.mark.campaign
@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("point", POINTS)
def test_each_point_at_five_moments(killer: Killer, tmp_path: Path, point: str, number: int) -> None:
    """python -m pytest -m campaign tests/training/test_crash.py -k five_moments"""
    if point in IN_EACH_PROCESS:
        killer.at(point, 1, tmp_path, steps=4, processes=number)
    elif point in AT_THE_END:
        killer.at(point, 1, tmp_path, steps=number)
    else:
        # Of five steps, the first and the last are among these; of six saves, all but the last.
        steps = 5 if point in ("before-step", "after-step") else 12
        killer.at(point, 60 * number if point == "mid-write:event" else number, tmp_path, steps=steps)


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(killer: Killer, tmp_path: Path, seed: int) -> None:
    killer.at_random(5, seed, tmp_path, steps=4)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(100, 120))
def test_a_hundred_random_kills(killer: Killer, tmp_path: Path, seed: int) -> None:
    """python -m pytest -m campaign tests/training/test_crash.py -k a_hundred"""
    killer.at_random(5, seed, tmp_path, steps=12)


@pytest.mark.campaign
@pytest.mark.parametrize("loader", ["pillow", "dali"])
def test_random_kills_with_what_the_loaders_start(killer: Killer, tmp_path: Path, loader: str) -> None:
    """python -m pytest -m campaign tests/training/test_crash.py -k loaders_start"""
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")
    killer.at_random(8, 7, tmp_path, steps=12, real_loader=loader)


def test_what_a_killed_save_leaves_is_gone_after_the_next(killer: Killer, tmp_path: Path) -> None:
    argv = killer.command(tmp_path, 4, "pillow")
    killer.server.run(Case(argv, str(tmp_path), point="mid-write:tensors", occurrence=2))
    (part, file) = leftovers(tmp_path / "run")
    assert file.startswith(f"{part}/.state.safetensors.")
    killer.server.run(Case(next_command(argv), str(tmp_path), point="before-rename:model"))
    assert checkpoint_steps(tmp_path / "run") == [4]
    assert [path for path in leftovers(tmp_path / "run") if path.startswith("checkpoints")] == []
