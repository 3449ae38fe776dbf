"""Memory, CPU cores, shared memory, open files."""

import os
import resource
from pathlib import Path
from typing import Any

from fastnst.doctor.verdict import Verdict, failed, gib, passed, warned
from fastnst.doctor.workers import Results, format_error
from fastnst.memory import available_host_memory

_COMFORTABLE_MEMORY = 4 * 2**30
_LEAST_MEMORY = 2**30
"""Bytes: VGG19 while its file is read, and PyTorch."""
_FEW_FILES = 512
"""Sixteen loader processes, libraries, the log and a checkpoint need fewer."""


def probe_host(root: Path = Path("/")) -> dict[str, Any]:
    """Measure memory and cores, with the limits of the control group (containers); `root` holds `/proc` and `/sys`."""
    meminfo = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        meminfo[name] = int(value.split()[0]) * 1024
    groups = _control_groups(root)
    limits = [limit for group in groups if (limit := _memory_limit(group)) and limit < meminfo["MemTotal"]]
    quotas = [quota for group in groups if (quota := _cpu_quota(group))]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "memory": meminfo["MemTotal"],
        "available": available_host_memory(root),
        "limit": min(limits, default=None),
        "cores": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)),
        "quota": min(quotas, default=None),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "files": None if soft == resource.RLIM_INFINITY else soft,
        "files_hard": None if hard == resource.RLIM_INFINITY else hard,
    }


def probe_shared_memory() -> dict[str, Any]:
    """Try to make a lock shared by processes, a file in `/dev/shm`: the Pillow loader needs one."""
    import multiprocessing

    found: dict[str, Any] = {"size": None, "free": None}
    try:
        state = os.statvfs("/dev/shm")
        found |= {"size": state.f_frsize * state.f_blocks, "free": state.f_frsize * state.f_bavail}
        multiprocessing.get_context("spawn").Lock()
    except (OSError, ImportError) as error:
        found["broken"] = format_error(error)
    return found


def check_memory(results: Results) -> Verdict:
    host = results["host"]
    free, total = host["available"], f"{gib(host['memory'])}"
    if host["limit"] is not None:
        total = f"{gib(host['limit'])} (this control group's limit, of {total})"
    found = f"{gib(free)} of {total} available"
    fix = "end other programs, or give the container more; on a CPU, a small train.batch_size and data.image_size help"
    if free < _LEAST_MEMORY:
        return failed(found, fix)
    return warned(f"{found}: little", fix) if free < _COMFORTABLE_MEMORY else passed(found)


def check_cpu(results: Results) -> Verdict:
    host, threads = results["host"], results.get("torch").get("threads")
    found = f"{host['usable']} of {host['cores']} cores usable"
    share = float(host["usable"])
    if host["quota"] is not None and host["quota"] < share:
        share = host["quota"]
        found += f"; the control group grants {share:.3g}"
    if threads is not None:
        found += f"; torch uses {threads} thread{'s' if threads > 1 else ''}"
    if host["omp"] is not None:
        found += f" (OMP_NUM_THREADS={host['omp']})"
    if threads is not None and threads > max(1.0, share):
        best = max(1, int(share))
        return warned(f"{found}: too many, they wait for one another", f"set it:\n  export OMP_NUM_THREADS={best}")
    return passed(found)


def check_shared_memory(results: Results) -> Verdict:
    shared = results["shared_memory"]
    if "broken" in shared:
        return failed(
            f"processes cannot share a lock: {shared['broken']}",
            "train with --loader dali, or mount it (docker run --shm-size 64m …):\n"
            "  mount -t tmpfs -o mode=1777 tmpfs /dev/shm",
        )
    return passed(
        f"{gib(shared['size'])}, {gib(shared['free'])} free; loaders keep only locks there: any size suffices"
    )


def check_files(results: Results) -> Verdict:
    soft, hard = results["host"]["files"], results["host"]["files_hard"]
    found = f"{'any number' if soft is None else soft} per process"
    if soft is not None and soft < _FEW_FILES:
        most = _FEW_FILES if hard is None else min(hard, 4096)
        allowed = hard is None or hard >= _FEW_FILES
        return warned(
            f"{found}: few for many loading processes",
            f"raise it:\n  ulimit -n {max(most, _FEW_FILES)}" if allowed else "set data.workers to 4 or fewer",
        )
    return passed(found)


def _control_groups(root: Path) -> list[Path]:
    """Return the folders that may hold this process's limits, for cgroup v1 and v2."""
    base = root / "sys/fs/cgroup"
    folders = [base, base / "memory", base / "cpu"]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = base if not controllers else base / controllers
        own = top / path.lstrip("/")
        # The limits of enclosing groups apply, too.
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
    return list(dict.fromkeys(folders))


def _memory_limit(group: Path) -> int | None:
    return _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")


def _cpu_quota(group: Path) -> float | None:
    """Return the group's CPU quota in cores."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        allowed, each = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        return allowed / each if allowed and each and allowed > 0 else None
    return None if quota == "max" else int(quota) / int(period)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
