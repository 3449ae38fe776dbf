"""Verify a cache's shards: every byte the first time, later only the shards that changed since."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastnst.data.cache.format import (
    Cache,
    CachedManifest,
    Shard,
    ShardError,
    as_manifest,
    check_matches,
    open_shard,
    read_cache,
)
from fastnst.data.sampler import Fit
from fastnst.errors import DataError
from fastnst.images import printable
from fastnst.storage import cache_folder, read_regular_file, write_cached

_BLOCK = 1 << 20
_SETTLED_NS = 2 * 10**9
_MAX_STAMP_BYTES = 1 << 24
_MAX_NAMED = 3


def open_cache(
    folder: Path, *, size: int, fit: Fit, progress: Callable[[int, int], None] | None = None
) -> CachedManifest:
    """Open a cache for a run, and verify its shards.

    Args:
        folder: see `is_cache`.
        size: `data.image_size`.
        fit: `data.fit`.
        progress: called with (bytes read, bytes to read in total) after each block.

    Raises:
        DataError: the cache is unfinished, made for another size or fit, or damaged; names the command that fixes it.
    """
    cache = read_cache(folder)
    check_matches(cache, size=size, fit=fit)
    damaged = verify(cache, progress=progress)
    if damaged:
        raise DataError(describe_damage(cache, damaged))
    return as_manifest(cache)


def describe_damage(cache: Cache, damaged: list[str]) -> str:
    """Return an error message for the damage that `verify` found, with advice."""
    more = f" and {len(damaged) - _MAX_NAMED} more" if len(damaged) > _MAX_NAMED else ""
    return f"{'; '.join(damaged[:_MAX_NAMED])}{more}; {cache.rebuild_hint()}"


def verify(
    cache: Cache,
    *,
    skip_verified: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Compare the shards with their SHA-256; return one message per missing or damaged shard.

    Args:
        cache: the cache.
        skip_verified: skip shards that were verified on this machine and whose size and times are unchanged. This
            misses bits that the disk itself lost.
        workers: threads that read; default: one per core.
        progress: called with (bytes read, bytes to read in total) after each block.
    """
    # Taken before reading, so that a change during it is noticed the next time.
    stamps = {shard.name: _stamp(cache.folder, shard) for shard in cache.shards}
    verified = _read_stamps(cache.folder) if skip_verified else {}
    pending = [
        shard for shard in cache.shards if (stamp := stamps[shard.name]) is None or verified.get(shard.name) != stamp
    ]
    if not pending:
        return []
    count = _ByteCounter(sum(shard.size for shard in pending), progress)

    def check(shard: Shard) -> str | None:
        try:
            found = sha256_of_shard(cache.folder, shard.name, shard.size, count.add)
        except ShardError as error:
            return str(error)
        if found != shard.sha256:
            return f"{printable(cache.folder / shard.name)} is damaged: its SHA-256 differs from the manifest's"
        return None

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), thread_name_prefix="verify") as pool:
        try:
            outcomes = list(pool.map(check, pending))
        except BaseException:
            count.stopped = True
            raise
    damaged = {shard.name for shard, outcome in zip(pending, outcomes, strict=True) if outcome is not None}
    _write_stamps(cache.folder, {name: stamp for name, stamp in stamps.items() if name not in damaged})
    return [outcome for outcome in outcomes if outcome is not None]


def sha256_of_shard(folder: Path, name: str, size: int, progress: Callable[[int], None]) -> str:
    """Return the hexadecimal SHA-256 of a shard; `progress` receives the bytes of each block read.

    Raises:
        ShardError: the shard cannot be read, or has another size.
    """
    descriptor = open_shard(folder, name, size)
    digest = hashlib.sha256()
    try:
        while block := os.read(descriptor, _BLOCK):
            digest.update(block)
            progress(len(block))
    except OSError as error:
        raise ShardError(f"{printable(folder / name)} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def mark_verified(cache: Cache) -> None:
    """Record that the shards have just been written or verified."""
    _write_stamps(cache.folder, {shard.name: _stamp(cache.folder, shard) for shard in cache.shards})


_Stamp = list[Any]
"""SHA-256, size, inode, mtime and ctime in ns."""


def _write_stamps(folder: Path, stamps: dict[str, _Stamp | None]) -> None:
    # A file changed within the clock's resolution could change again and keep its times.
    latest = time.time_ns() - _SETTLED_NS
    settled = {name: stamp for name, stamp in stamps.items() if stamp is not None and max(stamp[3:]) < latest}
    write_cached(_stamps_file(folder), json.dumps(settled).encode())


def _stamp(folder: Path, shard: Shard) -> _Stamp | None:
    """Return what stays equal until somebody writes to the shard; None if it is missing."""
    try:
        status = (folder / shard.name).lstat()
    except OSError:
        return None
    return [shard.sha256, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _read_stamps(folder: Path) -> dict[str, _Stamp]:
    try:
        stamps = json.loads(read_regular_file(_stamps_file(folder), _MAX_STAMP_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _stamps_file(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_folder() / "verified" / f"{name}.json"


class _ByteCounter:
    """Counts the bytes that all threads have read."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()
        self.stopped = False
        """Set when the main thread was interrupted: threads end at their next block."""

    def add(self, count: int) -> None:
        if self.stopped:
            raise CancelledError
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)
