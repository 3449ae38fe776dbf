"""Atomic writes, checksums, the cache folder, and the lock of a run directory."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from fastnst.errors import DataError, UserError

LOCK_NAME = ".lock"
_TEMPORARY_SUFFIX = ".part"


class StorageError(DataError):
    """Writing failed: no space, read-only, a broken disk."""


class ForeignFileError(UserError):
    """Files that fastnst did not write are in the way of results, and are kept."""

    def __init__(self, path: Path, more: int = 0) -> None:
        others, them = (f" and {more} more files exist", "them") if more else (" exists", "it")
        super().__init__(
            f"{path}{others}, and fastnst did not write {them}; choose another --out, or give --overwrite to replace "
            f"{them}"
        )


def cache_folder() -> Path:
    """Return `$FASTNST_CACHE`, else `$XDG_CACHE_HOME/fastnst`, else `~/.cache/fastnst`."""
    if own := os.environ.get("FASTNST_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastnst"


def write_atomic(
    path: Path, content: bytes | Callable[[BinaryIO], None], *, may_replace: Callable[[Path], bool] | None = None
) -> None:
    """Write a file so that readers, and crashes at any moment, leave the old content or the new, never a part.

    Writes and fsyncs a temporary file in the same folder, renames it, and fsyncs the folder.

    Args:
        path: the file; its folder is created if missing.
        content: the bytes, or a function that writes them into the given open file.
        may_replace: asked right before the file gets its name, whether one of that name may be replaced; None: yes.

    Raises:
        ForeignFileError: a file exists that may not be replaced.
        StorageError: no space, read-only, no permission. The old file is intact, or, if only the last fsync failed, the
            new one is complete.
    """
    try:
        make_folder(path.parent)
        descriptor, name = tempfile.mkstemp(_TEMPORARY_SUFFIX, _temporary_prefix(path), path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        if may_replace is None or (os.path.lexists(path) and may_replace(path)):
            temporary.replace(path)
        else:
            _rename_new(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        # On failure `remove_leftovers` does it later; the first error is the one to report.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of processes killed in `write_atomic(path, …)`; only for the single writer of `path`."""
    with contextlib.suppress(OSError):
        for leftover in path.parent.glob(f"{glob.escape(_temporary_prefix(path))}*{_TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Return whether `write_atomic` names its temporary files like this."""
    return name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents durably; raises OSError."""
    for new in reversed([folder, *folder.parents]):
        if not new.exists():
            new.mkdir(exist_ok=True)
            # A folder with write but no read permission cannot be fsynced.
            with contextlib.suppress(PermissionError):
                sync_folder(new.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def check_folder(folder: Path) -> None:
    """Raise StorageError if files could not be written into `folder`, or if it could not be created; writes nothing."""
    try:
        nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            code = errno.EACCES if nearest.is_dir() else errno.ENOTDIR
            raise storage_error(folder, OSError(code, os.strerror(code)))
    except OSError as error:
        raise storage_error(folder, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_regular_file(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is larger, or is not a regular file: a pipe would block, a device never end.
        ValueError: the path contains a null character.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"its {status.st_size:,} bytes are above {limit:,}")
        return file.read(limit)


def sync_file(path: Path) -> None:
    """Fsync a file's content, whichever handle wrote it."""
    _fsync(path, os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that renames inside it are durable."""
    _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the hexadecimal SHA-256 of a file; `progress` receives the size of each block read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return a StorageError for `error`, raised while writing `path`, with advice."""
    advice = {
        errno.ENOSPC: "free some space there, or choose another folder",
        errno.EDQUOT: "the disk quota is used up; free some space there, or choose another folder",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to",
        errno.ENOTDIR: "a part of the path is a file; choose another folder",
        errno.EEXIST: "a file is in the way; choose another folder",
        errno.EISDIR: "a folder has that name; choose another name",
    }.get(error.errno or 0, "check the disk, or choose another folder")
    return StorageError(f"cannot write {path}: {error.strerror or error}; {advice}")


@contextlib.contextmanager
def lock_run(directory: Path) -> Iterator[None]:
    """Lock a run directory, one process at a time; the lock ends with the process, even if it is killed.

    Raises:
        UserError: another process holds the lock.
        DataError: the directory cannot be created or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK_NAME, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{directory} is in use by another fastnst process; wait for it to end or choose another --out"
        ) from error
    except OSError as error:
        raise storage_error(directory, error) from error
    try:
        yield
    finally:
        lock.release()


def _rename_new(temporary: Path, path: Path) -> None:
    """Give a file its name; raise ForeignFileError if that is taken, even since a moment ago."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError as error:
        raise ForeignFileError(path) from error
    except OSError as error:  # A file system without hard links.
        if os.path.lexists(path):
            raise ForeignFileError(path) from error
        temporary.replace(path)


def _temporary_prefix(path: Path) -> str:
    return f".{path.name[:32]}."


def _umask() -> int:
    # No call only reads it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
