"""Every op of fastnst_kernels, forward and backward, for every provider: `pytest benchmarks/`.

    pytest benchmarks/ --benchmark-json kernels.json        then: python benchmarks/report.py kernels.json
    pytest benchmarks/ -k "instance_norm and 16x32x256"     one shape
    pytest benchmarks/ --benchmark-disable                  checks every provider and times none
    pytest benchmarks/ --help                               the options are under "kernel benchmarks"

One test is one provider in one direction. All selected ones of an op and shape are checked and timed together, in
turns, when the first of them runs; each then gives its own repetitions to pytest-benchmark. A provider with a wrong
result fails and has no row.
"""

from __future__ import annotations

import pytest
from kernel_bench import options
from kernel_bench.catalogue import OPS
from kernel_bench.session import OutOfTime, Session, extra_info
from kernel_bench.timing import Clock

_CLOCK = Clock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.stash[options.SETTINGS]
    rows = []
    for name, op in OPS.items():
        for shape in settings.shapes(op):
            case = f"{name}-{'x'.join(map(str, shape))}"
            mark = pytest.mark.xdist_group(case)
            rows += [
                pytest.param(name, shape, direction, provider, id=f"{case}-{direction}-{provider}", marks=mark)
                for direction in op.directions()
                for provider in settings.providers_of(op)
            ]
    metafunc.parametrize(("op", "shape", "direction", "provider"), rows)


def _selected(request: pytest.FixtureRequest, op: str, shape: tuple[int, ...]) -> set[tuple[str, str]]:
    """Provider and direction of all selected tests of this op and shape."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return {(p["provider"], p["direction"]) for p in parameters if p.get("op") == op and p.get("shape") == shape}


@pytest.mark.benchmark(timer=_CLOCK)
def test_kernel(benchmark, session: Session, request, op: str, shape, direction: str, provider: str) -> None:
    wanted = _selected(request, op, shape)
    try:
        outcome = session.outcome(OPS[op], shape, provider, direction, wanted)
    except OutOfTime as spent:
        pytest.skip(str(spent))
    if isinstance(outcome, Exception):
        raise outcome
    if outcome is None:
        return
    benchmark.group = f"{op} {list(shape)} {direction}"
    benchmark.extra_info.update(extra_info(session, OPS[op], shape, provider, direction, outcome))
    seconds = outcome.timing.seconds
    benchmark.pedantic(_CLOCK.replay(seconds), rounds=len(seconds))
