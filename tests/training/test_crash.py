"""Runs whose processes are killed at named points and at random, and resumed.

Each case kills real processes with SIGKILL, resumes until the end, and compares with an undisturbed run: every byte of
the checkpoint and of the style model, every row of metrics, every point, histogram and image in TensorBoard.

Each point alone, at five moments, and a hundred random kills:

    python -m pytest -m campaign tests/training/test_crash.py
"""

import itertools
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers.crash_points import Case
from helpers.fork_server import Ended, ForkServer, arguments, next_command
from helpers.run_comparison import assert_same_outcome

EVERY = 2
"""Steps between two checkpoints, as `arguments` has it."""

BEFORE_THE_NAME = (
    *("before-fsync:metrics", "before-mkdir:checkpoint", "before-open:tensors", "after-open:tensors"),
    *("mid-write:tensors", "before-fsync:tensors", "after-fsync:tensors", "before-rename:tensors"),
    *("mid-write:state", "before-open:manifest", "mid-write:manifest", "after-rename:manifest"),
    "before-rename:checkpoint",
)
"""In a save, before its checkpoint has its name: the process after it begins at the same step."""
AFTER_THE_NAME = (
    *("after-rename:checkpoint", "after-fsync:folder", "before-rename:old", "before-unlink:old"),
    *("before-open:model", "mid-write:model", "before-rename:model", "after-rename:model"),
)
IN_A_STEP = (
    *("before-step", "after-backward", "after-optimiser", "after-step", "before-metrics", "mid-write:row"),
    *("mid-write:event", "before-samples", "before-flush", "after-flush"),
)
IN_EACH_PROCESS = (
    *("before-check", "before-open:config", "mid-write:config", "before-rename:config", "after-rename:config"),
)
AT_THE_END = ("before-close", "after-close", "after-run")
POINTS = (*BEFORE_THE_NAME, *AFTER_THE_NAME, *IN_A_STEP, *IN_EACH_PROCESS, *AT_THE_END)
CHAINS = (
    BEFORE_THE_NAME[:7],
    BEFORE_THE_NAME[7:],
    AFTER_THE_NAME,
    IN_A_STEP,
    (*IN_EACH_PROCESS, "before-close"),
    ("after-close",),
    ("after-run",),
)
"""Each process of a chain is killed at the next point; together they pass all points."""


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

    def at(self, points: Sequence[tuple[str, int]], folder: Path, *, steps: int) -> None:
        """Kill one process after the other, each at a point and occurrence of it, and let the last one end."""
        argv = self.command(folder, steps, "pillow")
        killed = []
        for point, occurrence in points:
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


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: f"{chain[0]}-and-{len(chain) - 1}-more")
def test_train_resume_after_kills_at_every_point(killer: Killer, tmp_path: Path, chain: tuple[str, ...]) -> None:
    # In the first process behind the first checkpoint: what is restored from it decides the rest.
    once = (*IN_EACH_PROCESS, *AT_THE_END, "before-rename:old", "before-unlink:old")
    first = 1 if chain[0] in once else 3 if chain is IN_A_STEP else 2
    steps = 4 + 2 * len(chain) if chain is AFTER_THE_NAME else 4
    occurrences = {"mid-write:event": 20}
    points = [(point, occurrences.get(point, 1)) for point in chain[1:]]
    killer.at([(chain[0], first), *points], tmp_path, steps=steps)


@pytest.mark.campaign
@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("point", POINTS)
def test_train_resume_after_kills_at_each_point_at_five_moments(
    killer: Killer, tmp_path: Path, point: str, number: int
) -> None:
    """python -m pytest -m campaign tests/training/test_crash.py -k five_moments"""
    if point in (*IN_EACH_PROCESS, "after-run"):
        killer.at([(point, 1)] * number, tmp_path, steps=4)
    elif point in AT_THE_END:
        killer.at([(point, 1)], tmp_path, steps=number)
    else:
        # Of five steps, the first and the last are among these; of six saves, all but the last.
        steps = 5 if point in ("before-step", "after-step") else 12
        killer.at([(point, 60 * number if point == "mid-write:event" else number)], tmp_path, steps=steps)


@pytest.mark.parametrize("seed", range(2))
def test_train_resume_after_random_kills(killer: Killer, tmp_path: Path, seed: int) -> None:
    killer.at_random(5, seed, tmp_path, steps=4)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(100, 120))
def test_train_resume_after_a_hundred_random_kills(killer: Killer, tmp_path: Path, seed: int) -> None:
    """python -m pytest -m campaign tests/training/test_crash.py -k a_hundred"""
    killer.at_random(5, seed, tmp_path, steps=12)


@pytest.mark.campaign
@pytest.mark.parametrize("loader", ["pillow", "dali"])
def test_train_resume_after_random_kills_of_loaders(killer: Killer, tmp_path: Path, loader: str) -> None:
    """python -m pytest -m campaign tests/training/test_crash.py -k of_loaders"""
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")
    killer.at_random(8, 7, tmp_path, steps=12, real_loader=loader)
