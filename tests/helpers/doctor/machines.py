"""Probe results of a healthy machine and of others, for the tests of `fastnst doctor`."""

import copy
from typing import Any

from fastnst.doctor import CHECKS
from fastnst.doctor.report import Row, report
from fastnst.doctor.workers import Results

GIB = 2**30
SHA = "dc" * 32
H200 = {"name": "NVIDIA H200", "capability": [9, 0], "free": 139 * GIB, "total": 140 * GIB, "cooperative": True}
ABSENT = {"path": "/var/cache/fastnst/weights/vgg19.pth", "size": None, "sha256": None}
DAMAGED = ABSENT | {"size": 5740, "sha256": "0b" * 32}


def package(version: str | None, wanted: str, *, fits: bool = True, needed: bool = True) -> dict[str, Any]:
    return {"version": version, "wanted": wanted, "fits": fits, "needed": needed}


HEALTHY: dict[str, Any] = {
    "packages": {
        **{"python": "3.12.3", "implementation": "CPython", "requires_python": ">=3.11", "python_fits": True},
        **{"system": "Linux", "release": "6.8.0", "machine": "x86_64", "libc": "glibc 2.39", "fastnst": "0.1.0"},
        **{"triton": "3.7.1", "triton_pin": "==3.7.1", "triton_pairs": True},
        "packages": {
            "torch": package("2.13.0", ">=2.11"),
            "triton": package("3.7.1", ">=3.6"),
            "tensorboard": package("2.21.0", ">=2.17"),
            "nvidia-dali-cuda130": package("2.4.0", ">=2.0"),
            "pillow": package("13.0.0", ">=11.3"),
            "numpy": package("2.4.6", ">=1.26"),
        },
    },
    "torch": {"version": "2.13.0", "cuda": "13.0", "threads": 8},
    "triton": {},
    "tensorboard": {"version": "2.21.0", "server": "0.7.2"},
    "pillow": {"version": "13.0.0", "turbo": "3.2.0", "lacks": []},
    "dali": {"version": "2.4.0", "cpu": 0.3, "gpu": 0.6},
    "driver": {"pci": 1, "library": True, "version": "580.65.06", "cuda": [13, 0], "gpus": 1},
    "gpus": {"visible": None, "reason": None, "gpus": [H200]},
    "kernels": {"settings": {}, "gpus": 1, "implementation": "triton", "error": 2e-4, "interpreted": False},
    "jpeg_engines": [{"engines": 7, "cores": 0}],
    "host": {
        **{"memory": 128 * GIB, "available": 100 * GIB, "limit": None, "cores": 16, "usable": 16},
        **{"quota": None, "omp": None, "files": 1024, "files_hard": 4096},
    },
    "shared_memory": {"size": 64 * 2**20, "free": 64 * 2**20},
    "folders": {
        **{"here_free": 64 * GIB, "here_writable": True, "cache": "/var/cache/fastnst", "cache_exists": True},
        **{"cache_free": 64 * GIB, "cache_refused": None, "here_lacks": [], "cache_lacks": []},
    },
    "weights": {
        "files": [ABSENT | {"size": 5740, "sha256": SHA}, ABSENT | {"path": "/var/torch/vgg19.pth"}],
        **{"wanted": SHA, "size": 5740, "url": "https://example.org/vgg19.pth", "part": None},
    },
}
NO_GPU = {"visible": None, "reason": None, "gpus": []}
NO_DRIVER = {"pci": 0, "library": False}


def machine(**changes: Any) -> Results:
    """Return `HEALTHY` with changes: a dictionary is merged, `name__` replaces, a string is a probe's failure."""
    answers = copy.deepcopy(HEALTHY)
    failures = {}
    for name, change in changes.items():
        if isinstance(change, str):
            failures[name] = change
            del answers[name]
        elif name.endswith("__") or not isinstance(change, dict):
            answers[name.removesuffix("__")] = change
        else:
            answers[name] |= change
    return Results(answers, failures)


def with_package(name: str, **changes: Any) -> dict[str, Any]:
    """Return the changes of `machine` that change one package."""
    packages = copy.deepcopy(HEALTHY["packages"]["packages"])
    packages[name] |= changes
    return {"packages": {"packages": packages}}


def row_of(name: str, **changes: Any) -> Row:
    """Return the report's row `name` for a machine with these changes."""
    return next(row for row in report(machine(**changes), CHECKS).rows if row.name == name)


def assert_row(row: Row, status: str, found: str, fix: str) -> None:
    """Compare a row with the wanted status; `found` and `fix` are parts, separated by " … ", that it must contain."""
    assert row.status == status, row
    assert (row.fix is None) == (status == "PASS")
    assert [part for part in found.split(" … ") if part not in row.found] == []
    assert [part for part in fix.split(" … ") if part not in (row.fix or "")] == []
