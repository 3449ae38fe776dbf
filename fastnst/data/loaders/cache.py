"""Images from a cache: threads read them ahead into batches, cut them out and mirror them; nothing is computed."""

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from fastnst.data.cache.format import Cache, CachedManifest, ShardError, Stored, open_shard
from fastnst.data.crop import crop_offset
from fastnst.data.manifest import Entry, Manifest
from fastnst.data.sampler import Fit
from fastnst.errors import DataError
from fastnst.images import printable, read_image

if TYPE_CHECKING:
    import torch

    from fastnst.config import DataConfig
    from fastnst.data.replacements import ImageReplacer
    from fastnst.data.sampler import Sampler

_ABSENT = "it is not in the cache"

_Job = tuple[int, Stored | None, np.ndarray, bool]
"""Index in the manifest, where the image lies (None: nowhere), its row of `SampleBatch.crop`, and flip."""


class CacheLoader:
    """See `fastnst.data.open_loader`."""

    def __init__(
        self,
        manifest: CachedManifest,
        order: "Sampler",
        config: "DataConfig",
        *,
        device: "torch.device",
        replacements: "ImageReplacer",
        start_step: int = 0,
        rank: int = 0,
    ) -> None:
        assert config.workers is not None
        self._order, self._device, self._rank = order, device, rank
        self._replacements = replacements
        self._prefetch, self._workers = config.prefetch, config.workers
        self._shards = Shards(manifest.cache)
        # A run that was begun on the folder itself, and goes on here, may know images that had failed in between.
        places = {stored.entry.path: stored for stored in manifest.cache.images}
        self._stored = [places.get(entry.path) for entry in manifest.images]
        self._next_to_submit = start_step
        self._waiting: deque[tuple[torch.Tensor, list[Future[list[int]]]]] = deque()
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="cache")
        self._submit()

    def __iter__(self) -> "Iterator[torch.Tensor]":
        return self

    def __next__(self) -> "torch.Tensor":
        while self._waiting:
            step = self._next_to_submit - len(self._waiting)
            batch, futures = self._waiting[0]
            failed = [index for future in futures for index in future.result()]
            if not failed:
                break
            self._replacements.fail(step, [(index, _ABSENT) for index in failed])
            self.seek(step)
        else:
            raise StopIteration
        self._waiting.popleft()
        self._submit()
        # PyTorch keeps pinned memory until what was copied from it has arrived.
        return batch.to(self._device, non_blocking=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def seek(self, step: int) -> None:
        """Go on with `step`; what was read ahead may lack an image, and is read again."""
        for _, futures in self._waiting:
            for future in futures:
                future.cancel()
        self._waiting.clear()
        self._next_to_submit = step
        self._submit()

    def close(self) -> None:
        """End the threads, and close the shards."""
        self._waiting.clear()
        self._pool.shutdown(cancel_futures=True)
        self._shards.close()

    def _submit(self) -> None:
        import torch

        size = self._shards.cache.size
        while len(self._waiting) < self._prefetch and self._next_to_submit < self._order.steps:
            jobs = self._jobs(self._next_to_submit)
            batch = torch.empty((len(jobs), size, size, 3), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            squares = batch.numpy()
            share = -(-len(jobs) // self._workers)
            futures = [
                self._pool.submit(self._read, squares[first : first + share], jobs[first : first + share])
                for first in range(0, len(jobs), share)
            ]
            self._waiting.append((batch, futures))
            self._next_to_submit += 1

    def _jobs(self, step: int) -> list[_Job]:
        samples = self._order.batch(step, self._rank)
        indices = self._replacements.indices(step, samples.indices).tolist()
        places = zip(indices, samples.crop, samples.flip.tolist(), strict=True)
        return [(index, self._stored[index], crop, flip) for index, crop, flip in places]

    def _read(self, squares: np.ndarray, jobs: list[_Job]) -> list[int]:
        """Fill the squares, in a thread; the indices of images that are not there."""
        absent = []
        for square, (index, stored, crop, flip) in zip(squares, jobs, strict=True):
            if stored is None:
                absent.append(index)
            else:
                self._shards.read_crop(stored, self._order.fit, crop, flip, square)
        return absent


@dataclass(frozen=True, slots=True)
class _OpenShard:
    path: str
    descriptor: int
    size: int
    mtime: int


class Shards:
    """The shards of a cache, open; several threads may read. A context manager.

    Raises:
        DataError: one is missing or has another size.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._open: list[_OpenShard] = []
        self._scratch = threading.local()
        try:
            for shard in cache.shards:
                descriptor = open_shard(cache.folder, shard.name, shard.size)
                path, mtime = printable(cache.folder / shard.name), os.fstat(descriptor).st_mtime_ns
                self._open.append(_OpenShard(path, descriptor, shard.size, mtime))
        except ShardError as error:
            self.close()
            raise DataError(f"{error}; {cache.remedy()}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """May be called twice; nobody may be reading."""
        while self._open:
            os.close(self._open.pop().descriptor)

    def read(self, stored: Stored) -> np.ndarray:
        """All that is kept of an image, uint8 `[rows, columns, 3]`; void when this thread reads the next one.

        Raises:
            DataError: the shard is no longer what it was.
        """
        pixels = self._buffer(stored.bytes)[: stored.bytes]
        self._fill(stored.shard, stored.offset, pixels)
        return pixels.reshape(stored.rows, stored.columns, 3)

    def read_crop(self, stored: Stored, fit: Fit, crop: np.ndarray, flip: bool, out: np.ndarray) -> None:
        """The square that `crop_box` and `resize_crop` would make of the image's file.

        Args:
            stored: the image.
            fit: the cache's.
            crop: its row of `SampleBatch.crop`.
            flip: mirror it left to right.
            out: receives it; uint8 `[size, size, 3]`, contiguous.

        Raises:
            DataError: the shard is no longer what it was.
        """
        size, entry = self.cache.size, stored.entry
        left = top = 0
        if fit == "random_crop":
            side = min(entry.width, entry.height)
            left, top = (
                crop_offset(length, side, size, float(fraction))
                for length, fraction in zip((entry.width, entry.height), crop, strict=True)
            )
        if stored.columns == size and not flip:
            self._fill(stored.shard, stored.offset + top * size * 3, out.reshape(-1))
            return
        square = self.read(stored)[top : top + size, left : left + size]
        if not flip:
            out[:] = square
            return
        for channel in range(3):
            # Much faster than pixel by pixel, which is what NumPy makes of all three.
            out[:, :, channel] = square[:, ::-1, channel]

    def _fill(self, index: int, offset: int, pixels: np.ndarray) -> None:
        shard, total = self._open[index], len(pixels)
        rest = pixels.data
        try:
            status = os.fstat(shard.descriptor)
            if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime):
                size = "" if status.st_size == shard.size else f": it has {status.st_size} bytes, and had {shard.size}"
                raise self._changed(shard, f"was written to{size}")
            while rest:
                count = os.preadv(shard.descriptor, [rest], offset + total - len(rest))
                if not count:
                    raise self._changed(shard, f"was cut short at {offset + total - len(rest)} bytes")
                rest = rest[count:]
        except OSError as error:
            raise self._changed(shard, f"cannot be read any more: {error.strerror}") from error

    def _changed(self, shard: _OpenShard, how: str) -> DataError:
        return DataError(f"{shard.path} {how}, while it was read; {self.cache.remedy()}, then go on with --resume")

    def _buffer(self, size: int) -> np.ndarray:
        """uint8, of at least this size, the thread's own."""
        buffer: np.ndarray | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < size:
            self._scratch.buffer = buffer = np.empty(size, np.uint8)
        return buffer


def read_pixels(manifest: Manifest, entry: Entry) -> np.ndarray:
    """An image of a run's folder, uint8 `[H, W, 3]`: the whole file, or what its cache keeps of it.

    Raises:
        DataError: it cannot be read.
    """
    if not isinstance(manifest, CachedManifest):
        return read_image(manifest.folder / entry.path)
    stored = next((each for each in manifest.cache.images if each.entry.path == entry.path), None)
    if stored is None:
        raise DataError(f"{printable(entry.path)}: {_ABSENT}")
    with Shards(manifest.cache) as shards:
        return shards.read(stored).copy()
