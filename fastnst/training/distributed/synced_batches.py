"""Pictures that fail on one of several processes fail on all, from the same step on.

So each step's batch, all shares together, holds what one process alone would have read: which picture stands in for
another depends on all that failed by that step, wherever it was found. Before a step each process says whether it has
found something, in one number; only if one has, more is exchanged, and what was read ahead with a picture that has
failed by now is read again.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastnst.data.loaders import Loader
from fastnst.data.manifest import Manifest
from fastnst.data.replacements import LateFailure, Replacements, late_row, parse_late_failures
from fastnst.data.sampler import RunOrder
from fastnst.errors import DataError
from fastnst.training.distributed.process_group import Team
from fastnst.training.run_dir.layout import REJECTED_NAME


class SharedFailures:
    """What has failed since the check, the same on all processes once a step's `SharedBatches` is through with it.

    Args:
        manifest: the same everywhere.
        team: all processes make one, with equal arguments.
        max_percent: see `Replacements`.
        earlier: failures that the run knows already.
        note: told of each new failure, in rank 0 alone.
    """

    def __init__(
        self,
        manifest: Manifest,
        team: Team,
        *,
        max_percent: float,
        earlier: Iterable[LateFailure],
        note: Callable[[LateFailure], None],
    ) -> None:
        self._manifest, self._team, self._note = manifest, team, note
        self._found: list[LateFailure] = []
        alone = team.launch.world_size == 1
        self.replacements = Replacements(
            manifest, max_percent=max_percent, earlier=earlier, on_failure=note if alone else self._found.append
        )

    def ask(self, error: DataError | None) -> list[dict[str, Any]]:
        """What the processes, by rank, have found; empty if none has. All call this at the same step.

        Args:
            error: why this process's loader cannot go on.
        """
        paths = {failure.entry.path for failure in self._found}
        index_of = {}
        if paths:
            index_of = {e.path: index for index, e in enumerate(self._manifest.images) if e.path in paths}
        found = [(failure.step, index_of[failure.entry.path], failure.reason) for failure in self._found]
        text = json.dumps({"failures": found, "error": str(error or "")}) if found or error else ""
        return [json.loads(each or '{"failures": [], "error": ""}') for each in self._team.collect(text)]

    def take(self, said: list[dict[str, Any]], error: DataError | None) -> None:
        """Heed what `ask` has given.

        Raises:
            DataError: too much has failed, or `error`.
        """
        # By step, as one process would have found them; of a picture found twice, the earlier step counts.
        everything = sorted((step, index, reason) for each in said for step, index, reason in each["failures"])
        seen: set[int] = set()
        too_many: DataError | None = None
        for step, index, reason in everything:
            if index in seen:
                continue
            seen.add(index)
            if self._team.leads:
                self._note(LateFailure(self._manifest.images[index], reason, step))
            try:
                self.replacements.fail(step - 1, [(index, reason)])
            except DataError as failure:
                too_many = failure
        self._found.clear()
        # All know of the same failures now, so all raise, or the one whose loader has a reason of its own.
        if too_many is not None:
            self._team.leave_to()
            raise too_many
        broken = [rank for rank, each in enumerate(said) if each["error"]]
        if broken:
            self._team.leave_to(broken[0])
            assert error is not None
            raise error


def of_leader(failures: list[LateFailure], team: Team) -> list[LateFailure]:
    """Rank 0's list of failures, in all processes."""
    if team.launch.world_size == 1:
        return failures
    return parse_late_failures(team.share("".join(map(late_row, failures)).encode()), Path(REJECTED_NAME))


class SharedBatches:
    """The batches of this process, as `loader` yields them, with replacements that are the same on all processes.

    Args:
        loader: made with `failures.replacements`.
        order: its order.
        rank: its rank.
        failures: shared by all processes.
        start_step: the first step, from 0.
        read_ahead: steps that the loader may have begun to read.
    """

    def __init__(
        self, loader: Loader, order: RunOrder, rank: int, failures: SharedFailures, *, start_step: int, read_ahead: int
    ) -> None:
        self._loader, self._order, self._rank, self._failures = loader, order, rank, failures
        self._batches = iter(loader)
        self._step, self._read_ahead = start_step, read_ahead

    def __iter__(self) -> "SharedBatches":
        return self

    def __next__(self) -> Tensor:
        batch: Tensor | None = None
        while True:
            error: DataError | None = None
            if batch is None:
                try:
                    batch = next(self._batches)
                except DataError as failure:
                    error = failure
            said = self._failures.ask(error)
            if not said:
                assert batch is not None
                self._step += 1
                return batch
            planned = self._planned()
            self._failures.take(said, error)
            if self._planned() != planned:
                self._loader.seek(self._step)
                batch = None

    def _planned(self) -> list[list[int]]:
        """The pictures of this step and of those that may be read already."""
        steps = range(self._step, min(self._step + self._read_ahead + 1, self._order.steps))
        return [self._pictures(step).tolist() for step in steps]

    def _pictures(self, step: int) -> np.ndarray:
        return self._failures.replacements.indices(step, self._order.batch(step, self._rank).indices)
