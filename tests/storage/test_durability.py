"""File systems that lack what ext4 has: work goes on and the lack is said once; a disk that fails ends it."""

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastnst.data.replacements import append_row
from fastnst.storage import (
    StorageError,
    durability,
    make_folder,
    remove_leftovers,
    sync_file,
    sync_folder,
    write_atomic,
)
from fastnst.storage.files import open_nonblocking
from fastnst.training.run_dir.checkpoint import checkpoint_steps, latest_checkpoint, save_checkpoint

LACKING = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
FAILING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def refuse(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "_said", set())


def fail_fsync(monkeypatch: pytest.MonkeyPatch, code: int, wanted: Callable[[int], bool]) -> None:
    def fsync(descriptor: int) -> None:
        if wanted(os.fstat(descriptor).st_mode):
            raise refuse(code)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", LACKING)
def test_write_atomic_goes_on_where_files_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    fail_fsync(monkeypatch, code, stat.S_ISREG)
    for number in range(3):
        write_atomic(tmp_path / f"{number}", b"data")
        append_row(tmp_path / "rows", "row\n")
        sync_file(tmp_path / f"{number}")
    assert (tmp_path / "2").read_bytes() == b"data"
    (message,) = caplog.messages
    assert message.startswith(f"the file system of {tmp_path} does not make files durable ({os.strerror(code)}); going")


@pytest.mark.parametrize("code", [*LACKING, errno.EBADF, errno.EACCES, errno.EPERM])
def test_write_atomic_goes_on_where_folders_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    fail_fsync(monkeypatch, code, stat.S_ISDIR)
    for number in range(3):
        write_atomic(tmp_path / f"{number}", b"data")
    make_folder(tmp_path / "a" / "b")
    (message,) = caplog.messages
    assert "does not make new names durable" in message


@pytest.mark.parametrize("code", FAILING)
@pytest.mark.parametrize("wanted", [stat.S_ISREG, stat.S_ISDIR])
def test_write_atomic_ends_where_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, wanted: Callable[[int], bool]
) -> None:
    fail_fsync(monkeypatch, code, wanted)
    with pytest.raises(StorageError, match=os.strerror(code)):
        write_atomic(tmp_path / "file", b"data")
    with pytest.raises(OSError, match=os.strerror(code)):
        sync_folder(tmp_path) if wanted is stat.S_ISDIR else append_row(tmp_path / "rows", "row\n")


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_write_atomic_needs_no_change_of_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise refuse(code)

    for name in ("fchmod", "chmod", "utime", "link"):
        monkeypatch.setattr(os, name, unsupported)
    write_atomic(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def refuse_taken_names(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Rename to free names only, like sshfs."""
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def to_free_names(source: object, target: object, original: Callable[..., None] = original) -> None:
            if os.path.lexists(os.fspath(target)):  # type: ignore[call-overload]
                raise refuse(code)
            original(source, target)

        monkeypatch.setattr(os, name, to_free_names)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EEXIST])
def test_write_atomic_replaces_where_only_free_names_are_renamed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse_taken_names(monkeypatch, code)
    for data in (b"old", b"new", b"newer"):
        write_atomic(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_write_atomic_keeps_the_old_file_if_the_new_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "file", b"old")
    rename = os.rename

    def refuse_new(source: object, target: object) -> None:
        if Path(str(source)).read_bytes() == b"new":
            raise refuse(errno.EPERM)
        rename(source, target)  # type: ignore[arg-type]

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refuse_new)
    with pytest.raises(StorageError, match="not permitted"):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_remove_leftovers_gives_a_file_moved_aside_its_name_back(tmp_path: Path) -> None:
    (tmp_path / ".file.replaced.part").write_bytes(b"old")
    (tmp_path / ".file.0123abcd.part").write_bytes(b"new")
    remove_leftovers(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EMFILE])
def test_save_checkpoint_where_folders_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As on gcsfuse."""
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def files_only(source: object, target: object, original: Callable[..., None] = original) -> None:
            if Path(str(source)).is_dir():
                raise refuse(code)
            original(source, target)

        monkeypatch.setattr(os, name, files_only)
    for step, value in ((1, 1.0), (2, 2.0), (2, 3.0)):
        save_checkpoint(tmp_path, step, tensors={"w": torch.full((2,), value)}, state={}, keep=1)
        checkpoint = latest_checkpoint(tmp_path)
        assert checkpoint is not None
        assert (checkpoint.step, checkpoint.tensors["w"].tolist()) == (step, [value] * 2)
    assert checkpoint_steps(tmp_path) == [2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EAGAIN])
def test_open_nonblocking_goes_without_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A file that Samba has leased answers EAGAIN."""
    (tmp_path / "file").write_bytes(b"data")
    os.mkfifo(tmp_path / "pipe")
    original = os.open

    def without_flag(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_NONBLOCK:
            raise refuse(code)
        return original(path, flags, *mode)

    monkeypatch.setattr(os, "open", without_flag)
    descriptor = open_nonblocking(str(tmp_path / "file"), os.O_RDONLY)
    assert os.read(descriptor, 9) == b"data"
    os.close(descriptor)
    with pytest.raises(OSError, match=os.strerror(code)):
        open_nonblocking(str(tmp_path / "pipe"), os.O_RDONLY)


def test_build_cache_goes_on_where_free_space_is_unknown(
    tmp_path: Path, generated_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastnst.data.cache.build import build_cache
    from fastnst.data.manifest import build_manifest

    def unknown(_: object) -> None:
        raise refuse(errno.ENOSYS)

    monkeypatch.setattr(shutil, "disk_usage", unknown)
    manifest = build_manifest(generated_photos, allow_uniform=False)
    assert build_cache(manifest, tmp_path / "cache", size=32, fit="squash").cache.images
