"""Measure an op at a shape: draw inputs, check every provider, time those that are right, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from kernel_bench import correctness
from kernel_bench.environment import environment
from kernel_bench.launches import count_launches
from kernel_bench.ops import BACKWARD, FORWARD, Draw, Inputs, Op, Shape
from kernel_bench.providers import COPY, PROVIDERS, Function
from kernel_bench.timing import Contender, Timing, timer_for

_PROFILING_SECONDS = 15.0  # of one run; counting launches must not take the time of measurements

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the defaults depend on whether there is a GPU (`options.py`)."""

    device: torch.device
    batches: tuple[int, ...]
    small: bool
    dtype: str = "bf16"
    layout: str = "channels_last"
    providers: tuple[str, ...] = ("fastnst", "eager", COPY)
    rounds: int = 30
    warm_up: int = 1
    seconds: float | None = None
    check_only: bool = False

    def shapes(self, op: Op) -> list[Shape]:
        sizes = op.small_sizes if self.small else op.sizes
        return [(n, *size) for n in self.batches for size in sizes]

    def providers_of(self, op: Op) -> list[str]:
        return [name for name in self.providers if name == COPY or PROVIDERS[name].suits(op)]


@dataclass(frozen=True)
class Measurement:
    """One provider in one direction.

    Attributes:
        timing: the repetitions.
        peak_bytes: the most memory allocated during the call; None on a CPU.
        launches: of kernels and copies, from the profiler; None if it cannot see the device or had no time left.
        moved_bytes: by the library's launches, if each reads or writes each of its tensors once; else None.
    """

    timing: Timing
    peak_bytes: int | None
    launches: int | None
    moved_bytes: int | None


Outcome = Measurement | Exception | None  # None: correct, not timed


class OutOfTime(Exception):
    """The run's time limit passed before this case began."""


