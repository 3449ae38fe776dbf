"""Errors that users can fix, each with its exit code; the command line prints them without a traceback.

A message names the given value, why it cannot be used, and the fix. What cannot happen is an `assert`. A command in a
message can be pasted into a shell: its paths go through `shell_quote`.
"""

import os
import shlex
import signal
from pathlib import Path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that end work in good order; batch systems announce the end of a job by the last two."""


class UserError(ValueError):
    """An unusable option, configuration value or argument."""

    exit_code = 2


class DataError(UserError):
    """An unusable image, folder, weights file or model, or failing storage."""

    exit_code = 3


class DivergedError(UserError):
    """Training produced a NaN or Inf, or skipped too many steps in a row."""

    exit_code = 4


class DeviceError(UserError):
    """The requested device is missing, or its memory is too small."""

    exit_code = 5


class StoppedBySignal(BaseException):
    """Work ended early, in good order, because the process received `signum`.

    A BaseException: code that takes any `Exception` for a damaged image must not catch it.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def shell_quote(path: Path | str) -> str:
    """Return a path as one word of a shell's command line, whatever its name holds.

    A leading dash would be an option, so the path begins with `./` then. Bytes that are not UTF-8, and characters that
    a terminal does not show, are written as bash, ksh and zsh read them: `$'caf\\xe9'`.
    """
    text = str(path)
    if text.startswith("-"):
        text = f"./{text}"
    if all(char.isprintable() or char in "\n\t" for char in text):
        return shlex.quote(text)
    return "$'" + "".join(_escaped(char) for char in text) + "'"


def _escaped(char: str) -> str:
    if char.isprintable() and char not in "'\\":
        return char
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(char))
