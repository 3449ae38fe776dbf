"""The kernel benchmarks' correctness check, timers and options."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_bench import correctness, options, timing
from kernel_bench.launches import count_launches
from kernel_bench.ops.catalogue import OPS
from kernel_bench.providers import PROVIDERS, Provider
from kernel_bench.session import Measurement, OutOfTime, Session, Settings

SMALL_NORM, SMALL_LAYER = (1, 16, 16, 16), (1, 32, 16, 16)
SMALL_IMAGE = (1, 3, 48, 48)
IMAGES = ("uint8", "output")  # prefixes of the ops of images
CPU = torch.device("cpu")


# Wrong results are not timed.


def _session(*providers: str, **changes: Any) -> Session:
    settings = {"device": CPU, "batches": (1,), "small": True, "providers": providers, "rounds": 2, "dtype": "fp32"}
    return Session(Settings(**{**settings, "check_only": True, **changes}))


def _outcome_of(monkeypatch: pytest.MonkeyPatch, op: str, function: Callable[..., Any], dtype: str = "fp32") -> Any:
    """The outcome of checking `function` as a provider of `op`; beside it, PyTorch must pass."""
    monkeypatch.setitem(PROVIDERS, "candidate", Provider("candidate", lambda _: function))
    session = _session("candidate", "eager", dtype=dtype)
    shape = SMALL_NORM if "norm" in op else SMALL_LAYER
    wanted = {("candidate", "forward"), ("eager", "forward")}
    assert session.outcome(OPS[op], shape, "eager", "forward", wanted) is None
    return session.outcome(OPS[op], shape, "candidate", "forward", wanted)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, dy: torch.Tensor) -> torch.Tensor:
        return 1.2 * dy


def _with_one_element(value: float) -> Callable[..., torch.Tensor]:
    def function(*tensors: torch.Tensor) -> torch.Tensor:
        y = OPS["instance_norm+relu+pad"].eager(*tensors)
        wrong = torch.zeros_like(y)
        wrong[0, 0, 0, 0] = value
        return y + wrong

    return function


@pytest.mark.parametrize(
    ("op", "function", "message"),
    [
        ("instance_norm+relu+pad", _with_one_element(0.5), "one element of the result errs"),
        ("instance_norm+relu+pad", _with_one_element(float("nan")), "the result errs by nan"),
        ("instance_norm", lambda x, w, b: OPS["instance_norm"].eager(_ScaledGradient.apply(x), w, b), "gradient of x"),
        ("instance_norm", lambda x, w, b: OPS["instance_norm"].eager(x, w, b + 0 * w + b.detach() - b), "of bias errs"),
        ("instance_norm", lambda x, w, b: OPS["instance_norm"].eager(x, w, b)[:, :, 1:], "has shape"),
        (
            "batch_norm_training",
            lambda x, w, b, m, v: OPS["batch_norm_training"].eager(x, w, b, m.clone(), v),
            "running_mean after the call errs",
        ),
        ("style_loss", lambda f, t: OPS["style_loss"].eager(f, t) * 1.001, "the result errs"),
        ("loss_relu_backward+content", lambda f, i, x, c: i + c.view(-1, 1, 1, 1) * (f - x), "the result errs"),
        ("max_unpool2d_switches", lambda y, s, i: OPS["max_unpool2d_switches"].eager(y, s, i ^ 1), "the result errs"),
    ],
)
def test_session_finds_wrong_results(
    monkeypatch: pytest.MonkeyPatch, op: str, function: Callable[..., Any], message: str
) -> None:
    outcome = _outcome_of(monkeypatch, op, function)
    assert isinstance(outcome, correctness.WrongResult), outcome
    assert message in str(outcome)


def test_session_keeps_a_failing_provider_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    outcome = _outcome_of(monkeypatch, "gram_matrix", broken)
    assert isinstance(outcome, RuntimeError)
    assert str(outcome) == "no such kernel"


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_session_finds_the_library_and_pytorch_right(op: str, dtype: str) -> None:
    """In the dtypes that the benchmark run below leaves out."""
    session = _session("fastnst", "eager", dtype=dtype, layout="contiguous")
    shape = SMALL_IMAGE if op.startswith(IMAGES) else SMALL_NORM if "norm" in op else SMALL_LAYER
    wanted = {("fastnst", "forward"), ("eager", "forward")}
    assert session.outcome(OPS[op], shape, "fastnst", "forward", wanted) is None
    assert session.outcome(OPS[op], shape, "eager", "forward", wanted) is None


def test_check_ignores_gradients_where_rounding_decides_on_the_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["batch_norm_inference+relu"]
    assert _outcome_of(monkeypatch, op.name, op.eager, "bf16") is None
    truth = torch.tensor([1.0, 2.0])
    shaped, actual = truth.view(1, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]])
    half_decided = correctness.Truth(shaped, {"x": shaped}, {}, torch.tensor([[[[False, True]]]]))
    correctness.check(half_decided, torch.bfloat16, shaped, {"x": actual}, {})
    with pytest.raises(correctness.WrongResult, match="gradient of x"):
        correctness.check(replace(half_decided, undecided=None), torch.bfloat16, shaped, {"x": actual}, {})


def test_session_begins_no_case_after_its_time_limit() -> None:
    session = _session("eager", seconds=0.0)
    with pytest.raises(OutOfTime, match="the 0 s for measuring were spent"):
        session.outcome(OPS["gram_matrix"], SMALL_LAYER, "eager", "forward", {("eager", "forward")})


def test_session_fails_every_provider_without_inputs() -> None:
    session = _session("eager", check_only=False)
    outcome = session.outcome(OPS["gram_matrix"], (1, -1, 4, 4), "eager", "forward", {("eager", "forward")})
    assert isinstance(outcome, RuntimeError)


# Timing.


def test_timing_percentiles_and_drift() -> None:
    times = timing.Timing([4.0, 1.0, 3.0, 2.0, 5.0])
    assert [times.percentile(p) for p in (0, 20, 50, 80, 100)] == [1.0, 1.8, 3.0, 4.2, 5.0]
    assert timing.Timing([1.0, 1.0, 9.0, 2.0, 2.0]).drift() == 2.0
    assert timing.Timing([1.0]).drift() == 1.0


def test_cpu_timer_takes_turns() -> None:
    rounds = [timing.turns(3, i) for i in range(3)]
    assert rounds == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    seen: list[str] = []
    contenders = [
        timing.Contender(lambda got: seen.append(f"call {got}"), lambda name=name: seen.append(name) or name)
        for name in "ab"
    ]
    timings = timing.CpuTimer().measure(contenders, rounds=2, warm_up=2)
    assert [len(t.seconds) for t in timings] == [2, 2]
    assert seen == ["a", "call a", "b", "call b", "b", "call b", "a", "call a"] * 2


def test_clock_replays_measured_times() -> None:
    clock = timing.Clock()
    play = clock.replay([0.5, 0.25])
    stamps = [clock()]
    for _ in range(2):
        play()
        stamps.append(clock())
    assert stamps == [0.0, 0.5, 0.75]


class _Device:
    """A GPU as a clock: the host takes time to queue work, the device takes it up in order."""

    def __init__(self) -> None:
        self.host = self.free = 0.0
        self.flushes = 0

    def queue(self, host: float, device: float) -> None:
        self.host += host
        self.free = max(self.free, self.host) + device

    def zero_(self) -> None:
        self.flushes += 1
        self.queue(5e-6, 60e-6)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.host, self.free))
        event.query = lambda: self.host >= event.at
        event.elapsed_time = lambda end: (end.at - event.at) * 1000
        return event


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[timing.CudaTimer, _Device]:
    device = _Device()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1 << 20))
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    timer = timing.CudaTimer(CPU)
    assert timer._buffer.numel() == 256 << 20
    timer._buffer = device
    return timer, device


def test_cuda_timer_excludes_launch_overhead(gpu: tuple[timing.CudaTimer, _Device]) -> None:
    """Both take the device 100 µs, but one takes the host 700 µs to queue, more than one flush hides."""
    timer, device = gpu
    slow_to_launch = timing.Contender(lambda _: device.queue(700e-6, 100e-6))
    quick = timing.Contender(lambda _: device.queue(5e-6, 100e-6), lambda: device.queue(5e-6, 3e-3))
    for times in timer.measure([slow_to_launch, quick], rounds=6, warm_up=2):
        assert times.seconds == pytest.approx([100e-6] * 6)
        assert not times.launch_overhead_included


def test_cuda_timer_marks_a_call_that_waits_for_the_device(gpu: tuple[timing.CudaTimer, _Device]) -> None:
    timer, device = gpu

    def waits(_: object) -> None:
        device.synchronize()
        device.queue(300e-6, 100e-6)

    (times,) = timer.measure([timing.Contender(waits)], rounds=2, warm_up=1)
    assert times.launch_overhead_included
    assert times.seconds == pytest.approx([400e-6] * 2)


def test_count_launches_counts_operand_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda x, *_, **__: x.add_(grid[0])

    module = ModuleType("fastnst_kernels.made_up")
    module.some_kernel = kernel = Kernel()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    x, y = torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)
    with count_launches() as traffic:
        module.some_kernel[(5,)](x, y, None, 7, BLOCK=16)
        module.some_kernel[(5,)](x, out=y)
    module.some_kernel[(5,)](x)
    assert (traffic.launches, traffic.operand_bytes) == (2, 2 * (12 + 4))
    assert x.tolist() == [15.0] * 3
    assert module.some_kernel is kernel


# The ops and options.


def test_catalogue_has_the_networks_shapes() -> None:
    norms = {(32, 256, 256), (64, 128, 128), (128, 64, 64)}
    layers = {(64, 256, 256), (128, 128, 128), (256, 64, 64), (512, 32, 32), (512, 16, 16)}
    for name, op in OPS.items():
        images = {(3, 256, 256)} if name.startswith(IMAGES) else None
        assert set(op.sizes) == (images or (norms if "norm" in name else layers))
    epilogues = {"", "+relu", "+residual", "+relu+pad", "+relu+up2+pad"}
    for norm in ("instance_norm", "batch_norm_training", "batch_norm_inference"):
        assert {name.removeprefix(norm) for name in OPS if name.startswith(norm)} == epilogues


def _options(**given: Any) -> Any:
    values = dict.fromkeys(("kernel_providers", "kernel_batch", "kernel_rounds", "kernel_sizes", "kernel_seconds"))
    values |= {"kernel_dtype": "bf16", "kernel_layout": "channels_last", "benchmark_disable": False} | given
    return options.settings(SimpleNamespace(getoption=values.__getitem__))


def test_options_default_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = _options()
    assert (on_cpu.device, on_cpu.batches, on_cpu.small) == (CPU, (2,), True)
    assert on_cpu.providers == ("fastnst", "eager", "copy")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = _options()
    assert (on_gpu.device.type, on_gpu.batches, on_gpu.small) == ("cuda", (4, 16, 32), False)
    assert on_gpu.providers == ("fastnst", "eager", "compile", "compile-max-autotune", "copy")
    assert "compile-max-autotune" in on_gpu.providers_of(OPS["gram_matrix"])
    assert "compile-max-autotune" not in on_gpu.providers_of(OPS["instance_norm"])


def test_options_refuse_nonsense() -> None:
    with pytest.raises(pytest.UsageError, match="'jax' is unknown; known: fastnst, eager, compile"):
        _options(kernel_providers="fastnst,jax")
    with pytest.raises(pytest.UsageError, match="'4,-1'; expected positive numbers such as 4,16"):
        _options(kernel_batch="4,-1")
    with pytest.raises(pytest.UsageError, match="0; expected at least 1"):
        _options(kernel_rounds=0)


def test_measurement_on_a_cpu_has_no_device_figures() -> None:
    """Neither a peak of device memory nor a count of launches."""
    session = _session("eager", "copy", check_only=False)
    wanted = {("eager", "forward"), ("copy", "forward")}
    outcome = session.outcome(OPS["gram_matrix"], SMALL_LAYER, "eager", "forward", wanted)
    assert isinstance(outcome, Measurement)
    assert (outcome.peak_bytes, outcome.launches, outcome.moved_bytes) == (None, None, None)
    assert len(outcome.timing.seconds) == 2
