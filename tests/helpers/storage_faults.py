"""Record the calls that write, sync, rename and remove files below a folder, and let one of them fail.

It patches the functions by which Python calls the operating system (`os.open`, `os.fsync`, `os.rename`, …, and the raw
files below `open`), so it sees every library's calls.
"""

import builtins
import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

REMOVALS = ("unlink", "rmdir")


@dataclass(frozen=True)
class Call:
    """One call below the watched folder."""

    name: str
    """`open`, `write`, `fsync`, `rename`, `mkdir`, `unlink` or `rmdir`."""
    path: str
    """Relative to the watched folder; a temporary name's random letters are left out."""
    target: str = ""
    """Of a rename."""


@dataclass
class StorageFaults:
    """Watch the folder `root`; call `fail_at` fails, or with `for_good` all from that one on.

    A write that fails has written half of its bytes.
    """

    root: Path
    fail_at: int | None = None
    code: int = 0
    for_good: bool = False
    calls: list[Call] = field(default_factory=list)
    failed: Call | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator["StorageFaults"]:
        """Watch within this block."""
        renames = {name: self._renaming(getattr(os, name)) for name in ("rename", "replace")}
        others = {name: self._calling(name, getattr(os, name)) for name in ("mkdir", "fsync", *REMOVALS)}
        with contextlib.ExitStack() as stack:
            for name, function in {**renames, **others, "open": self._os_open(os.open)}.items():
                stack.enter_context(mock.patch.object(os, name, function))
            opens = self._opening(io.open)
            stack.enter_context(mock.patch.object(io, "open", opens))
            stack.enter_context(mock.patch.object(builtins, "open", opens))
            yield self

    def hit(self, name: str, path: Any, target: Any = None, dir_fd: int | None = None) -> None:
        """Count a call, if it is one below the folder; raise if it is the one that is to fail."""
        inside = self._relative(path, dir_fd)
        if inside is None:
            return
        call = Call(name, inside, "" if target is None else self._relative(target, None) or str(target))
        self.calls.append(call)
        at = len(self.calls) - 1
        if self.fail_at is not None and (at == self.fail_at or (self.for_good and at > self.fail_at)):
            self.failed = self.failed or call
            raise OSError(self.code, os.strerror(self.code), str(path))

    def _relative(self, path: Any, dir_fd: int | None) -> str | None:
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        elif dir_fd is not None:
            path = Path(f"/proc/self/fd/{dir_fd}").readlink() / os.fsdecode(path)
        text = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        root = str(self.root)
        if text != root and not text.startswith(root + os.sep):
            return None
        return re.sub(r"\.[a-z0-9_]{8}\.part$", ".part", text[len(root) + 1 :])

    def _calling(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            self.hit(name, path, dir_fd=options.get("dir_fd"))
            return original(path, *arguments, **options)

        return call

    def _renaming(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def rename(source: Any, target: Any, **options: Any) -> None:
            self.hit("rename", source, target)
            original(source, target, **options)

        return rename

    def _os_open(self, original: Callable[..., int]) -> Callable[..., int]:
        def open_(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if flags & os.O_CREAT:
                self.hit("open", path)
            return original(path, flags, *arguments, **options)

        return open_

    def _opening(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def open_(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not set(mode) & set("wax+") or self._relative(file, None) is None:
                return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not isinstance(file, int) and opener is None:
                self.hit("open", file)
            raw = _RawFile(file, re.sub("[bt]", "", mode), closefd, opener)
            raw.layer = self
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return open_


class _RawFile(io.FileIO):
    layer: StorageFaults

    def write(self, data: Any) -> int:
        try:
            self.layer.hit("write", self.fileno())
        except OSError:
            super().write(bytes(data)[: len(data) // 2])
            raise
        return super().write(data)


def record_synced_sizes(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Return inode → size when it was last synced, filled by the calls of `os.fsync` from now on."""
    sizes: dict[int, int] = {}
    sync = os.fsync

    def record(descriptor: int) -> None:
        sync(descriptor)
        status = os.fstat(descriptor)
        sizes[status.st_ino] = status.st_size

    monkeypatch.setattr(os, "fsync", record)
    return sizes
