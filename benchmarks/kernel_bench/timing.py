"""Measure the time of a call on the device, without launch overhead.

A repetition on a GPU is: prepare (a backward needs a forward); write a buffer larger than L2, as often as needed;
record an event; call; record an event.

- The writes evict the inputs from L2, so that each repetition reads them from memory, as in a training step, in which
  other layers' tensors have passed through L2. They also leave L2 full of lines that must be written back during the
  call. This is intended: the last lines that the call itself writes stay in L2 when its time ends, so every call pays
  for its predecessor's, about as many as it leaves. With a clean L2 a copy of 100 MB would appear faster than memory.
- The writes also keep the device busy until the host has queued the whole call, so that launching, which takes longer
  than many kernels, is not in the time. This is checked for each repetition: if the device has reached the first event
  when the last launch is queued, the repetition does not count and the next has more writes. Unlike replays of a
  captured graph, this works for autograd, compiled and cooperatively launched code, and memory comes from the caching
  allocator as in training.
- Contenders take turns, one repetition each, and each round begins with the next of them. Drift (clocks, temperature,
  other load) affects all alike; it is reported.

Two events with nothing in between are about a microsecond apart; this is measured and reported, not subtracted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_CPU_CACHE_BYTES = 32 << 20
_LEAST_FLUSH_BYTES = 256 << 20
_MOST_FLUSHES = 512  # about 30 ms on an H200; a call that takes the host longer waits for the device itself


@dataclass(frozen=True)
class Contender:
    """The call that is timed, with the result of `prepare`, which is not in the time."""

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Timing:
    """Seconds of each repetition, in the order taken."""

    seconds: list[float] = field(default_factory=list)
    launch_overhead_included: bool = False

    def percentile(self, percent: float) -> float:
        """Linear interpolation between the nearest repetitions."""
        ordered = sorted(self.seconds)
        position = percent / 100 * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    def drift(self) -> float:
        """Median of the second half of the repetitions over that of the first; 1: no drift."""
        half = len(self.seconds) // 2
        if half == 0:
            return 1.0
        first, second = Timing(self.seconds[:half]), Timing(self.seconds[-half:])
        return second.percentile(50) / first.percentile(50)


class CpuTimer:
    """Wall-clock time of a call with cold caches."""

    def __init__(self) -> None:
        self._buffer = torch.empty(_CPU_CACHE_BYTES, dtype=torch.int8)

    def measure(self, contenders: Sequence[Contender], rounds: int, warm_up: int) -> list[Timing]:
        """`rounds` repetitions of each contender, in turns, after `warm_up` rounds that do not count."""
        timings = [Timing() for _ in contenders]
        for round_ in range(-warm_up, rounds):
            for index in turns(len(contenders), round_):
                prepared = contenders[index].prepare()
                self._buffer.zero_()
                started = time.perf_counter()
                contenders[index].call(prepared)
                ended = time.perf_counter()
                if round_ >= 0:
                    timings[index].seconds.append(ended - started)
        return timings

    def overhead(self) -> float:
        """Seconds that this timer measures for nothing."""
        return self.measure([Contender(lambda _: None)], 50, 5)[0].percentile(50)


class CudaTimer:
    """Time between two events on the current stream of `device`."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(max(_LEAST_FLUSH_BYTES, 2 * cache), dtype=torch.int8, device=device)

    def measure(self, contenders: Sequence[Contender], rounds: int, warm_up: int) -> list[Timing]:
        """`rounds` repetitions of each contender, in turns, after `warm_up` rounds that do not count."""
        flushes = [1] * len(contenders)
        timings = [Timing() for _ in contenders]
        for round_ in range(-warm_up, rounds):
            begun: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
            for index in turns(len(contenders), round_):
                start, end, ahead = self._queue(contenders[index], flushes[index])
                while not ahead and flushes[index] < _MOST_FLUSHES:
                    torch.cuda.synchronize()
                    flushes[index] *= 2
                    start, end, ahead = self._queue(contenders[index], flushes[index])
                if round_ >= 0:
                    timings[index].launch_overhead_included |= not ahead
                    begun.append((index, start, end))
            # Bounds the queue; the next call, like any other, begins with an idle device and its own flushes.
            torch.cuda.synchronize()
            for index, start, end in begun:
                timings[index].seconds.append(start.elapsed_time(end) / 1000)
        return timings

    def _queue(self, contender: Contender, flushes: int) -> tuple[torch.cuda.Event, torch.cuda.Event, bool]:
        """The events around one call, and whether it was queued completely before the device reached it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepared = contender.prepare()
        for _ in range(flushes):
            self._buffer.zero_()
        start.record()
        contender.call(prepared)
        end.record()
        return start, end, not start.query()

    def overhead(self) -> float:
        """Seconds that this timer measures for nothing."""
        return self.measure([Contender(lambda _: None)], 50, 5)[0].percentile(50)


Timer = CpuTimer | CudaTimer


def turns(count: int, round_: int) -> list[int]:
    """The order of `count` contenders in a round: each is first equally often."""
    return [(round_ + i) % count for i in range(count)]


def timer_for(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


class Clock:
    """A clock that replays measured times for pytest-benchmark's statistics, tables and JSON.

    pytest-benchmark reads a timer, calls a function, reads the timer again. Here the timer is this clock and the
    function advances it by the next repetition, which was measured on the device, in turns with the other providers.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def replay(self, seconds: Sequence[float]) -> Callable[[], None]:
        """A function that takes each of `seconds` in turn on this clock."""
        remaining = iter(seconds)

        def play() -> None:
            self._now += next(remaining)

        return play
