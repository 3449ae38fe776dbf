"""How much memory this process may still use, on a GPU or a CPU."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LARGEST_IMAGE_BYTES = 2**30
"""What decoding an image of `fastnst.images.MAX_PIXELS` takes."""


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


def decoding_threads() -> int:
    """Return how many threads or processes may decode images at a time: one per core, if the largest images fit."""
    return max(1, min(len(os.sched_getaffinity(0)), available_host_memory() // _LARGEST_IMAGE_BYTES))


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
