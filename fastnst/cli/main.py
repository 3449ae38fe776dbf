"""The command line: entry point, command groups, messages and errors.

torch and everything that needs it are imported inside the commands, so that `--help` is instant.
"""

import contextlib
import errno
import logging
import sys
import traceback
from collections.abc import Iterator

import click

from fastnst.cli import process
from fastnst.cli.data import data
from fastnst.cli.stylize import stylize
from fastnst.cli.tools import demo, doctor, tensorboard
from fastnst.cli.train import train
from fastnst.cli.visualize import visualize

_LONGEST_MESSAGE = 4000
_HELP = {"-h", "--help", "--version"}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def main() -> None:
    """Run a command; errors that users can mend become one message and an exit code, without traceback."""
    from fastnst.errors import StoppedBySignal, UserError
    from fastnst.training.signals import StopRequest

    closed = process.open_closed_streams()
    process.make_streams_encode_anything()
    if "stdout" in closed:
        _say("stdout is closed, so results are not shown")
    # From here on, not only while training: importing torch and checking a folder take long enough to be stopped.
    stop = StopRequest()
    try:
        with stop.installed():
            if not _HELP & set(sys.argv[1:]):
                process.check_working_directory()
                process.keep_compiled_code_elsewhere()
            cli.main(standalone_mode=False, obj=stop)
    except click.Abort:
        _fail("interrupted", 130)
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        sys.exit(error.exit_code)
    except (UserError, StoppedBySignal) as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except MemoryError:
        _fail("memory ran out; free some, raise the limit of this process or container, or use smaller images", 5)
    except BrokenPipeError:
        # The reader of stdout has gone (`fastnst … | head`): nothing is left to say, and nowhere to say it.
        process.give_up_stdout()
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        if traceback.extract_tb(error.__traceback__)[-1].filename == click.utils.__file__:
            process.give_up_stdout()
            _fail(f"cannot write the results to stdout: {error.strerror}; free some space there, or redirect it", 3)
        where = f" {error.filename}" if error.filename else ""
        _fail(f"the storage refuses{where}: {error.strerror}; free some space or choose another folder", 3)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="fastnst")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train feed-forward style-transfer networks, and see what they learn.

    Exit codes: 0 done, 2 usage, 3 bad data, weights or storage, 4 training diverged, 5 no device or memory,
    128+n stopped by signal n.
    """
    context.with_resource(_log_to_stderr())


for _command in (train, stylize, data, visualize, tensorboard, demo, doctor):
    cli.add_command(_command)


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Print what the package logs as plain lines on stderr, on rank 0 only."""
    from fastnst.errors import UserError
    from fastnst.training.distributed.environment import DistEnv

    try:
        rank = DistEnv.from_environ().rank
    except UserError:
        rank = 0  # the command says what is wrong
    logger, handler = logging.getLogger("fastnst"), _StderrHandler() if rank == 0 else logging.NullHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


def _fail(message: str, code: int) -> None:
    _say(f"fastnst: {message}")
    sys.exit(code)


def _say(message: str) -> None:
    # A terminal that is gone, or a full disk below stderr, must not end a run, nor change its exit code.
    with contextlib.suppress(OSError):
        click.echo(_harmless(message), err=True)


def _harmless(text: str) -> str:
    """Shorten a message and escape control characters, since parts of it may come from untrusted files."""
    short = text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 1] + "…"
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in short)
