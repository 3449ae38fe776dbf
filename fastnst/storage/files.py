"""Write files atomically, read regular files, and explain what went wrong."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fastnst.errors import DataError, UserError
from fastnst.storage.durability import UNSUPPORTED, say_lack, sync_descriptor, sync_folder

LOCK_NAME = ".lock"
_TEMPORARY_SUFFIX = ".part"
_NO_REPLACEMENT = UNSUPPORTED | {errno.EEXIST, errno.EPERM, errno.EACCES}
"""How file systems answer (sshfs, some SMB servers) that they rename to free names only."""


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
        temporary = path.with_name(f"{_temporary_prefix(path)}{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")
        # The mode is that of any new file, given when it is made: not every file system can change it later.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            sync_descriptor(file.fileno(), path)
        if may_replace is None:
            _replace(temporary, path)
        elif not _rename_new(temporary, path):
            if not may_replace(path):
                raise ForeignFileError(path)
            _replace(temporary, path)
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
        if (aside := _aside(path)).exists() and not path.exists():
            aside.rename(path)
        for leftover in path.parent.glob(f"{glob.escape(_temporary_prefix(path))}*{_TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Return whether killed processes leave such a name: that of a temporary file, or of a lock taken over."""
    return name.startswith(".") and (name.endswith(_TEMPORARY_SUFFIX) or name.startswith(f"{LOCK_NAME}.owner."))


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents durably; raises OSError."""
    for new in reversed([folder, *folder.parents]):
        if not new.exists():
            new.mkdir(exist_ok=True)
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
    with open(path, "rb", opener=open_nonblocking) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"its {status.st_size:,} bytes are above {limit:,}")
        return file.read(limit)


def open_nonblocking(path: str, flags: int) -> int:
    """Opener for `open` that does not block on a pipe."""
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # Some file systems do not know the flag, and a file with a lease (Samba's) answers EAGAIN.
        if error.errno not in UNSUPPORTED | {errno.EAGAIN} or not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            raise
        return os.open(path, flags | os.O_CLOEXEC)


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
        errno.ENAMETOOLONG: "choose a shorter name",
    }.get(error.errno or 0, "check the disk, or choose another folder")
    return StorageError(f"cannot write {path}: {error.strerror or error}; {advice}")


def _replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; where the file system renames to free names only, move the old file aside first."""
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _NO_REPLACEMENT or not path.is_file():
            raise
        aside = _aside(path)
        try:
            path.rename(aside)
        except OSError:
            raise error from None
        try:
            temporary.rename(path)
        except OSError:
            aside.rename(path)
            raise
        # `remove_leftovers` does it later.
        with contextlib.suppress(OSError):
            aside.unlink()
        say_lack(path.parent, "replace a file in one step", error, "a crash in between may leave the old one hidden")


def _aside(path: Path) -> Path:
    return path.with_name(f"{_temporary_prefix(path)}replaced{_TEMPORARY_SUFFIX}")


def _rename_new(temporary: Path, path: Path) -> bool:
    """Give a file its name; return False if that is taken, even since a moment ago."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError:  # A file system without hard links.
        if os.path.lexists(path):
            return False
        temporary.rename(path)
    return True


def _temporary_prefix(path: Path) -> str:
    return f".{path.name[:32]}."
