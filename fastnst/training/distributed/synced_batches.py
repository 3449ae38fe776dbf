"""An image that fails on one rank fails on all ranks, from the same step on.

Thus each step's batch, over all ranks, holds the images that one process alone would have read: the replacement of an
image depends on all failures up to that step, on whatever rank. Before each step the ranks reduce one number, whether
any has found a failure. Only then do they exchange the failures, and read again what was read ahead with a failed
image.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastnst.data.loaders import Loader
from fastnst.data.manifest import Manifest
from fastnst.data.replacements import REJECTED_NAME, ImageReplacer, ReadFailure, failure_row, parse_failures
from fastnst.data.sampler import Sampler
from fastnst.errors import DataError
from fastnst.training.distributed.process_group import ProcessGroup


class SyncedFailures:
    """Image failures since the check; the same on all ranks after each step of `SyncedBatches`.

    Args:
        manifest: the same on all ranks.
        group: all its ranks make one of these, with equal arguments.
        max_percent: see `ImageReplacer`.
        earlier: failures that are known already.
        note: called with each new failure, on rank 0 only.
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

    def gather(self, error: DataError | None) -> list[dict[str, Any]]:
        """Return what each rank has found; empty if none has. All call this at the same step.

        Args:
            error: why this rank's loader cannot go on.
        """
        paths = {failure.entry.path for failure in self._found}
        index_of = {}
        if paths:
            index_of = {e.path: index for index, e in enumerate(self._manifest.images) if e.path in paths}
        found = [(failure.step, index_of[failure.entry.path], failure.reason) for failure in self._found]
        text = json.dumps({"failures": found, "error": str(error or "")}) if found or error else ""
        return [json.loads(each or '{"failures": [], "error": ""}') for each in self._group.all_gather_text(text)]

    def apply(self, gathered: list[dict[str, Any]], error: DataError | None) -> None:
        """Record the failures that `gather` returned.

        Raises:
            DataError: too much has failed, or `error`.
        """
        # By step, as one process would have found them; for an image found twice, the earlier step counts.
        everything = sorted((step, index, reason) for each in gathered for step, index, reason in each["failures"])
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
        # All ranks know the same failures now, so all end here; so they do if one rank's loader failed.
        if too_many is not None:
            self._group.exit_unless()
            raise too_many
        broken = [rank for rank, each in enumerate(gathered) if each["error"]]
        if broken:
            self._group.exit_unless(broken[0])
            assert error is not None
            raise error


def broadcast_failures(failures: list[ReadFailure], group: ProcessGroup) -> list[ReadFailure]:
    """Return rank 0's list of failures on all ranks."""
    if group.dist_env.world_size == 1:
        return failures
    return parse_failures(group.broadcast("".join(map(failure_row, failures)).encode()), Path(REJECTED_NAME))


class SyncedBatches:
    """Iterates over this rank's batches, with replacements that are the same on all ranks.

    Args:
        loader: made with `sampler`, `rank` and `failures.replacements`.
        start_step: the first step, from 0.
        read_ahead: steps that the loader may have begun to read.
    """

    def __init__(
        self, loader: Loader, sampler: Sampler, rank: int, failures: SyncedFailures, *, start_step: int, read_ahead: int
    ) -> None:
        self._loader, self._sampler, self._rank, self._failures = loader, sampler, rank, failures
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
            gathered = self._failures.gather(error)
            if not gathered:
                assert batch is not None
                self._step += 1
                return batch
            planned = self._planned()
            self._failures.apply(gathered, error)
            if self._planned() != planned:
                self._loader.seek(self._step)
                batch = None

    def _planned(self) -> list[list[int]]:
        """Return the images of this step and of those that may be read already."""
        steps = range(self._step, min(self._step + self._read_ahead + 1, self._sampler.steps))
        return [self._images(step).tolist() for step in steps]

    def _images(self, step: int) -> np.ndarray:
        return self._failures.replacements.replace(step, self._sampler.batch(step, self._rank).indices)
