"""Whether a cache's shards are as they were written: every byte the first time, then only what has changed since."""

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
    check_use,
    open_shard,
    read_cache,
)
from fastnst.data.sampler import Fit
from fastnst.errors import DataError
from fastnst.images import printable
from fastnst.storage import cache_folder, read_regular_file, write_atomic

_BLOCK = 1 << 20
_SETTLED_NS = 2 * 10**9
_LARGEST_NOTE = 1 << 24
_NAMED = 3


def open_cache(
    folder: Path, *, size: int, fit: Fit, progress: Callable[[int, int], None] | None = None
) -> CachedManifest:
    """The images of a cache that a run with this size and fit can read, its shards verified.

    Args:
        folder: see `is_cache`.
        size: `data.image_size`.
        fit: `data.fit`.
        progress: receives the bytes read and all that are to be read, again and again.

    Raises:
        DataError: it is unfinished, made for another size or fit, or damaged, with the command that helps.
    """
    cache = read_cache(folder)
    check_use(cache, size=size, fit=fit)
    damaged = verify(cache, progress=progress)
    if damaged:
        raise DataError(describe_damage(cache, damaged))
    return as_manifest(cache)


def describe_damage(cache: Cache, damaged: list[str]) -> str:
    """What `verify` found, and what to do."""
    more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
    return f"{'; '.join(damaged[:_NAMED])}{more}; {cache.remedy()}"


def verify(
    cache: Cache, *, known: bool = True, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """What is wrong with a cache's shards, one text for each that is missing or damaged.

    Args:
        cache: its manifest.
        known: do not read what this machine has verified, and whose size and times still stand. A disk that loses bits
            by itself changes no time.
        workers: threads that read.
        progress: receives the bytes read and all that are to be read, again and again.
    """
    # As they are before they are read: a change from here on is noticed the next time.
    notes = {shard.name: _note(cache.folder, shard) for shard in cache.shards}
    verified = _read_notes(cache.folder) if known else {}
    pending = [
        shard for shard in cache.shards if (note := notes[shard.name]) is None or verified.get(shard.name) != note
    ]
    if not pending:
        return []
    count = _Count(sum(shard.size for shard in pending), progress)

    def examine(shard: Shard) -> str | None:
        try:
            found = sha256_of_shard(cache.folder, shard.name, shard.size, count.add)
        except ShardError as error:
            return str(error)
        if found != shard.sha256:
            return f"{printable(cache.folder / shard.name)} is damaged: its SHA-256 is not that of the manifest"
        return None

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), thread_name_prefix="verify") as pool:
        try:
            outcomes = list(pool.map(examine, pending))
        except BaseException:
            count.stopped = True
            raise
    damaged = {shard.name for shard, outcome in zip(pending, outcomes, strict=True) if outcome is not None}
    _write_notes(cache.folder, {name: note for name, note in notes.items() if name not in damaged})
    return [outcome for outcome in outcomes if outcome is not None]


def sha256_of_shard(folder: Path, name: str, size: int, progress: Callable[[int], None]) -> str:
    """Hexadecimal SHA-256 of a shard; `progress` receives the number of bytes of each block read.

    Raises:
        ShardError: it cannot be read, or has another size.
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


def note_written(cache: Cache) -> None:
    """Remember that the shards were written or verified just now."""
    _write_notes(cache.folder, {shard.name: _note(cache.folder, shard) for shard in cache.shards})


def _write_notes(folder: Path, notes: "dict[str, _Note | None]") -> None:
    # A file that has changed this very moment could change again without another time, as far as clocks go.
    latest = time.time_ns() - _SETTLED_NS
    settled = {name: note for name, note in notes.items() if note is not None and max(note[3:]) < latest}
    try:
        write_atomic(_notes_file(folder), json.dumps(settled).encode())
    except DataError:
        # A full or read-only home folder costs the next start some time, and this one nothing.
        return


_Note = list[Any]
"""SHA-256, size, inode, and two times in ns."""


def _note(folder: Path, shard: Shard) -> _Note | None:
    """What stands as long as nobody writes to the shard; None if it is not there."""
    try:
        status = (folder / shard.name).lstat()
    except OSError:
        return None
    return [shard.sha256, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _read_notes(folder: Path) -> dict[str, _Note]:
    try:
        notes = json.loads(read_regular_file(_notes_file(folder), _LARGEST_NOTE))
    except (OSError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _notes_file(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_folder() / "verified" / f"{name}.json"


class _Count:
    """Bytes read by all threads."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()
        self.stopped = False
        """Whether the threads are to end, because the one that waits for them was interrupted."""

    def add(self, count: int) -> None:
        if self.stopped:
            raise CancelledError
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)
