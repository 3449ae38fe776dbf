"""Failures synchronised over ranks, with threads as ranks: together they read what one process reads."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnst.data.manifest import ImageEntry, Manifest
from fastnst.data.replacements import ImageReplacer, ReadFailure
from fastnst.data.sampler import Sampler
from fastnst.errors import DataError
from fastnst.training.distributed.environment import DistEnv
from fastnst.training.distributed.synced_batches import SyncedBatches, SyncedFailures

TIMEOUT_S = 60.0


class Threads:
    """Shared by the process groups of all threads."""

    def __init__(self, world_size: int) -> None:
        self.texts = [""] * world_size
        self.barrier = threading.Barrier(world_size, timeout=TIMEOUT_S)


class EndedElsewhere(Exception):
    """Another thread raises."""


class ThreadGroup:
    """The part of `ProcessGroup` that is used here."""

    def __init__(self, rank: int, threads: Threads) -> None:
        self.dist_env = DistEnv(rank, len(threads.texts), rank, len(threads.texts))
        self.is_rank_zero = rank == 0
        self._threads = threads

    def all_gather_text(self, text: str) -> list[str]:
        self._threads.texts[self.dist_env.rank] = text
        self._threads.barrier.wait()
        texts = list(self._threads.texts)
        self._threads.barrier.wait()
        return texts if any(texts) else []

    def exit_unless(self, rank: int = 0) -> None:
        if rank != self.dist_env.rank:
            raise EndedElsewhere


class FakeLoader:
    """Delivers the indices of images instead of these; reads ahead, and finds a failure ahead or when due.

    An image in `bad` cannot be read in that step, and can again in later ones: who finds it is one process alone.
    """

    def __init__(
        self, order: Sampler, rank: int, replacements: ImageReplacer, bad: dict[int, int], *, ahead: int, early: bool
    ) -> None:
        self._order, self._rank, self._replacements, self._bad = order, rank, replacements, bad
        self._ahead, self._early = ahead, early
        self._read: list[np.ndarray] = []
        self._step = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        while True:
            self._read_ahead()
            if not self._read:
                raise StopIteration
            failed = self._failed(self._step, self._read[0])
            if not failed:
                break
            self._replacements.fail(self._step, failed)
            self.seek(self._step)
        self._step += 1
        return torch.from_numpy(self._read.pop(0))

    def seek(self, step: int) -> None:
        self._read.clear()
        self._step = step

    def _read_ahead(self) -> None:
        while len(self._read) < self._ahead and self._step + len(self._read) < self._order.steps:
            step = self._step + len(self._read)
            indices = self._replacements.replace(step, self._order.batch(step, self._rank).indices)
            failed = self._failed(step, indices) if self._early else []
            if failed:
                self._replacements.fail(step, failed)
                continue
            self._read.append(indices)

    def _failed(self, step: int, indices: np.ndarray) -> list[tuple[int, str]]:
        return [(index, "damaged") for index in indices.tolist() if self._bad.get(index) == step]


def manifest_of(images: int) -> Manifest:
    entries = [ImageEntry(f"{index:03d}.png", 1, 1, 1, "PNG", True, 0) for index in range(images)]
    return Manifest(Path("images"), entries, [], "fingerprint")


def read_all(
    world_size: int, images: int, bad: dict[int, int], *, batch_size: int, ahead: int, early: bool, percent: float
) -> tuple[list[list[int]], list[tuple[int, str]], list[BaseException]]:
    """Return each step's images in the order of the ranks, failures that rank 0 notes, and errors of the ranks."""
    threads, steps = Threads(world_size), 10
    order = Sampler(5, images, batch_size, steps, world_size=world_size)
    manifest, noted = manifest_of(images), []

    def note(failure: ReadFailure) -> None:
        noted.append((failure.step, failure.entry.path))

    def read(rank: int) -> tuple[list[list[int]], BaseException | None]:
        failures = SyncedFailures(
            manifest,
            ThreadGroup(rank, threads),
            max_percent=percent,
            earlier=(),
            note=note if not rank else pytest.fail,
        )
        loader = FakeLoader(order, rank, failures.replacements, bad, ahead=ahead, early=early)
        batches = SyncedBatches(loader, order, rank, failures, start_step=0, read_ahead=ahead)
        read: list[list[int]] = []
        try:
            for _ in range(steps):
                read.append(next(batches).tolist())
        except (DataError, EndedElsewhere) as error:
            return read, error
        return read, None

    with ThreadPoolExecutor(world_size) as pool:
        ended = list(pool.map(read, range(world_size)))
    by_step = [list(chain(*parts)) for parts in zip(*(each for each, _ in ended), strict=True)]
    return by_step, noted, [error for _, error in ended if error is not None]


@settings(max_examples=40)
@given(
    images=st.integers(8, 30),
    bad=st.dictionaries(st.integers(0, 19), st.integers(0, 9), max_size=8),
    share=st.integers(1, 3),
    world_size=st.integers(2, 3),
    ahead=st.integers(1, 3),
    early=st.booleans(),
)
def test_synced_batches_read_what_one_process_reads(
    images: int, bad: dict[int, int], share: int, world_size: int, ahead: int, early: bool
) -> None:
    how = {"batch_size": 6 * share, "ahead": ahead, "early": early, "percent": 99.0}
    alone = read_all(1, images, bad, **how)
    together = read_all(world_size, images, bad, **how)
    assert together[0] == alone[0]
    if not early:
        assert sorted(together[1]) == sorted(alone[1])
    assert len(together[2]) == len(alone[2]) * world_size


def test_synced_batches_end_on_all_ranks_in_the_same_step() -> None:
    _, noted, errors = read_all(3, 9, dict.fromkeys(range(8), 1), batch_size=6, ahead=2, early=False, percent=1.0)
    assert sorted(type(error).__name__ for error in errors) == ["DataError", "EndedElsewhere", "EndedElsewhere"]
    (reported,) = [error for error in errors if isinstance(error, DataError)]
    assert "of 9 images" in str(reported)
    assert len(noted) > 3
