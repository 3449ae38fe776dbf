"""Locks where the file system has none: a lock file that names its process keeps others out, until that is gone."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastnst.errors import DataError, UserError
from fastnst.storage import LOCK_NAMES, durability, is_leftover, lock_file, lock_run
from fastnst.training.run_dir.layout import validate_run_dir

WITHOUT_FLOCK = """
import errno, fcntl, os, sys
from pathlib import Path

def flock(descriptor, operation):
    raise OSError(int(sys.argv[2]), os.strerror(int(sys.argv[2])))

fcntl.flock = flock
from fastnst.storage import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
CODES = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def without_flock(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(_: int, __: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(durability, "_said", set())
    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `run` without flock."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WITHOUT_FLOCK, str(tmp_path / "run"), str(errno.ENOLCK)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("code", CODES)
def test_lock_run_goes_on_without_flock_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    without_flock(monkeypatch, code)
    for _ in range(2):
        with lock_run(tmp_path / "run"):
            assert {path.name for path in (tmp_path / "run").iterdir()} <= LOCK_NAMES
        with lock_file(tmp_path / "weights.lock"):
            pass
    (message,) = caplog.messages
    assert f"does not lock files ({os.strerror(code)}); going on: .lock.owner keeps other processes out" in message
    assert not (tmp_path / "run" / ".lock.owner").exists()


def test_lock_run_ends_where_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch, errno.EIO)
    with pytest.raises(DataError, match="Input/output error"), lock_run(tmp_path / "run"):
        pass


def test_lock_run_without_flock_refuses_a_second_process_until_the_first_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: subprocess.Popen[str]
) -> None:
    without_flock(monkeypatch, errno.ENOLCK)
    monkeypatch.setattr("fastnst.storage.locks._LEAST_WAIT_S", 0.2)
    refused = pytest.raises(UserError, match=r"in use by another fastnst process; .*\.lock\.owner names it")
    with refused as caught, lock_run(tmp_path / "run"):
        pass
    assert caught.value.exit_code == 2
    owner.communicate("")
    with lock_run(tmp_path / "run"):
        pass


def test_lock_run_without_flock_is_free_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: subprocess.Popen[str]
) -> None:
    without_flock(monkeypatch, errno.ENOLCK)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (tmp_path / "run" / ".lock.owner").exists()
    # What the killed process leaves does not make the folder one of somebody else.
    from fastnst.config import load_config

    assert validate_run_dir(tmp_path / "run", load_config(environment={}), resume=False) == []
    with lock_run(tmp_path / "run"):
        pass


def test_is_leftover_knows_what_taking_a_lock_over_leaves() -> None:
    assert is_leftover(".lock.owner.break.123.0f")
    assert is_leftover(".config.toml.0123abcd.part")
    assert not is_leftover("notes.part")
    assert not is_leftover(".locket")
