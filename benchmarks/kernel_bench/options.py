"""The options of a run on pytest's command line; `--help` lists them under "kernel benchmarks".

Without a GPU the defaults are small shapes and PyTorch's own code: they test the harness, not the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch

from kernel_bench.providers import COMPILE, COPY, EAGER, FASTNST, MAX_AUTOTUNE, PROVIDERS
from kernel_bench.session import DTYPES, LAYOUTS, Settings

SETTINGS = pytest.StashKey[Settings]()

_ON_GPU = (FASTNST, EAGER, COMPILE, MAX_AUTOTUNE, COPY)
_ON_CPU = (FASTNST, EAGER, COPY)  # compiling takes longer than the rest there: ask for it


def add(group: pytest.OptionGroup) -> None:
    add = group.addoption
    add("--kernel-batch", metavar="N,…", help="batch sizes; default: 4,16,32, on a CPU 2")
    add(
        "--kernel-providers",
        metavar="NAME,…",
        help=f"of {', '.join((*PROVIDERS, COPY))}; default: those that suit the device",
    )
    add("--kernel-dtype", choices=list(DTYPES), default="bf16", help="default: %(default)s")
    add("--kernel-layout", choices=list(LAYOUTS), default="channels_last", help="default: %(default)s")
    add("--kernel-sizes", choices=("full", "small"), help="default: full, on a CPU small")
    add("--kernel-rounds", type=int, metavar="COUNT", help="repetitions; default: 50, on a CPU 10")
    add(
        "--kernel-seconds",
        type=float,
        metavar="SECONDS",
        help="begin no further case after this long; default: no limit",
    )


def settings(config: pytest.Config) -> Settings:
    """The options, with defaults for the device.

    Raises:
        pytest.UsageError: an option makes no sense.
    """
    on_gpu = torch.cuda.is_available()
    chosen = config.getoption("kernel_providers")
    providers = tuple(chosen.split(",")) if chosen else _ON_GPU if on_gpu else _ON_CPU
    if unknown := [name for name in providers if name != COPY and name not in PROVIDERS]:
        raise pytest.UsageError(
            f"--kernel-providers: {unknown[0]!r} is unknown; known: {', '.join((*PROVIDERS, COPY))}"
        )
    batches = config.getoption("kernel_batch") or ("4,16,32" if on_gpu else "2")
    if not all(part.isdecimal() and int(part) > 0 for part in batches.split(",")):
        raise pytest.UsageError(f"--kernel-batch: {batches!r}; expected positive numbers such as 4,16")
    rounds = config.getoption("kernel_rounds")
    rounds = (50 if on_gpu else 10) if rounds is None else rounds
    if rounds < 1:
        raise pytest.UsageError(f"--kernel-rounds: {rounds}; expected at least 1")
    sizes = config.getoption("kernel_sizes") or ("full" if on_gpu else "small")
    return Settings(
        device=torch.device("cuda" if on_gpu else "cpu"),
        batches=tuple(int(part) for part in batches.split(",")),
        small=sizes == "small",
        dtype=config.getoption("kernel_dtype"),
        layout=config.getoption("kernel_layout"),
        providers=providers,
        rounds=rounds,
        warm_up=8 if on_gpu else 1,  # on a GPU the timer also learns in these rounds how far it must queue ahead
        seconds=config.getoption("kernel_seconds"),
        # pytest-benchmark measures nothing in parallel processes either.
        check_only=config.getoption("benchmark_disable") or "PYTEST_XDIST_WORKER" in os.environ,
    )
