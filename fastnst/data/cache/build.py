"""Makes a cache, or finishes or mends one: shard by shard, so that what is finished outlives whatever ends the process.

A shard is a file that `write_atomic` gives its name when it is whole; a note beside it (`shard_0000.json`) says what it
was made from, and its SHA-256, until the manifest, written last, says so of all. Which image lies where, and every
byte, follow from the folder's manifest alone, and from no number of threads.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastnst.data.cache.format import (
    LARGEST_RATIO,
    MANIFEST,
    Cache,
    Shard,
    ShardError,
    Stored,
    command,
    in_shards,
    is_cache,
    layout,
    manifest_bytes,
    plan_of,
    read_cache,
    shard_name,
)
from fastnst.data.cache.verify import describe_damage, note_written, sha256_of_shard, verify
from fastnst.data.crop import CropBox, crop_box, read_crop
from fastnst.data.manifest import Entry, Manifest, Rejection
from fastnst.data.sampler import Fit
from fastnst.errors import DataError
from fastnst.images import UnusableImageError, printable
from fastnst.progress import ProgressReport, byte_count
from fastnst.storage import (
    LOCK_NAME,
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
_LARGEST_NOTE = 1 << 12
_MIDDLE = np.array([0.5, 0.5], np.float32)


@dataclass(frozen=True)
class Built:
    """What `build_cache` did."""

    cache: Cache
    kept: int
    """Shards that were there and as they should be."""


def build_cache(
    manifest: Manifest,
    out: Path,
    *,
    size: int,
    fit: Fit,
    rebuild: bool = False,
    workers: int | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Built:
    """Write the images of a folder into a cache; shows its progress on stderr.

    Images whose sides differ by more than `LARGEST_RATIO` are refused, beside those that the manifest refuses.

    Args:
        manifest: of the folder, for training (`build_manifest(…, flat=False)`).
        out: the cache; new, empty, unfinished, or with `rebuild` one that is damaged or of other images. Of those,
            what is as it should be is kept.
        size: of the short side, or of the square.
        fit: see `fastnst.data.cache.format`.
        rebuild: make again what is damaged, or is of another folder, size or fit.
        workers: threads that decode; default: one for each core.
        notify: receives one line per event that a user should know of.

    Raises:
        DataError: `out` is damaged or of something else, and `rebuild` is not set; or an image has changed meanwhile.
        StorageError: the storage refuses, or has not the space.
        UserError: another process makes this cache just now.
    """
    manifest = _without_thin_ones(manifest)
    images = layout(manifest.images, fit, size)
    plans = [plan_of(group, fit, size) for group in in_shards(images)]
    totals = [sum(stored.bytes for stored in group) for group in in_shards(images)]
    _check_place(out)
    if not out.exists():
        # Before anything is made.
        _check_space(out, dict(enumerate(totals)))
    with lock_run(out):
        _check_place(out)
        builder = _Builder(manifest, out, images, size, fit, workers or len(os.sched_getaffinity(0)))
        finished = builder.finished_cache(plans, rebuild=rebuild)
        if finished is not None:
            return Built(finished, len(plans))
        known = builder.known_shards(plans, totals, notify)
        missing = [index for index in range(len(plans)) if index not in known]
        for index in missing:
            remove_leftovers(out / shard_name(index))
        _check_space(out, {index: totals[index] for index in missing})
        builder.take_manifest_away(known)
        kept = len(known)
        done = sum(len(in_shards(images)[index]) for index in known)
        with ProgressReport("cache", len(images), "images", start=done) as progress:
            for index in missing:
                known[index] = builder.write_shard(index, plans[index], totals[index], progress)
        return Built(builder.write_manifest([known[index] for index in range(len(plans))]), kept)


class _Builder:
    """The owner of a cache's folder."""

    def __init__(self, manifest: Manifest, out: Path, images: list[Stored], size: int, fit: Fit, workers: int) -> None:
        self._manifest, self._out, self._size, self._fit, self._workers = manifest, out, size, fit, workers
        self._images, self._groups = images, in_shards(images)
        self._source = os.path.abspath(manifest.folder)  # noqa: PTH100

    def finished_cache(self, plans: list[str], *, rebuild: bool) -> Cache | None:
        """The cache, if there is nothing to do; None if there is, and it may be done."""
        if rebuild or not (self._out / MANIFEST).exists():
            return None
        cache = read_cache(self._out)
        if [shard.plan for shard in cache.shards] != plans:
            raise DataError(
                f"{printable(self._out)} is a cache of {_describe(cache)}, not of "
                f"{_describe(self._cache(()))} as they are now; replace it with: "
                f"{command(self._source, self._size, self._fit, self._out)} --rebuild, or choose another --out"
            )
        if damaged := verify(cache, known=False, workers=self._workers):
            raise DataError(describe_damage(cache, damaged))
        return cache

    def known_shards(self, plans: list[str], totals: list[int], notify: Callable[[str], None]) -> dict[int, Shard]:
        """The shards that are there, are to be as they are, and hold what was written; by position."""
        noted = {shard.name: shard for shard in self._notes()}
        known: dict[int, Shard] = {}
        for index, (plan, total) in enumerate(zip(plans, totals, strict=True)):
            name = shard_name(index)
            shard = noted.get(name)
            if shard is None or (shard.plan, shard.size) != (plan, total):
                continue
            try:
                intact = sha256_of_shard(self._out, name, total, lambda _: None) == shard.sha256
            except ShardError:
                intact = False
            if intact:
                known[index] = shard
            else:
                notify(f"{printable(self._out / name)} is damaged or missing, and is made again")
        if known:
            notify(f"{len(known)} of {len(plans)} shards are there already, and as they were written")
        return known

    def take_manifest_away(self, known: dict[int, Shard]) -> None:
        """From now on the cache is unfinished; what is known of its shards is noted beside them."""
        for shard in known.values():
            self._write_note(shard)
        try:
            (self._out / MANIFEST).unlink(missing_ok=True)
            sync_folder(self._out)
        except OSError as error:
            raise storage_error(self._out / MANIFEST, error) from error

    def write_shard(self, index: int, plan: str, total: int, progress: ProgressReport) -> Shard:
        """Make a shard, and note it."""
        path, digest = self._out / shard_name(index), hashlib.sha256()

        def write(file: BinaryIO) -> None:
            # One at a time, in their order; what is ahead is decoded meanwhile.
            for pixels in self._decoded(self._groups[index]):
                file.write(pixels.data)
                digest.update(pixels.data)
                progress.advance()

        # Whoever killed the process between shard and note must not find another shard's note.
        _note_path(path).unlink(missing_ok=True)
        write_atomic(path, write)
        shard = Shard(path.name, total, digest.hexdigest(), plan)
        self._write_note(shard)
        return shard

    def write_manifest(self, shards: list[Shard]) -> Cache:
        """Finish the cache, and remove what it no longer needs."""
        cache = self._cache(tuple(shards))
        remove_leftovers(self._out / MANIFEST)
        write_atomic(self._out / MANIFEST, manifest_bytes(cache))
        note_written(cache)
        with contextlib.suppress(OSError):
            current = {shard.name for shard in shards}
            for path in self._out.iterdir():
                if _is_ours(path.name) and path.name not in {MANIFEST, LOCK_NAME, *current}:
                    path.unlink(missing_ok=True)
        return cache

    def _cache(self, shards: tuple[Shard, ...]) -> Cache:
        return Cache(
            self._out, self._size, self._fit, self._source, shards, self._images, list(self._manifest.rejected)
        )

    def _decoded(self, group: list[Stored]) -> Iterator[np.ndarray]:
        rest = _chunks(group)
        running: deque[Future[list[np.ndarray]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            while True:
                while len(running) <= self._workers and (chunk := next(rest, None)) is not None:
                    running.append(pool.submit(self._decode, chunk))
                if not running:
                    return
                yield from running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, chunk: list[Stored]) -> list[np.ndarray]:
        return [self._pixels(stored) for stored in chunk]

    def _pixels(self, stored: Stored) -> np.ndarray:
        """What is kept of an image: uint8 `[rows, columns, 3]`."""
        entry, size = stored.entry, self._size
        window: CropBox
        if self._fit == "random_crop":
            side = min(entry.width, entry.height)
            window = 0.0, 0.0, stored.columns * side / size, stored.rows * side / size
        else:
            window = crop_box(entry.width, entry.height, self._fit, _MIDDLE, size)
        path = os.path.join(self._manifest.folder, entry.path)  # noqa: PTH118
        try:
            pixels = read_crop(path, entry, window, size, False, shape=(stored.columns, stored.rows))
        except UnusableImageError as error:
            raise DataError(
                f"{printable(path)} cannot be read any more: {error}; then run the same command again, which goes on "
                "with what is finished"
            ) from error
        return np.ascontiguousarray(pixels)

    def _notes(self) -> Iterator[Shard]:
        """What is known of shards: from the manifest, or from the notes of a cache that was not finished."""
        with contextlib.suppress(DataError):
            yield from read_cache(self._out).shards
        for path in sorted(self._out.glob("shard_*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                note = json.loads(read_regular_file(path, _LARGEST_NOTE))
                yield Shard(path.with_suffix(".u8").name, note["size"], note["sha256"], note["plan"])

    def _write_note(self, shard: Shard) -> None:
        note = {"size": shard.size, "sha256": shard.sha256, "plan": shard.plan}
        write_atomic(_note_path(self._out / shard.name), json.dumps(note).encode())


def _without_thin_ones(manifest: Manifest) -> Manifest:
    """Without images whose long side would be endless once the short one has its size."""
    kept = [entry for entry in manifest.images if not _is_thin(entry)]
    if len(kept) == len(manifest.images):
        return manifest
    thin = [
        Rejection(
            entry.path,
            f"{entry.width} × {entry.height} px is too thin for a cache, which takes sides of 1:{LARGEST_RATIO} at "
            "most; crop it, or train on the folder itself",
        )
        for entry in manifest.images
        if _is_thin(entry)
    ]
    if not kept:
        raise DataError(
            f"not one image in {printable(manifest.folder)} can be cached; the first, {printable(thin[0].path)}: "
            f"{thin[0].reason}"
        )
    rejected = sorted([*manifest.rejected, *thin], key=lambda item: os.fsencode(item.path))
    return replace(manifest, images=kept, rejected=rejected)


def _is_thin(entry: Entry) -> bool:
    return max(entry.width, entry.height) > LARGEST_RATIO * min(entry.width, entry.height)


def _check_place(out: Path) -> None:
    """Refuse a folder that holds something else."""
    try:
        names = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise storage_error(out, error) from error
    foreign = [name for name in names if not _is_ours(name)]
    if foreign:
        raise DataError(f"{printable(out)} holds {foreign[0]!r}, which is no part of a cache; choose another --out")
    if MANIFEST in names and not is_cache(out):
        raise DataError(f"{printable(out / MANIFEST)} is not that of a cache; choose another --out")


def _is_ours(name: str) -> bool:
    stem, _, suffix = name.rpartition(".")
    number = stem.removeprefix("shard_")
    is_shard = stem.startswith("shard_") and number.isdecimal() and number.isascii() and suffix in ("u8", "json")
    return name in (MANIFEST, LOCK_NAME) or is_shard or is_leftover(name)


def _check_space(out: Path, to_write: dict[int, int]) -> None:
    """Compare free space with the most that is needed at once; `to_write` holds the bytes of shards by position."""
    growth = needed = 0
    for index, size in to_write.items():
        needed = max(needed, growth + size)
        with contextlib.suppress(OSError):
            # It gives its place to the new one, once that is whole.
            growth -= (out / shard_name(index)).lstat().st_size
        growth += size
    there = out
    while not there.exists():
        there = there.parent
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise storage_error(out, error) from error
    if needed > free:
        raise StorageError(
            f"the cache needs {byte_count(needed)} in {printable(out)}, and {byte_count(free)} are free there; free "
            "some space, choose another --out, or a smaller --size"
        )


def _chunks(group: list[Stored]) -> Iterator[list[Stored]]:
    """Images that one thread decodes at a time, so that neither their number nor their bytes get out of hand."""
    chunk: list[Stored] = []
    for stored in group:
        chunk.append(stored)
        if len(chunk) == _CHUNK_IMAGES or sum(each.bytes for each in chunk) >= _CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _note_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _describe(cache: Cache) -> str:
    return f"{len(cache.images)} images of {cache.source}, {cache.size} px, {cache.fit}"
