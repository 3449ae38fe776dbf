"""Build, finish or repair a cache, shard by shard, so that finished shards survive a killed process.

`write_atomic` gives a shard its name when it is complete. A sidecar beside it (`shard_0000.json`) holds its SHA-256 and
the digest of its inputs, until the manifest, written last, holds them for all shards. Offsets and bytes depend on the
folder's manifest alone, not on the number of threads.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastnst.data.cache.format import (
    MANIFEST,
    MAX_ASPECT_RATIO,
    Cache,
    CachedImage,
    Shard,
    ShardError,
    cache_command,
    group_by_shard,
    inputs_digest,
    is_cache,
    layout,
    manifest_bytes,
    read_cache,
    shard_name,
)
from fastnst.data.cache.verify import describe_damage, mark_verified, sha256_of_shard, verify
from fastnst.data.crop import CropBox, crop_box, read_crop
from fastnst.data.manifest import DECODED_BYTES_PER_PIXEL, ImageEntry, Manifest, Rejection
from fastnst.data.sampler import Fit
from fastnst.errors import DataError
from fastnst.images import UnusableImageError, printable
from fastnst.memory import MemoryBudget, available_host_memory
from fastnst.progress import ProgressReport, byte_count
from fastnst.storage import (
    LOCK_NAMES,
    StorageError,
    is_leftover,
    lock_run,
    read_regular_file,
    remove_leftovers,
    storage_error,
    sync_folder,
    write_atomic,
)

_CHUNK_IMAGES, _CHUNK_BYTES = 16, 1 << 24
_MAX_SIDECAR_BYTES = 1 << 12
_CENTER = np.array([0.5, 0.5], np.float32)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """A finished cache."""

    cache: Cache
    shards_kept: int
    """Number of shards that existed already and were intact."""


def build_cache(
    manifest: Manifest, out: Path, *, size: int, fit: Fit, rebuild: bool = False, workers: int | None = None
) -> BuildResult:
    """Write the images of a folder into a cache; shows progress on stderr.

    Rejects images whose sides differ by more than `MAX_ASPECT_RATIO`, in addition to the manifest's rejections.

    Args:
        manifest: images for training (`build_manifest(…, allow_uniform=False)`).
        out: folder of the cache: new, empty or unfinished; with `rebuild` also a damaged cache or one of other images,
            whose intact and matching shards are kept.
        size: length of the short side, or of the square, in pixels.
        fit: see `fastnst.data.cache.format`.
        rebuild: replace shards that are damaged, or made from other images or with another size or fit.
        workers: decoding threads; default: one per core.

    Raises:
        DataError: `out` is damaged or holds something else, and `rebuild` is not set; or an image changed meanwhile.
        StorageError: the storage cannot be written, or lacks the space.
        UserError: another process is building this cache.
    """
    builder = _Builder(_reject_elongated(manifest), out, size, fit, workers or len(os.sched_getaffinity(0)))
    check_place(out)
    if not out.exists():
        # Checked before anything is created.
        builder.check_space(builder.plans)
    with lock_run(out):
        check_place(out)
        return builder.build(rebuild=rebuild)


@dataclass(frozen=True)
class _ShardPlan:
    """A shard to be written."""

    name: str
    images: list[CachedImage]
    inputs_sha256: str

    @property
    def size(self) -> int:
        return sum(image.bytes for image in self.images)


class _Builder:
    """Builds the cache in a folder that this process has locked."""

    def __init__(self, manifest: Manifest, out: Path, size: int, fit: Fit, workers: int) -> None:
        self._manifest, self._out, self._size, self._fit, self._workers = manifest, out, size, fit, workers
        self._images = layout(manifest.images, fit, size)
        self._source = os.path.abspath(manifest.folder)  # noqa: PTH100
        self._budget = MemoryBudget(available_host_memory())
        self.plans = [
            _ShardPlan(shard_name(index), images, inputs_digest(images, fit, size))
            for index, images in enumerate(group_by_shard(self._images))
        ]

    def build(self, *, rebuild: bool) -> BuildResult:
        """Write the missing shards, then the manifest."""
        if not rebuild and (self._out / MANIFEST).exists():
            return BuildResult(self._finished_cache(), len(self.plans))
        shards = self._intact_shards()
        kept = len(shards)
        missing = [plan for plan in self.plans if plan.name not in shards]
        for plan in missing:
            remove_leftovers(self._out / plan.name)
        self.check_space(missing)
        self._remove_manifest(shards.values())
        done = sum(len(plan.images) for plan in self.plans if plan.name in shards)
        with ProgressReport("cache", len(self._images), "images", start=done) as progress:
            for plan in missing:
                shards[plan.name] = self._write_shard(plan, progress)
        return BuildResult(self._write_manifest([shards[plan.name] for plan in self.plans]), kept)

    def check_space(self, plans: Iterable[_ShardPlan]) -> None:
        """Compare free space with the peak need while these shards are written.

        Raises:
            StorageError: there is too little.
        """
        growth = needed = 0
        for plan in plans:
            needed = max(needed, growth + plan.size)
            with contextlib.suppress(OSError):
                # An old shard is removed once its replacement is complete.
                growth -= (self._out / plan.name).lstat().st_size
            growth += plan.size
        existing = self._out
        while not existing.exists():
            existing = existing.parent
        try:
            free = shutil.disk_usage(existing).free
        except OSError:
            free = 0
        # Some file systems do not say, or say 0; then the first write tells.
        if 0 < free < needed:
            raise StorageError(
                f"the cache needs {byte_count(needed)} in {printable(self._out)}, and {byte_count(free)} are free "
                "there; free some space, choose another --out, or a smaller --size"
            )

    def _finished_cache(self) -> Cache:
        """Verify a cache that has a manifest; raise DataError unless it is intact and matches the plans."""
        cache = read_cache(self._out)
        if [shard.inputs_sha256 for shard in cache.shards] != [plan.inputs_sha256 for plan in self.plans]:
            raise DataError(
                f"{printable(self._out)} is a cache of {_describe(cache)}, not of "
                f"{_describe(self._cache(()))} as they are now; replace it with: "
                f"{cache_command(self._source, self._size, self._fit, self._out)} --rebuild, or choose another --out"
            )
        if damaged := verify(cache, skip_verified=False, workers=self._workers):
            raise DataError(describe_damage(cache, damaged))
        return cache

    def _intact_shards(self) -> dict[str, Shard]:
        """Return the existing shards that match their plan and their SHA-256, by name."""
        recorded = {shard.name: shard for shard in self._recorded_shards()}
        intact: dict[str, Shard] = {}
        for plan in self.plans:
            shard = recorded.get(plan.name)
            if shard is None or (shard.inputs_sha256, shard.size) != (plan.inputs_sha256, plan.size):
                continue
            with contextlib.suppress(ShardError):
                if sha256_of_shard(self._out, plan.name, plan.size, lambda _: None) == shard.sha256:
                    intact[plan.name] = shard
                    continue
            log.warning("%s is damaged or missing, and is made again", printable(self._out / plan.name))
        if intact:
            log.info("%d of %d shards exist already and are intact", len(intact), len(self.plans))
        return intact

    def _remove_manifest(self, shards: Iterable[Shard]) -> None:
        """Mark the cache as unfinished; sidecars keep what the manifest said of these shards."""
        for shard in shards:
            self._write_sidecar(shard)
        try:
            (self._out / MANIFEST).unlink(missing_ok=True)
            sync_folder(self._out)
        except OSError as error:
            raise storage_error(self._out / MANIFEST, error) from error

    def _write_shard(self, plan: _ShardPlan, progress: ProgressReport) -> Shard:
        path, digest = self._out / plan.name, hashlib.sha256()

        def write(file: BinaryIO) -> None:
            # In order; later images are decoded meanwhile.
            for pixels in self._decoded(plan.images):
                file.write(pixels.data)
                digest.update(pixels.data)
                progress.advance()

        # A kill between shard and sidecar must not leave the sidecar of an older shard.
        _sidecar(path).unlink(missing_ok=True)
        write_atomic(path, write)
        shard = Shard(plan.name, plan.size, digest.hexdigest(), plan.inputs_sha256)
        self._write_sidecar(shard)
        return shard

    def _write_manifest(self, shards: list[Shard]) -> Cache:
        """Finish the cache, and remove files that it no longer needs."""
        cache = self._cache(tuple(shards))
        remove_leftovers(self._out / MANIFEST)
        write_atomic(self._out / MANIFEST, manifest_bytes(cache))
        mark_verified(cache)
        with contextlib.suppress(OSError):
            current = {shard.name for shard in shards}
            for path in self._out.iterdir():
                if _is_cache_file(path.name) and path.name not in {MANIFEST, *LOCK_NAMES, *current}:
                    path.unlink(missing_ok=True)
        return cache

    def _cache(self, shards: tuple[Shard, ...]) -> Cache:
        return Cache(
            self._out, self._size, self._fit, self._source, shards, self._images, list(self._manifest.rejected)
        )

    def _decoded(self, images: list[CachedImage]) -> Iterator[np.ndarray]:
        """Yield the pixels of images in order, decoded ahead in threads."""
        chunks = _chunks(images)
        running: deque[Future[list[np.ndarray]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            while True:
                while len(running) <= self._workers and (chunk := next(chunks, None)) is not None:
                    running.append(pool.submit(lambda chunk: [self._decode(image) for image in chunk], chunk))
                if not running:
                    return
                yield from running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, image: CachedImage) -> np.ndarray:
        """Return the pixels to store, uint8 `[rows, columns, 3]`."""
        entry, size = image.entry, self._size
        box: CropBox
        if self._fit == "random_crop":
            side = min(entry.width, entry.height)
            box = 0.0, 0.0, image.columns * side / size, image.rows * side / size
        else:
            box = crop_box(entry.width, entry.height, self._fit, _CENTER, size)
        path = os.path.join(self._manifest.folder, entry.path)  # noqa: PTH118
        try:
            with self._budget.reserved(DECODED_BYTES_PER_PIXEL * entry.width * entry.height):
                pixels = read_crop(path, entry, box, size, False, shape=(image.columns, image.rows))
        except UnusableImageError as error:
            raise DataError(
                f"{printable(path)} cannot be read any more: {error}; then run the same command again, which keeps "
                "finished shards"
            ) from error
        return np.ascontiguousarray(pixels)

    def _recorded_shards(self) -> Iterator[Shard]:
        """Yield the shards listed in the manifest, or in the sidecars of an unfinished cache."""
        with contextlib.suppress(DataError):
            yield from read_cache(self._out).shards
        for path in sorted(self._out.glob("shard_*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                fields = json.loads(read_regular_file(path, _MAX_SIDECAR_BYTES))
                yield Shard(path.with_suffix(".u8").name, fields["size"], fields["sha256"], fields["plan"])

    def _write_sidecar(self, shard: Shard) -> None:
        fields = {"size": shard.size, "sha256": shard.sha256, "plan": shard.inputs_sha256}
        write_atomic(_sidecar(self._out / shard.name), json.dumps(fields).encode())


def _reject_elongated(manifest: Manifest) -> Manifest:
    """Move images that `MAX_ASPECT_RATIO` excludes to the manifest's rejections."""
    kept: list[ImageEntry] = []
    elongated: list[Rejection] = []
    for entry in manifest.images:
        if max(entry.width, entry.height) <= MAX_ASPECT_RATIO * min(entry.width, entry.height):
            kept.append(entry)
            continue
        reason = (
            f"{entry.width} × {entry.height} px is too thin for a cache, which takes sides of 1:{MAX_ASPECT_RATIO} at "
            "most; crop it, or train on the folder itself"
        )
        elongated.append(Rejection(entry.path, reason))
    if not elongated:
        return manifest
    if not kept:
        raise DataError(
            f"none of the images in {printable(manifest.folder)} can be cached; the first, "
            f"{printable(elongated[0].path)}: {elongated[0].reason}"
        )
    rejected = sorted([*manifest.rejected, *elongated], key=lambda item: os.fsencode(item.path))
    return replace(manifest, images=kept, rejected=rejected)


def check_place(out: Path) -> None:
    """Raise DataError if the folder of a new cache holds files that are not a cache's; makes nothing."""
    try:
        names = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise storage_error(out, error) from error
    foreign = [name for name in names if not _is_cache_file(name)]
    if foreign:
        raise DataError(f"{printable(out)} holds {foreign[0]!r}, which is no part of a cache; choose another --out")
    if MANIFEST in names and not is_cache(out):
        raise DataError(f"{printable(out / MANIFEST)} is not that of a cache; choose another --out")


def _is_cache_file(name: str) -> bool:
    return name in {MANIFEST, *LOCK_NAMES} or bool(re.fullmatch(r"shard_[0-9]+\.(u8|json)", name)) or is_leftover(name)


def _chunks(images: list[CachedImage]) -> Iterator[list[CachedImage]]:
    """Yield chunks for one thread at a time, bounded in images and in bytes."""
    chunk: list[CachedImage] = []
    for image in images:
        chunk.append(image)
        if len(chunk) == _CHUNK_IMAGES or sum(each.bytes for each in chunk) >= _CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _sidecar(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _describe(cache: Cache) -> str:
    return f"{len(cache.images)} images of {cache.source}, {cache.size} px, {cache.fit}"
