"""Read an image's file, and say why it cannot be used."""

import errno
import os
import stat
from pathlib import Path

from fastnst.storage import open_nonblocking

MAX_FILE_BYTES = 1 << 30


class UnusableImageError(Exception):
    """Why a file cannot be used as an image, and what to do. The caller adds the file's name."""


def read_bytes(path: Path | str) -> bytes:
    """Read a regular file; see `read_with_mtime`."""
    return read_with_mtime(path)[0]


def read_with_mtime(path: Path | str) -> tuple[bytes, int]:
    """Read a regular file; return its bytes and its modification time in ns.

    Raises:
        UnusableImageError: it is missing, unreadable, above 1 GiB, or not a regular file (a pipe would block).
    """
    try:
        # Unbuffered and with `fstat`, for speed: this runs for every image of every batch.
        with open(path, "rb", buffering=0, opener=open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnusableImageError("it is not a regular file; give an image's file")
            if status.st_size > MAX_FILE_BYTES:
                raise UnusableImageError(f"its {status.st_size / 2**30:.1f} GiB are above 1 GiB; store it smaller")
            return file.readall(), status.st_mtime_ns
    except OSError as error:
        raise UnusableImageError(explain_os_error(error)) from error


def check_size(width: int, height: int, min_side: int) -> None:
    """Raise UnusableImageError if the short side has fewer than `min_side` pixels."""
    if min(width, height) < min_side:
        raise UnusableImageError(f"{width} × {height} px is too small; the short side needs at least {min_side} px")


def printable(path: Path | str) -> str:
    """Return a path as text that can be encoded as UTF-8, with other bytes escaped."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def explain_os_error(error: OSError) -> str:
    """Return the operating system's message, with advice."""
    advice = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check its permissions",
        errno.EPERM: "check its permissions",
        errno.EISDIR: "give a file",
    }.get(error.errno or 0, "check the disk")
    return f"{(error.strerror or str(error)).lower()}; {advice}"
