"""Make files and the entries of folders durable, where the file system can do that.

Not all can: CIFS, gcsfuse, sshfs, drvfs and others refuse to sync folders, some to sync files. That costs what was
written just before a power cut, and no more, so it is said once and work goes on. A disk that fails or is full is
another matter: such errors are raised.
"""

import errno
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""How a file system answers that it lacks an operation."""
# A folder with write but no read permission cannot be opened, and some file systems open no folders.
_FOLDER_UNSUPPORTED = UNSUPPORTED | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}

_said: set[tuple[int, str]] = set()


def sync_descriptor(descriptor: int, path: Path) -> None:
    """Fsync an open file; `path` is its name in messages.

    Raises:
        OSError: the disk fails, is full or read-only.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        say_lack(path.parent, "make files durable", error, "what is written just before a power cut may be lost")


def sync_file(path: Path) -> None:
    """Fsync a file's content, whichever handle wrote it; raises OSError as `sync_descriptor` does."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_descriptor(descriptor, path)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that renames inside it are durable; raises OSError as `sync_descriptor` does."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _FOLDER_UNSUPPORTED:
            raise
        say_lack(folder, "make new names durable", error, "a power cut may undo the last files")


def say_lack(folder: Path, what: str, error: OSError, consequence: str) -> None:
    """Warn, once per file system, that it does not do `what`."""
    try:
        device = folder.stat().st_dev
    except OSError:
        device = 0
    if (device, what) not in _said:
        _said.add((device, what))
        log.warning(
            "the file system of %s does not %s (%s); going on: %s",
            *(folder, what, error.strerror or error, consequence),
        )
