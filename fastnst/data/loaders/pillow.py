"""Images by Pillow in worker processes: portable, and what DALI is measured against.

Each batch is shared among all workers, so that the next one is ready as soon as the machine can make it. Workers are
started afresh rather than forked, because a fork of a process with threads or CUDA may hang; they import neither
torch nor anything else that they do not need. Signals that stop a run are the parent's to handle, and a terminal or a
supervisor sends them to all its processes: the workers do not heed them, and end when the parent says so or is gone.
"""

import contextlib
import logging
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

from fastnst.data.crop import CropBox, crop_box, read_crop
from fastnst.data.manifest import Entry
from fastnst.errors import DataError
from fastnst.images import UnusableImageError

if TYPE_CHECKING:
    import torch

    from fastnst.config import DataConfig
    from fastnst.data.manifest import Manifest
    from fastnst.data.replacements import ImageReplacer
    from fastnst.data.sampler import Sampler

Job = tuple[int, str, Entry, CropBox, bool]
"""Index in the manifest, path, what the check found, window, flip."""
Part = tuple[np.ndarray, list[tuple[int, str]]]
"""Squares, uint8 `[B, S, S, 3]`, and index and reason of each image that could not be read, whose square is void."""

MOST_DEATHS = 3
"""Times that a run bears a loading process to end for no reason that an image gave."""

_log = logging.getLogger(__name__)


class PillowLoader:
    """See `fastnst.data.open_loader`."""

    def __init__(
        self,
        manifest: "Manifest",
        order: "Sampler",
        config: "DataConfig",
        *,
        device: "torch.device",
        replacements: "ImageReplacer",
        start_step: int = 0,
        rank: int = 0,
    ) -> None:
        self._manifest = manifest
        self._replacements = replacements
        self._order = order
        self._size = config.image_size
        assert config.workers is not None
        self._workers = min(config.workers, order.local_batch_size * config.prefetch)
        self._prefetch = config.prefetch
        self._device = device
        self._rank = rank
        self._next_to_submit = start_step
        self._waiting: deque[list[Future[Part]]] = deque()
        self._deaths = 0
        self._pool = self._new_pool()
        self._submit()

    def __iter__(self) -> "Iterator[torch.Tensor]":
        return self

    def __next__(self) -> "torch.Tensor":
        import torch

        while self._waiting:
            step = self._next_to_submit - len(self._waiting)
            try:
                parts = [future.result() for future in self._waiting[0]]
            except BrokenProcessPool as error:
                self._recover(step, error)
                continue
            failed = [failure for _, failures in parts for failure in failures]
            if not failed:
                break
            self._replacements.fail(step, failed)
            self.seek(step)
        else:
            raise StopIteration
        self._waiting.popleft()
        self._submit()
        batch = torch.from_numpy(np.concatenate([squares for squares, _ in parts]))
        if self._device.type == "cuda":
            return batch.pin_memory().to(self._device, non_blocking=True)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def seek(self, step: int) -> None:
        """Go on with `step`; what was read ahead may hold an image that has failed by now, and is read again."""
        for futures in self._waiting:
            for future in futures:
                future.cancel()
        self._waiting.clear()
        self._next_to_submit = step
        self._submit()

    def close(self) -> None:
        """End the worker processes."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        # This starts Python's resource tracker, which keeps SIGHUP blocked; the other two it ignores by itself.
        with _signals_held_back():
            return ProcessPoolExecutor(
                self._workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
            )

    def _submit(self) -> None:
        while len(self._waiting) < self._prefetch and self._next_to_submit < self._order.steps:
            jobs = self._jobs(self._next_to_submit)
            share = -(-len(jobs) // self._workers)
            shares = [jobs[first : first + share] for first in range(0, len(jobs), share)]
            self._waiting.append([self._start(part) for part in shares])
            self._next_to_submit += 1

    def _start(self, jobs: list[Job]) -> Future[Part]:
        # The first call starts the processes, which must not see a stop signal before they know what to do with it.
        with _signals_held_back():
            try:
                return self._pool.submit(_read_crops, jobs, self._size)
            except BrokenProcessPool as error:
                # A worker died while there was nothing to do. Whoever waits for this part finds out, in its turn.
                broken: Future[Part] = Future()
                broken.set_exception(error)
                return broken

    def _jobs(self, step: int) -> list[Job]:
        samples = self._order.batch(step, self._rank)
        indices = self._replacements.indices(step, samples.indices)
        jobs: list[Job] = []
        for index, crop, flip in zip(indices, samples.crop, samples.flip, strict=True):
            entry = self._manifest.images[index]
            window = crop_box(entry.width, entry.height, self._order.fit, crop, self._size)
            path = os.path.join(self._manifest.folder, entry.path)  # noqa: PTH118
            jobs.append((int(index), path, entry, window, bool(flip)))
        return jobs

    def _recover(self, step: int, error: BrokenProcessPool) -> None:
        """Go on with `step` after a process ended, without the image that ended it, if there is one.

        Nobody says which it was, so those in flight are tried one by one; one that ends two processes is to blame,
        provided that a process with nothing to decode lives.
        """
        in_flight = range(step, self._next_to_submit)
        self._waiting.clear()
        self._renew_pool()
        if not self._survives([]):
            raise DataError(
                "the processes that load images end as soon as they start; use --loader dali, or look for what ends "
                "them in the messages above"
            ) from error
        blamed = False
        tried: set[int] = set()
        for each in in_flight:
            for job in self._jobs(each):
                if job[0] not in tried and not self._survives([job]) and not self._survives([job]):
                    blamed = True
                    self._replacements.fail(each, [(job[0], "the process that decodes it dies; remove the file")])
                tried.add(job[0])
        if not blamed:
            self._deaths += 1
            if self._deaths > MOST_DEATHS:
                raise DataError(
                    f"processes that load images ended unexpectedly {self._deaths} times, perhaps for lack of "
                    f"memory; set data.workers below {self._workers} or use --loader dali"
                ) from error
            _log.warning("a process that loads images ended unexpectedly; a new one goes on")
        self.seek(step)

    def _survives(self, jobs: list[Job]) -> bool:
        try:
            self._start(jobs).result()
        except BrokenProcessPool:
            self._renew_pool()
            return False
        return True

    def _renew_pool(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._pool = self._new_pool()


def _read_crops(jobs: list[Job], size: int) -> Part:
    """In a worker."""
    batch = np.empty((len(jobs), size, size, 3), dtype=np.uint8)
    failed: list[tuple[int, str]] = []
    for square, (index, path, entry, window, flip) in zip(batch, jobs, strict=True):
        try:
            square[:] = read_crop(path, entry, window, size, flip)
        except UnusableImageError as error:
            failed.append((index, str(error)))
    return batch, failed


def _start_worker() -> None:
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    heeded = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM}
    # Where the system does not say who has sent a signal (macOS), SIGTERM ends a worker, whoever sent it.
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()
        heeded.remove(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    # The pool sends SIGTERM to the workers that are left when one of them has died. It stays blocked in all threads,
    # and so waits here.
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    # A parent that is killed cannot tell its workers, and they would wait for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block the stop signals in this thread, and so in processes that it starts; here they are delivered at the end."""
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
