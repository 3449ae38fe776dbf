"""Measure the two rates of a roofline: matrix products and copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from roofline import Machine

from step_bench.measure import synchronized_time

_REPEATS = 5


def measured_machine(device: torch.device, tflops: float | None = None, tb_per_s: float | None = None) -> Machine:
    """Measure the rates of `device` not given, in bf16 on a GPU, in fp32 on a CPU; the best of a few repeats."""
    on_gpu = device.type == "cuda"
    if tflops is None:
        side, dtype = (8192, torch.bfloat16) if on_gpu else (1536, torch.float32)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        tflops = 2 * side**3 / _best(lambda: torch.mm(a, b), device) / 1e12
    if tb_per_s is None:
        source = torch.ones((1 << 30) if on_gpu else (1 << 26), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        tb_per_s = 2 * source.nbytes / _best(lambda: target.copy_(source), device) / 1e12
    return Machine(tflops, tb_per_s)


def _best(act: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; each repeat queues many calls, which hides the launch overhead."""
    calls = 20 if device.type == "cuda" else 3
    seconds = []
    for _ in range(_REPEATS):
        begin = synchronized_time(device)
        for _ in range(calls):
            act()
        seconds.append((synchronized_time(device) - begin) / calls)
    return min(seconds)
