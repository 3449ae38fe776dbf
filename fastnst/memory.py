"""How much memory this process may still use, on a GPU or a CPU."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def available_memory(device: "torch.device", root: Path = Path("/")) -> int:
    """Return the bytes that this process may allocate, beside what it uses already.

    On a GPU: free memory, and what PyTorch has reserved without using it. On a CPU: the least of `MemAvailable` and of
    what is left of the limits of control groups (containers, batch systems), `ulimit -v` and `ulimit -d`.

    Args:
        device: cuda or cpu.
        root: parent of `proc` and `sys`.
    """
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_host_memory(root)


def available_host_memory(root: Path = Path("/")) -> int:
    """Return the bytes of the machine's memory that this process may still allocate; see `available_memory`."""
    page = resource.getpagesize()
    bounds = [*_system_available(root), *_cgroups_available(root)] or [os.sysconf("SC_PHYS_PAGES") * page]
    statm = _read(root / "proc/self/statm").split()
    for kind, column in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            bounds.append(limit - (int(statm[column]) * page if statm else 0))
    return max(0, min(bounds))


class MemoryBudget:
    """Bytes that threads share: who needs more than is left waits for the others.

    Args:
        total: bytes; one thread alone may exceed them.
    """

    def __init__(self, total: int) -> None:
        self.total, self._used, self._changed = total, 0, threading.Condition()

    @contextlib.contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Hold `count` bytes; do not nest, a thread would wait for itself."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + count <= self.total)
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()


def _system_available(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _cgroups_available(root: Path) -> Iterator[int]:
    """Yield what is left of the limits of this process's control group and its parents; cgroup v1 and v2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, limits, usage = root / "sys/fs/cgroup", ["memory.max", "memory.high"], "memory.current"
            counts = ("inactive_file", "active_file", "file_mapped")
        elif "memory" in controllers.split(","):
            top, limits, usage = root / "sys/fs/cgroup/memory", ["memory.limit_in_bytes"], "memory.usage_in_bytes"
            counts = ("total_inactive_file", "total_active_file", "total_mapped_file")
        else:
            continue
        # In a container `path` may be the host's, and only `top` exists.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            for limit in limits:
                yield from _cgroup_available(folder, limit, usage, counts)
            if folder == top:
                break


def _cgroup_available(folder: Path, limit_name: str, usage_name: str, names: tuple[str, str, str]) -> Iterator[int]:
    limit, usage = _read(folder / limit_name).strip(), _read(folder / usage_name).strip()
    if limit.isdecimal() and usage.isdecimal():
        counts = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines())
        inactive, active, mapped = (int(counts.get(name, 0)) for name in names)
        # The kernel reclaims files' pages before an allocation fails; those of running code would return at once.
        yield int(limit) - int(usage) + inactive + max(0, active - mapped)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
