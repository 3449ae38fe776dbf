"""Locks between processes: `flock`, which ends with its process, or a lock file where the file system has no locks.

A lock file (`.owner` is added to the lock's name) names the process and machine that hold it. If that process is gone
from this machine, killed even, the next one takes the lock over; of other machines nobody can know.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from fastnst.errors import UserError
from fastnst.storage.durability import UNSUPPORTED, say_lack
from fastnst.storage.files import LOCK_NAME, storage_error

_OWNER_SUFFIX = ".owner"
LOCK_NAMES = frozenset({LOCK_NAME, LOCK_NAME + _OWNER_SUFFIX})
"""What the lock of a folder leaves in it."""
_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}
# A lock file whose process is gone is removed in the first try; one cut short by a crash only after two seconds.
_LEAST_WAIT_S = 3.0


@contextlib.contextmanager
def lock_run(directory: Path) -> Iterator[None]:
    """Lock a run directory, one process at a time; the lock ends with the process, even if it is killed.

    Raises:
        UserError: another process holds the lock.
        DataError: the directory cannot be created or written.
    """
    path = directory / LOCK_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path, timeout=0)
    except Timeout as error:
        owner = _owner_file(path)
        known = f"; {owner} names it: remove that file if it ended on another machine" if owner.exists() else ""
        raise UserError(
            f"{directory} is in use by another fastnst process; wait for it to end or choose another --out{known}"
        ) from error
    except OSError as error:
        raise storage_error(directory, error) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def lock_file(path: Path, *, timeout: float = -1) -> Iterator[None]:
    """Hold the lock `path`, a file in an existing folder; it ends with the process, even if it is killed.

    Args:
        path: created if missing.
        timeout: seconds to wait for it; negative: for ever.

    Raises:
        filelock.Timeout: another process holds the lock.
        OSError: the file cannot be written.
    """
    lock = _acquire(path, timeout)
    try:
        yield
    finally:
        lock.release()


def _acquire(path: Path, timeout: float) -> BaseFileLock:
    lock: BaseFileLock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
            raise
        say_lack(path.parent, "lock files", error, f"{_owner_file(path).name} keeps other processes out")
        lock = SoftFileLock(_owner_file(path), timeout=timeout if timeout < 0 else max(timeout, _LEAST_WAIT_S))
        lock.acquire()
    return lock


def _owner_file(path: Path) -> Path:
    return path.with_name(path.name + _OWNER_SUFFIX)
