"""Images that fail on one of several processes fail on all, from the same step on.

So each step's batch, all shares together, holds what one process alone would have read: which image stands in for
another depends on all that failed by that step, wherever it was found. Before a step each process says whether it has
found something, in one number; only if one has, more is exchanged, and what was read ahead with an image that has
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
from fastnst.data.replacements import ImageReplacer, ReadFailure, failure_row, parse_failures
from fastnst.data.sampler import Sampler
from fastnst.errors import DataError
from fastnst.training.distributed.process_group import ProcessGroup
from fastnst.training.run_dir.layout import REJECTED_NAME


class SyncedFailures:
    """What has failed since the check, the same on all processes once a step's `SyncedBatches` is through with it.

    Args:
        manifest: the same everywhere.
        group: all processes make one, with equal arguments.
        max_percent: see `ImageReplacer`.
        earlier: failures that the run knows already.
        note: told of each new failure, in rank 0 alone.
    """

    def __init__(
        self,
        manifest: Manifest,
        group: ProcessGroup,
        *,
        max_percent: float,
        earlier: Iterable[ReadFailure],
        note: Callable[[ReadFailure], None],
    ) -> None:
        self._manifest, self._group, self._note = manifest, group, note
        self._found: list[ReadFailure] = []
        alone = group.dist_env.world_size == 1
        self.replacements = ImageReplacer(
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
        return [json.loads(each or '{"failures": [], "error": ""}') for each in self._group.all_gather_text(text)]

    def take(self, said: list[dict[str, Any]], error: DataError | None) -> None:
        """Heed what `ask` has given.

        Raises:
            DataError: too much has failed, or `error`.
        """
        # By step, as one process would have found them; of an image found twice, the earlier step counts.
        everything = sorted((step, index, reason) for each in said for step, index, reason in each["failures"])
        seen: set[int] = set()
        too_many: DataError | None = None
        for step, index, reason in everything:
            if index in seen:
                continue
            seen.add(index)
            if self._group.is_rank_zero:
                self._note(ReadFailure(self._manifest.images[index], reason, step))
            try:
                self.replacements.fail(step - 1, [(index, reason)])
            except DataError as failure:
                too_many = failure
        self._found.clear()
        # All know of the same failures now, so all raise, or the one whose loader has a reason of its own.
        if too_many is not None:
            self._group.exit_unless()
            raise too_many
        broken = [rank for rank, each in enumerate(said) if each["error"]]
        if broken:
            self._group.exit_unless(broken[0])
            assert error is not None
            raise error


def broadcast_failures(failures: list[ReadFailure], group: ProcessGroup) -> list[ReadFailure]:
    """Rank 0's list of failures, in all processes."""
    if group.dist_env.world_size == 1:
        return failures
    return parse_failures(group.broadcast("".join(map(failure_row, failures)).encode()), Path(REJECTED_NAME))


class SyncedBatches:
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
        self, loader: Loader, order: Sampler, rank: int, failures: SyncedFailures, *, start_step: int, read_ahead: int
    ) -> None:
        self._loader, self._order, self._rank, self._failures = loader, order, rank, failures
        self._batches = iter(loader)
        self._step, self._read_ahead = start_step, read_ahead

    def __iter__(self) -> "SyncedBatches":
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
        """The images of this step and of those that may be read already."""
        steps = range(self._step, min(self._step + self._read_ahead + 1, self._order.steps))
        return [self._images(step).tolist() for step in steps]

    def _images(self, step: int) -> np.ndarray:
        return self._failures.replacements.replace(step, self._order.batch(step, self._rank).indices)
