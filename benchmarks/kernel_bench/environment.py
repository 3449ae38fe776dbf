"""The conditions of a measurement: machine, versions, revision of the code, date."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastnst_kernels import runtime

ROOT = Path(__file__).resolve().parents[2]


@cache
def environment(device: torch.device) -> dict[str, Any]:
    """Names and versions that are stored with every measurement."""
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "device": properties.name if properties else _processor(),
        "device_type": device.type,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "l2_bytes": properties.L2_cache_size if properties else None,
        "compute_capability": f"{properties.major}.{properties.minor}" if properties else None,
        "driver": _query("driver_version") if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": runtime.triton.__version__ if runtime.triton is not None else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "revision": revision(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def revision() -> str:
    """The commit that is checked out, `FASTNST_REVISION` if the tree has no history, or `unknown`."""
    if given := os.environ.get("FASTNST_REVISION"):
        return given
    # A tree without its own history may be inside another project's.
    if _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel") != str(ROOT):
        return "unknown"
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}, changed" if changed else commit


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _query(field: str) -> str:
    answer = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else "unknown"


def _output(*command: str) -> str:
    """The output of a command, or nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    print(json.dumps(environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")), indent=1))
