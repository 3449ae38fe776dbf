"""Load images from a cache: threads read them ahead into batches, crop and flip; nothing is decoded."""

import contextlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastnst.data.cache.format import Cache, CachedImage, CachedManifest, ShardError, open_shard
from fastnst.data.crop import crop_offset
from fastnst.data.loaders.base import Loader, LoaderArgs, Sample
from fastnst.data.manifest import ImageEntry, Manifest
from fastnst.data.sampler import Fit
from fastnst.errors import DataError
from fastnst.images import printable, read_image

if TYPE_CHECKING:
    import torch

_ABSENT = "it is not in the cache"


class CacheLoader(Loader):
    """See `open_loader`."""

    def __init__(self, args: LoaderArgs) -> None:
        super().__init__(args)
        assert isinstance(args.manifest, CachedManifest)
        cache = args.manifest.cache
        self._shards = Shards(cache)
        # A run that started on the folder and continues on its cache may know images that had failed in between.
        cached = {image.entry.path: image for image in cache.images}
        self._images = [cached.get(entry.path) for entry in args.manifest.images]
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="cache")
        self._read_ahead()

    def __next__(self) -> "torch.Tensor":
        batch: torch.Tensor = self._next_parts()[0]
        # PyTorch keeps pinned memory until the copy has finished.
        return batch.to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the threads, and close the shards."""
        super().close()
        self._shards.close()

    def _submit(self, samples: list[Sample]) -> "list[Future[tuple[torch.Tensor, list[tuple[int, str]]]]]":
        import torch

        size = self._shards.cache.size
        batch = torch.empty((len(samples), size, size, 3), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return [self._pool.submit(self._fill, batch, samples, share) for share in self._shares(len(samples))]

    def _fill(
        self, batch: "torch.Tensor", samples: list[Sample], share: slice
    ) -> "tuple[torch.Tensor, list[tuple[int, str]]]":
        """Read a share of the samples into the batch; return the batch, and index and reason of absent images."""
        absent = []
        for out, sample in zip(batch.numpy()[share], samples[share], strict=True):
            image = self._images[sample.index]
            if image is None:
                absent.append((sample.index, _ABSENT))
            else:
                self._shards.read_crop(image, self._sampler.fit, sample.crop, sample.flip, out)
        return batch, absent


@dataclass(frozen=True, slots=True)
class _OpenShard:
    path: str
    descriptor: int
    size: int
    mtime: int


class Shards:
    """Reads images from the shards of a cache; thread-safe.

    Raises:
        DataError: a shard is missing or has the wrong size.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._open: list[_OpenShard] = []
        self._thread = threading.local()
        try:
            for shard in cache.shards:
                descriptor = open_shard(cache.folder, shard.name, shard.size)
                path, mtime = printable(cache.folder / shard.name), os.fstat(descriptor).st_mtime_ns
                self._open.append(_OpenShard(path, descriptor, shard.size, mtime))
        except ShardError as error:
            self.close()
            raise DataError(f"{error}; {cache.rebuild_hint()}") from error

    def close(self) -> None:
        """Close the shards; may be called twice, but not while a thread reads."""
        while self._open:
            os.close(self._open.pop().descriptor)

    def read(self, image: CachedImage) -> np.ndarray:
        """Read a whole image, uint8 `[rows, columns, 3]`; this thread's next call overwrites it.

        Raises:
            DataError: the shard has changed.
        """
        pixels = self._buffer(image.bytes)[: image.bytes]
        self._read_bytes(image.shard, image.offset, pixels)
        return pixels.reshape(image.rows, image.columns, 3)

    def read_crop(self, image: CachedImage, fit: Fit, crop: np.ndarray, flip: bool, out: np.ndarray) -> None:
        """Read the crop that `crop_box` and `resize_crop` make of the image's file.

        Args:
            image: the image.
            fit: the cache's fit.
            crop: the image's row of `SampleBatch.crop`.
            flip: mirror left to right.
            out: result, uint8 `[size, size, 3]`, contiguous.

        Raises:
            DataError: the shard has changed.
        """
        size, entry = self.cache.size, image.entry
        left = top = 0
        if fit == "random_crop":
            side = min(entry.width, entry.height)
            left, top = (
                crop_offset(length, side, size, float(fraction))
                for length, fraction in zip((entry.width, entry.height), crop, strict=True)
            )
        if image.columns == size and not flip:
            self._read_bytes(image.shard, image.offset + top * size * 3, out.reshape(-1))
            return
        pixels = self.read(image)[top : top + size, left : left + size]
        if not flip:
            out[:] = pixels
            return
        for channel in range(3):
            # Much faster than all channels at once, which NumPy copies pixel by pixel.
            out[:, :, channel] = pixels[:, ::-1, channel]

    def _read_bytes(self, index: int, offset: int, pixels: np.ndarray) -> None:
        shard, total = self._open[index], len(pixels)
        remaining = pixels.data
        try:
            status = os.fstat(shard.descriptor)
            if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime):
                size = "" if status.st_size == shard.size else f": it has {status.st_size} bytes, and had {shard.size}"
                raise self._changed(shard, f"was written to{size}")
            while remaining:
                position = offset + total - len(remaining)
                count = os.preadv(shard.descriptor, [remaining], position)
                if not count:
                    raise self._changed(shard, f"was cut short at {position} bytes")
                remaining = remaining[count:]
        except OSError as error:
            raise self._changed(shard, f"cannot be read any more: {error.strerror}") from error

    def _changed(self, shard: _OpenShard, how: str) -> DataError:
        return DataError(
            f"{shard.path} {how}, while it was read; {self.cache.rebuild_hint()}, then go on with --resume"
        )

    def _buffer(self, size: int) -> np.ndarray:
        """Return this thread's buffer, uint8, of at least `size` bytes."""
        buffer: np.ndarray | None = getattr(self._thread, "buffer", None)
        if buffer is None or len(buffer) < size:
            self._thread.buffer = buffer = np.empty(size, np.uint8)
        return buffer


def read_pixels(manifest: Manifest, entry: ImageEntry) -> np.ndarray:
    """Read an image of a run, uint8 `[H, W, 3]`: the whole file, or its version in the cache.

    Raises:
        DataError: it cannot be read.
    """
    if not isinstance(manifest, CachedManifest):
        return read_image(manifest.folder / entry.path)
    image = next((each for each in manifest.cache.images if each.entry.path == entry.path), None)
    if image is None:
        raise DataError(f"{printable(entry.path)}: {_ABSENT}")
    with contextlib.closing(Shards(manifest.cache)) as shards:
        return shards.read(image).copy()
