"""Errors that users cause and can mend, each with the exit code of the command line.

A message names what was given, why it cannot be used and what to do; the command line prints it without a traceback.
Whatever "cannot happen" is an `assert` instead.
"""


class UserError(ValueError):
    """An option, a configuration value or an argument that cannot be used."""

    exit_code = 2


class DataError(UserError):
    """An image, a folder, a weights file, a model or the storage beneath them cannot be used."""

    exit_code = 3


class DivergedError(UserError):
    """Training produced a value that is not finite, or skipped too many steps in a row."""

    exit_code = 4


class DeviceError(UserError):
    """The device that was asked for is missing, or its memory is too small."""

    exit_code = 5


class StoppedBySignal(BaseException):
    """Work ended early, in good order, because the process received `signum`.

    It may be raised wherever the program stands, also where any `Exception` is taken for a damaged image.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
