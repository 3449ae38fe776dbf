"""The base class of all loaders: reads ahead and replaces failed images."""

import itertools
import os
from abc import abstractmethod
from collections import deque
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fastnst.data.crop import CropBox, crop_box
from fastnst.data.manifest import Manifest
from fastnst.data.replacements import ImageReplacer
from fastnst.data.sampler import Sampler

# torch is imported in functions only: the Pillow loader's worker processes do without it.
if TYPE_CHECKING:
    import torch

    from fastnst.config import DataConfig

MAX_WORKERS = 16
"""Upper limit where `data.workers` is unset: more do not help with one disk and one GPU."""


@dataclass(frozen=True)
class LoaderArgs:
    """What every loader is made from; see `open_loader`."""

    manifest: Manifest
    sampler: Sampler
    config: "DataConfig"
    device: "torch.device"
    replacer: ImageReplacer
    start_step: int
    rank: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a batch."""

    index: int
    """Index into the manifest's images, after replacement."""
    crop: np.ndarray
    """Its row of `SampleBatch.crop`."""
    flip: bool


class Loader(AbstractContextManager["Loader"]):
    """Iterates over the batches of a run: uint8 `[B, S, S, 3]` on the device, each a new tensor.

    Reads `data.prefetch` steps ahead: `_submit` starts to read a step, `_next_parts` waits for the oldest one.
    """

    _pool: Executor

    def __init__(self, args: LoaderArgs) -> None:
        self._manifest, self._sampler, self._config = args.manifest, args.sampler, args.config
        self._device, self._replacer, self._rank = args.device, args.replacer, args.rank
        self._workers = args.config.workers or min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        self._pending: deque[list[Future[Any]]] = deque()
        self._next_to_submit = args.start_step

    def __iter__(self) -> Self:
        return self

    @abstractmethod
    def __next__(self) -> "torch.Tensor": ...

    def __exit__(self, *_: object) -> None:
        self.close()

    def seek(self, step: int) -> None:
        """Continue with `step`, discarding what was read ahead: the replacer has learned of new failures."""
        self._rewind(step)

    def close(self) -> None:
        """End threads and processes; may be called twice."""
        self._pending.clear()
        self._pool.shutdown(cancel_futures=True)

    @abstractmethod
    def _submit(self, samples: list[Sample]) -> list[Future[Any]]:
        """Start to read the samples of a step.

        Each future returns a part of the batch, and index and reason of each image that could not be read.
        """

    @property
    def _oldest_step(self) -> int:
        return self._next_to_submit - len(self._pending)

    def _read_ahead(self) -> None:
        while len(self._pending) < self._config.prefetch and self._next_to_submit < self._sampler.steps:
            self._pending.append(self._submit(self._samples(self._next_to_submit)))
            self._next_to_submit += 1

    def _rewind(self, step: int) -> None:
        for future in itertools.chain.from_iterable(self._pending):
            future.cancel()
        self._pending.clear()
        self._next_to_submit = step
        self._read_ahead()

    def _next_parts(self) -> list[Any]:
        """Return the parts of the next step's batch, with failed images replaced.

        Raises:
            StopIteration: after the last step.
            DataError: more images failed than allowed.
        """
        while self._pending:
            results = [future.result() for future in self._pending[0]]
            failures = [failure for _, failed in results for failure in failed]
            if not failures:
                self._pending.popleft()
                self._read_ahead()
                return [part for part, _ in results]
            step = self._oldest_step
            self._replacer.fail(step, failures)
            self._rewind(step)
        raise StopIteration

    def _samples(self, step: int) -> list[Sample]:
        batch = self._sampler.batch(step, self._rank)
        indices = self._replacer.replace(step, batch.indices).tolist()
        return [Sample(*row) for row in zip(indices, batch.crop, batch.flip.tolist(), strict=True)]

    def _shares(self, count: int) -> list[slice]:
        """Divide `count` samples among the workers."""
        share = -(-count // self._workers)
        return [slice(first, first + share) for first in range(0, count, share)]

    def _crop_box(self, sample: Sample) -> CropBox:
        entry = self._manifest.images[sample.index]
        return crop_box(entry.width, entry.height, self._sampler.fit, sample.crop, self._config.image_size)

    def _path(self, index: int) -> str:
        return os.path.join(self._manifest.folder, self._manifest.images[index].path)  # noqa: PTH118
