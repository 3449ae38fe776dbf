"""Storage: files are whole or absent, errors say what to do, and a run directory has one owner."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from fastnst.errors import DataError, UserError
from fastnst.storage import (
    LOCK_NAME,
    cache_folder,
    lock_run,
    sha256_of,
    storage_error,
    sync_folder,
    write_atomic,
    write_json,
)


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


# Atomic writes.


def test_write_atomic_writes_bytes_and_by_a_function(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    write_atomic(path, b"first")
    assert path.read_bytes() == b"first"
    write_atomic(path, lambda file: file.write(b"") and None)
    assert path.read_bytes() == b""
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_write_atomic_leaves_the_old_file_if_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half of the new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_syncs_the_content_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        synced.append((name, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_atomic(path, b"data")
    (first, named_at_first), (second, named_at_second) = synced
    assert first.endswith(".part")
    assert not named_at_first
    assert (second, named_at_second) == (tmp_path.name, True)


def test_write_atomic_gives_the_permissions_of_open(tmp_path: Path, umask: int) -> None:
    write_atomic(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    mode = (tmp_path / "atomic").stat().st_mode
    assert mode == (tmp_path / "plain").stat().st_mode
    assert mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("name", ["n" * 255, "🎨" * 63], ids=["ASCII", "Unicode"])
def test_write_atomic_takes_names_as_long_as_the_file_system_allows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name  # at most 255 bytes
    write_atomic(path, b"data")
    assert path.read_bytes() == b"data"


def test_write_json_writes_readable_text(tmp_path: Path) -> None:
    value = {"reason": "größer als 1", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text("utf-8")
    assert json.loads(text) == value
    assert "größer" in text
    assert text.endswith("}\n")


# Storage that refuses.


def test_write_atomic_with_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError) as caught:
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device; free some space there, or choose another folder"
    )
    assert caught.value.exit_code == 3
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_with_a_file_or_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="a folder has that name; choose another name"):
        write_atomic(tmp_path / "folder", b"data")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "file").write_bytes(b"")
    for name in ("file/below", "file/below/it"):
        with pytest.raises(DataError, match=r"cannot write .*(a part of the path is a file|a file is in the way)"):
            write_atomic(tmp_path / name, b"data")


def test_storage_error_gives_advice() -> None:
    for code, advice in (
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "choose a folder you may write to"),
        (errno.EIO, "check the disk"),
    ):
        text = str(storage_error(Path("runs/wave"), OSError(code, os.strerror(code))))
        assert text.startswith(f"cannot write runs/wave: {os.strerror(code)}; ")
        assert advice in text


def test_sync_folder_refuses_files(tmp_path: Path) -> None:
    sync_folder(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        sync_folder(tmp_path / "file")


# Checksums and the cache.


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_of_a_file_reports_its_progress(tmp_path: Path, size: int) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "file").write_bytes(data)
    blocks: list[int] = []
    assert sha256_of(tmp_path / "file", blocks.append) == hashlib.sha256(data).hexdigest()
    assert sum(blocks) == size


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setenv("FASTNST_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("FASTNST_CACHE")
    assert cache_folder() == Path("/somewhere/fastnst")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "fastnst"


# The lock of a run directory.

HOLD = """
import sys
from pathlib import Path
from fastnst.storage import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `run`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_lock_run_refuses_a_second_process_until_the_first_ends(tmp_path: Path, owner: subprocess.Popen[str]) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"run is in use by another fastnst process; .* --out") as caught, lock_run(run):
        pass
    assert caught.value.exit_code == 2
    owner.communicate("")
    with lock_run(run):
        assert (run / LOCK_NAME).exists()


def test_lock_run_is_free_after_a_kill(tmp_path: Path, owner: subprocess.Popen[str]) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with lock_run(tmp_path / "run"):
        pass


def test_lock_run_where_the_directory_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot write"), lock_run(tmp_path / "file"):
        pass