class Session:
    """One run. Holds the results of one case at a time: the tests of a case run one after another."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._timer = timer_for(settings.device)
        self._began = time.monotonic()
        self.timer_overhead = 0.0 if settings.check_only else self._timer.overhead()
        self.ceiling = 0.0 if settings.check_only else self.copy_bandwidth()
        self._profiled = 0.0
        self._case: tuple[str, Shape] | None = None
        self._outcomes: dict[tuple[str, str], Outcome] = {}

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy far larger than the caches: the ceiling."""
        half = 1 << (30 if self.settings.device.type == "cuda" else 25)
        timing = self._timer.measure([self._copy(2 * half)], 20, 5)[0]
        return 2 * half / timing.percentile(50)

    def outcome(self, op: Op, shape: Shape, provider: str, direction: str, wanted: set[tuple[str, str]]) -> Outcome:
        """The measurement of one provider and direction, or the error.

        Args:
            op: what is timed.
            shape: of its input.
            provider: to return.
            direction: forward, backward or both.
            wanted: all selected pairs of provider and direction; they are measured together.

        Raises:
            OutOfTime: this case has not begun, and the time limit has passed.
        """
        if self._case != (op.name, shape):
            limit = self.settings.seconds
            if limit is not None and time.monotonic() - self._began > limit:
                raise OutOfTime(f"the {limit:.0f} s for measuring were spent before this case began")
            self._case = (op.name, shape)
            try:
                self._outcomes = self._measure(op, shape, wanted)
            except Exception as fault:  # too little memory, for example; the next case may still run
                self._outcomes = dict.fromkeys(wanted, fault)
        return self._outcomes[provider, direction]

    def _measure(self, op: Op, shape: Shape, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], Outcome]:
        dtype = DTYPES[self.settings.dtype]
        draw = Draw(self.settings.device, dtype, LAYOUTS[self.settings.layout])
        inputs = op.inputs(draw, shape)
        names = [name for name in self.settings.providers_of(op) if name != COPY and name in {p for p, _ in wanted}]
        right, outcomes = self._checked(op, inputs, shape, draw, names, wanted)
        if self.settings.check_only:
            return dict.fromkeys(wanted) | outcomes
        for direction in op.directions():
            calls = {
                name: _contender(function, inputs, dy, direction)
                for name, (function, dy) in right.items()
                if (name, direction) in wanted
            }
            if (COPY, direction) in wanted:
                calls[COPY] = self._copy(op.cost(shape, dtype, direction).minimum_bytes)
            if not calls:
                continue
            timings = self._timer.measure(list(calls.values()), self.settings.rounds, self.settings.warm_up)
            for (name, contender), timing in zip(calls.items(), timings, strict=True):
                peak, launches = self._memory_and_launches(contender)
                outcomes[name, direction] = Measurement(timing, peak, launches, _moved_bytes(contender))
        return outcomes

    def _checked(
        self, op: Op, inputs: Inputs, shape: Shape, draw: Draw, names: Sequence[str], wanted: set[tuple[str, str]]
    ) -> tuple[dict[str, tuple[Function, Tensor]], dict[tuple[str, str], Outcome]]:
        """Function and upstream gradient of each correct provider; the faults of the others."""
        dtype = draw.dtype
        with torch.no_grad():
            like = op.eager(*inputs.leaves.values(), *(tensor.clone() for tensor in inputs.fixed.values()))
        dy = op.upstream(draw, like, shape).to(like.dtype)
        del like
        truth = correctness.truth_of(op, inputs, dy, dtype)
        right: dict[str, tuple[Function, Tensor]] = {}
        outcomes: dict[tuple[str, str], Outcome] = {}
        for name in names:
            # Each provider has its own copies, which it may change.
            own = replace(inputs, fixed={key: value.clone() for key, value in inputs.fixed.items()})
            own = replace(own, leaves={key: leaf.requires_grad_() for key, leaf in inputs.leaves.items()})
            try:
                function = PROVIDERS[name].function(op)
                output, gradients, own_dy = correctness.run(op, function, own, dy)
                correctness.check(truth, dtype, output, gradients, dict(own.fixed))
                right[name] = (function, own_dy)
            except Exception as fault:  # fails this provider only
                outcomes.update({pair: fault for pair in wanted if pair[0] == name})
        return right, outcomes

    def _copy(self, moved: int) -> Contender:
        """A copy that reads and writes `moved` bytes together; random ones, since zeros can be faster."""
        source = torch.randint(256, (max(1, moved // 2),), dtype=torch.uint8, device=self.settings.device)
        target = torch.empty_like(source)
        return Contender(lambda _: target.copy_(source))

    def _memory_and_launches(self, contender: Contender) -> tuple[int | None, int | None]:
        if self.settings.device.type != "cuda":
            return None, None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender.call(contender.prepare())
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        if self._profiled > _PROFILING_SECONDS:
            return peak, None
        began = time.monotonic()
        prepared = contender.prepare()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            contender.call(prepared)
            torch.cuda.synchronize()
        self._profiled += time.monotonic() - began
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return peak, len(on_device) or None  # without events the profiler could not see the device


def _moved_bytes(contender: Contender) -> int | None:
    prepared = contender.prepare()
    with count_launches() as traffic:
        contender.call(prepared)
    return traffic.operand_bytes if traffic.launches else None


def _contender(function: Function, inputs: Inputs, dy: Tensor, direction: str) -> Contender:
    arguments, leaves = inputs.all(), list(inputs.leaves.values())
    if direction == FORWARD:
        return Contender(lambda _: function(*arguments))
    if direction == BACKWARD:
        # A forward for each repetition: keeping one for all would prevent torch.compile from reusing its memory.
        return Contender(lambda y: torch.autograd.grad(y, leaves, dy), lambda: function(*arguments))
    return Contender(lambda _: torch.autograd.grad(function(*arguments), leaves, dy))


def extra_info(
    session: Session, op: Op, shape: Shape, provider: str, direction: str, measurement: Measurement
) -> dict[str, Any]:
    """The data of a row in the JSON beside its times; rates are those of the median."""
    settings, timing = session.settings, measurement.timing
    cost = op.cost(shape, DTYPES[settings.dtype], direction)
    median = timing.percentile(50)
    rate = cost.minimum_bytes / median
    example = torch.empty(0, dtype=DTYPES[settings.dtype], device=settings.device)
    return {
        "op": op.name,
        "direction": direction,
        "provider": provider,
        "implementation": runtime.implementation(example) if provider == "fastnst" else provider,
        "shape": list(shape),
        "dtype": settings.dtype,
        "layout": settings.layout,
        "minimum_bytes": cost.minimum_bytes,
        "moved_bytes": measurement.moved_bytes if provider != COPY else cost.minimum_bytes,
        "flops": cost.flops if provider != COPY else 0,
        "p20_us": timing.percentile(20) * 1e6,
        "p50_us": median * 1e6,
        "p80_us": timing.percentile(80) * 1e6,
        "gb_per_s": rate / 1e9,
        "tflop_per_s": cost.flops / median / 1e12 if provider != COPY else 0.0,
        "percent_of_copy": 100 * rate / session.ceiling,
        "copy_gb_per_s": session.ceiling / 1e9,
        "peak_memory_bytes": measurement.peak_bytes,
        "launches": measurement.launches,
        "drift": timing.drift(),
        "launch_overhead_included": timing.launch_overhead_included,
        "timer_overhead_us": session.timer_overhead * 1e6,
        **environment(settings.device),
    }
