"""Hooks of the kernel benchmarks: options, header line, and the environment that their JSON carries."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_bench import options
from kernel_bench.environment import environment
from kernel_bench.session import Session

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add(parser.getgroup("kernels", "kernel benchmarks"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[options.SETTINGS] = options.settings(config)
    config.addinivalue_line("markers", "xdist_group(name): the tests of one op and shape share what they compile")
    # What pytest-benchmark has to remark at the end, when no row was measured, say, is no error of its own.
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")
    # Defaults of pytest-benchmark's table that suit what is measured here; what the command line says comes first.
    if config.getoption("benchmark_columns") is None:
        config.option.benchmark_columns = ["median", "iqr", "min", "max", "rounds"]
    if config.getoption("benchmark_name") == "normal":
        config.option.benchmark_name = "short"


def pytest_report_header(config: pytest.Config) -> list[str]:
    settings = config.stash[options.SETTINGS]
    facts = environment(settings.device)
    lines = [f"kernel benchmarks: {facts['device']}, {settings.dtype}, {settings.layout}, N = {settings.batches}"]
    if settings.device.type == "cpu":
        lines.append(
            "kernel benchmarks: NO GPU here, so this tries the harness only and says nothing about the kernels"
        )
    return lines


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    """The run: measures the ceiling first."""
    config = request.config
    config.stash[_SESSION] = Session(config.stash[options.SETTINGS])
    return config.stash[_SESSION]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A warning of torch's compiler must not cost a run its figures; it is shown at the end."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
        # Where a provider is refused there is nothing to time; its failure says so already.
        item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # whose machine it is belongs to nobody who reads the results
    machine_info["kernels"] = environment(config.stash[options.SETTINGS].device)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """The ceiling at the beginning and at the end: how far apart they are is how far to trust the rest."""
    session = config.stash.get(_SESSION, None)
    if session is not None and not session.settings.check_only:
        begin, end = session.ceiling / 1e9, session.copy_bandwidth() / 1e9
        output_json["copy_gb_per_s"] = [{"begin": begin, "end": end}]
