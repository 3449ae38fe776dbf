"""Pictures by Pillow in worker processes: portable, and what DALI is measured against.

Each batch is shared among all workers, so that the next one is ready as soon as the machine can make it. Workers are
started afresh rather than forked, because a fork of a process with threads or CUDA may hang; they import neither
torch nor anything else that they do not need. They ignore Ctrl-C, which is the parent's to handle, and end when the
parent is gone.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from fastnst.data.window import Window, read_square, window_of
from fastnst.errors import DataError
from fastnst.images import UnusablePictureError, printable

if TYPE_CHECKING:
    import torch

    from fastnst.config import DataConfig
    from fastnst.data.manifest import Manifest
    from fastnst.data.order import RunOrder

Job = tuple[str, int, tuple[int, int], Window, bool]
"""Path, expected bytes, expected width and height, window, flip."""


class PillowLoader:
    """See `fastnst.data.open_loader`."""

    def __init__(
        self,
        manifest: "Manifest",
        order: "RunOrder",
        config: "DataConfig",
        *,
        device: "torch.device",
        start_step: int = 0,
        rank: int = 0,
    ) -> None:
        self._manifest = manifest
        self._order = order
        self._size = config.image_size
        assert config.workers is not None
        self._workers = min(config.workers, order.local_batch_size * config.prefetch)
        self._prefetch = config.prefetch
        self._device = device
        self._rank = rank
        self._next_to_submit = start_step
        self._waiting: deque[list[Future[np.ndarray]]] = deque()
        self._pool = ProcessPoolExecutor(
            self._workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
        )
        self._submit()

    def __iter__(self) -> "Iterator[torch.Tensor]":
        return self

    def __next__(self) -> "torch.Tensor":
        import torch

        if not self._waiting:
            raise StopIteration
        try:
            parts = [future.result() for future in self._waiting[0]]
        except BrokenProcessPool as error:
            raise DataError(
                "a process that loads pictures ended unexpectedly, perhaps for lack of memory; "
                f"set data.workers below {self._workers} or use --loader dali"
            ) from error
        self._waiting.popleft()
        self._submit()
        batch = torch.from_numpy(np.concatenate(parts))
        if self._device.type == "cuda":
            return batch.pin_memory().to(self._device, non_blocking=True)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        while len(self._waiting) < self._prefetch and self._next_to_submit < self._order.steps:
            jobs = self._jobs(self._next_to_submit)
            share = -(-len(jobs) // self._workers)
            shares = [jobs[first : first + share] for first in range(0, len(jobs), share)]
            # The first call starts the processes, which must not see a Ctrl-C before they ignore it.
            with _interrupts_held_back():
                self._waiting.append([self._pool.submit(_read_squares, part, self._size) for part in shares])
            self._next_to_submit += 1

    def _jobs(self, step: int) -> list[Job]:
        samples = self._order.batch(step, self._rank)
        jobs: list[Job] = []
        for index, crop, flip in zip(samples.indices, samples.crop, samples.flip, strict=True):
            entry = self._manifest.images[index]
            window = window_of(entry.width, entry.height, self._order.fit, crop)
            path = os.path.join(self._manifest.folder, entry.path)  # noqa: PTH118
            jobs.append((path, entry.size, (entry.width, entry.height), window, bool(flip)))
        return jobs


def _read_squares(jobs: list[Job], size: int) -> np.ndarray:
    """In a worker: uint8 `[len(jobs), size, size, 3]`."""
    batch = np.empty((len(jobs), size, size, 3), dtype=np.uint8)
    for square, (path, expected_bytes, expected_size, window, flip) in zip(batch, jobs, strict=True):
        try:
            square[:] = read_square(path, expected_bytes, expected_size, window, size, flip)
        except UnusablePictureError as error:
            raise DataError(f"cannot read {printable(path)}: {error}") from error
    return batch


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed cannot tell its workers, and they would wait for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Block SIGINT in this thread; processes started meanwhile inherit that. A Ctrl-C is delivered at the end."""
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
