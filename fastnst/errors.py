"""Errors that users can fix, each with its exit code; the command line prints them without a traceback.

A message names the given value, why it cannot be used, and the fix. What cannot happen is an `assert`.
"""

import signal

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
