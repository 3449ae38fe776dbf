"""What a process finds at its start, and may lack: standard streams, a working directory, a home folder.

Daemons, containers and batch systems start programs without them. Imports nothing heavy: this runs before all else.
"""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from fastnst.errors import DataError


def open_closed_streams() -> set[str]:
    """Open closed standard streams on `/dev/null`; return their names (`stdin`, `stdout`, `stderr`).

    Otherwise the next file that is opened would become stderr, and receive its messages.
    """
    closed = set()
    names = {"stdin": "r", "stdout": "w", "stderr": "w"}
    for descriptor, name in enumerate(names):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number, so it is this one; child processes inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            closed.add(name)
    for name, mode in names.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
            closed.add(name)
    return closed


def make_streams_encode_anything() -> None:
    """Escape what stdout and stderr cannot encode, instead of raising; bytes of file names stay as they are."""
    for stream in (sys.stdout, sys.stderr):
        # Tests and other programs put their own streams in place.
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None and stream.errors == "strict":
            is_unicode = stream.encoding.lower().replace("-", "") == "utf8"
            reconfigure(errors="surrogateescape" if is_unicode else "backslashreplace")


def check_working_directory() -> None:
    """Raise DataError if the working directory has been deleted: even with absolute paths, libraries crash there."""
    try:
        Path.cwd()
    except OSError as error:
        gone = isinstance(error, FileNotFoundError)
        what = "no longer exists" if gone else f"cannot be used ({error.strerror})"
        raise DataError(f"the working directory {what}; cd to another one and run the command again") from error


def keep_compiled_code_elsewhere() -> None:
    """Without a home folder that can be written, let Triton and PyTorch keep compiled code in a temporary folder.

    They would fail, or make a folder named `~`. It is removed at the end of this process.
    """
    from fastnst.storage.cache import home_folder

    variables = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    home = home_folder()
    if (home is not None and os.access(home, os.W_OK | os.X_OK)) or variables.keys() <= os.environ.keys():
        return
    # Without any temporary folder they say themselves what they lack, if they compile at all.
    with contextlib.suppress(OSError):
        folder = tempfile.mkdtemp(prefix="fastnst-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for variable, name in variables.items():
            os.environ.setdefault(variable, str(Path(folder, name)))


def give_up_stdout() -> None:
    """Drop what is waiting to be written to stdout: Python would try again at its end, and exit with another code."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is no file, but a test's
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
