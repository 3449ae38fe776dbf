"""Load images with Pillow in worker processes: portable, and the baseline for DALI.

Each batch is divided among all workers, so that the next one is ready as early as possible. Workers are spawned, not
forked, because forking a process with threads or CUDA may hang; they import neither torch nor anything else that they
do not need. Terminals and supervisors send stop signals to all processes of a run, but only the parent handles them:
workers ignore them, and end when the parent tells them to or is gone.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

import numpy as np

from fastnst.data.crop import CropBox, read_crop
from fastnst.data.loaders.base import Loader, LoaderArgs, Sample
from fastnst.data.manifest import ImageEntry
from fastnst.errors import STOP_SIGNALS, DataError
from fastnst.images import UnusableImageError

if TYPE_CHECKING:
    import torch

Job = tuple[int, str, ImageEntry, CropBox, bool]
"""Index in the manifest, path, manifest entry, crop box, flip."""
Part = tuple[np.ndarray, list[tuple[int, str]]]
"""Crops, uint8 `[B, S, S, 3]`, and (index, reason) of each image that could not be read; those crops are undefined."""

MAX_WORKER_CRASHES = 3
"""Crashes of worker processes that a run tolerates, besides those that an image causes."""

log = logging.getLogger(__name__)


class PillowLoader(Loader):
    """See `open_loader`."""

    def __init__(self, args: LoaderArgs) -> None:
        super().__init__(args)
        self._workers = min(self._workers, self._sampler.local_batch_size * self._config.prefetch)
        self._crashes = 0
        self._pool = self._new_pool()
        self._read_ahead()

    def __next__(self) -> "torch.Tensor":
        import torch

        while True:
            try:
                crops = self._next_parts()
                break
            except BrokenProcessPool as error:
                self._recover(error)
        batch = torch.from_numpy(np.concatenate(crops))
        if self._device.type == "cuda":
            return batch.pin_memory().to(self._device, non_blocking=True)
        return batch

    def _new_pool(self) -> ProcessPoolExecutor:
        # This also starts Python's resource tracker, which ignores SIGINT and SIGTERM by itself and keeps the others
        # blocked.
        with _stop_signals_blocked():
            return ProcessPoolExecutor(
                self._workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
            )

    def _submit(self, samples: list[Sample]) -> list[Future[Part]]:
        jobs = self._jobs(samples)
        return [self._start(jobs[share]) for share in self._shares(len(jobs))]

    def _start(self, jobs: list[Job]) -> Future[Part]:
        # The first call spawns the workers, which must not receive a stop signal before `_start_worker` has run.
        with _stop_signals_blocked():
            try:
                return self._pool.submit(_read_crops, jobs, self._config.image_size)
            except BrokenProcessPool as error:
                # A worker died while idle. Whoever waits for this part gets the error.
                broken: Future[Part] = Future()
                broken.set_exception(error)
                return broken

    def _jobs(self, samples: list[Sample]) -> list[Job]:
        images = self._manifest.images
        return [
            (sample.index, self._path(sample.index), images[sample.index], self._crop_box(sample), sample.flip)
            for sample in samples
        ]

    def _recover(self, error: BrokenProcessPool) -> None:
        """Replace the pool after a worker died, and the image that killed it, if there is one.

        The pool does not say which image it was, so the images in flight are tried one by one. An image that kills two
        workers counts as failed, provided that a worker without work survives.
        """
        step, in_flight = self._oldest_step, range(self._oldest_step, self._next_to_submit)
        self._pending.clear()
        self._renew_pool()
        if not self._survives([]):
            raise DataError(
                "the processes that load images end as soon as they start; use --loader dali, or look for what ends "
                "them in the messages above"
            ) from error
        image_failed = False
        tried: set[int] = set()
        for each in in_flight:
            for job in self._jobs(self._samples(each)):
                if job[0] not in tried and not self._survives([job]) and not self._survives([job]):
                    image_failed = True
                    self._replacer.fail(each, [(job[0], "the process that decodes it dies; remove the file")])
                tried.add(job[0])
        if not image_failed:
            self._crashes += 1
            if self._crashes > MAX_WORKER_CRASHES:
                raise DataError(
                    f"processes that load images ended unexpectedly {self._crashes} times, perhaps for lack of "
                    f"memory; set data.workers below {self._workers} or use --loader dali"
                ) from error
            log.warning("a process that loads images ended unexpectedly; it is replaced")
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
    """Read the images of `jobs`; runs in a worker."""
    batch = np.empty((len(jobs), size, size, 3), dtype=np.uint8)
    failed: list[tuple[int, str]] = []
    for crop, (index, path, entry, box, flip) in zip(batch, jobs, strict=True):
        try:
            crop[:] = read_crop(path, entry, box, size, flip)
        except UnusableImageError as error:
            failed.append((index, str(error)))
    return batch, failed


def _start_worker() -> None:
    unblocked = {*STOP_SIGNALS, signal.SIGXCPU}
    for signum in unblocked - {signal.SIGTERM}:
        signal.signal(signum, signal.SIG_IGN)
    # Where the system does not tell the sender of a signal (macOS), every SIGTERM ends a worker.
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_on_sigterm_from_parent, daemon=True).start()
        unblocked.remove(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, unblocked)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_on_sigterm_from_parent() -> None:
    # When a worker has died, the pool sends SIGTERM to the others. It stays blocked in all threads, to be waited for
    # here.
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    # A killed parent cannot end its workers, and they would wait for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block stop signals in this thread and in processes that it starts; deliver them here afterwards."""
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGXCPU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
