"""Time and memory of training steps.

Time. Providers take turns; each round begins with the next of them, so that drift affects all alike. On a CPU a turn is
one step. On a GPU it is `CUDA_TURN` + 1 steps, queued back to back without a synchronisation, as in training, with an
event between any two; the first does not count, because the device waits for its launches.

Memory. "Beyond the weights" means without the weights of both networks, Adam's state, the style's Gram matrices and the
batch: gradients, activations, temporaries, and buffers kept between steps. It is the sum of

- the bytes held when a step begins: tensors on a CPU, after freeing the gradients; bytes of the allocator on a GPU,
  gradients included;
- the peak allocated during the step over the amount at its begin. On a CPU PyTorch's profiler reports each allocation
  and release, inside operations, too, but not oneDNN's scratch memory. On a GPU it is the caching allocator's peak;
- on a GPU, the memory of CUDA graphs' private pools beside tensors, since replayed kernels allocate nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from kernel_bench.timing import Timing, turns
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from step_bench.providers import Provider

CUDA_TURN = 10


def synchronized_time(device: torch.device) -> float:
    """Seconds of the clock, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_steps(
    providers: dict[str, Callable[[Tensor], object]], batches: Sequence[Tensor], steps: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each provider, in turns, after their warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    round_ = 0
    while min(map(len, seconds.values())) < steps:
        left = steps - min(map(len, seconds.values()))
        for index in turns(len(names), round_):
            name = names[index]
            turn = _cuda_turn if device.type == "cuda" else _cpu_turn
            seconds[name] += turn(providers[name], batches, left)
        round_ += 1
    return seconds


def _cpu_turn(step: Callable[[Tensor], object], batches: Sequence[Tensor], left: int) -> list[float]:
    begin = time.perf_counter()
    step(batches[left % len(batches)])
    return [time.perf_counter() - begin]


def _cuda_turn(step: Callable[[Tensor], object], batches: Sequence[Tensor], left: int) -> list[float]:
    count = min(CUDA_TURN, left)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    for index, event in enumerate(events):
        step(batches[(left + index) % len(batches)])
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]


def statistics(seconds: Sequence[float], batch_size: int) -> dict[str, Any]:
    """The columns of a row about time; images per second are those of the median step."""
    timing = Timing(list(seconds))
    median = timing.percentile(50)
    near = sum(abs(second - median) <= 0.05 * median for second in seconds)
    return {
        "images_per_second": batch_size / median,
        "ms_per_step": 1000 * median,
        "p20_ms": 1000 * timing.percentile(20),
        "p50_ms": 1000 * median,
        "p80_ms": 1000 * timing.percentile(80),
        "mean_ms": 1000 * sum(seconds) / len(seconds),
        "within_5_percent": near / len(seconds),
        "steps": len(seconds),
        "drift": timing.drift(),
    }


@dataclass
class MemoryUse:
    """Bytes allocated now, and idle bytes in private pools of CUDA graphs."""

    device: torch.device
    bytes: int
    idle_in_pools: int

    @classmethod
    def now(cls, device: torch.device) -> MemoryUse:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return cls(device, torch.cuda.memory_allocated(device), _idle_in_private_pools())
        return cls(device, _bytes(obj for obj in gc.get_objects() if _is_tensor(obj)), 0)


def peak_beyond_weights(provider: Provider, batch: Tensor, before: MemoryUse) -> int:
    """Peak memory of a step in bytes, as defined above.

    Args:
        provider: warm.
        batch: existed when `before` was taken.
        before: memory before the provider was built.
    """
    if not batch.is_cuda:  # a captured step on a GPU needs its gradients
        for parameter in provider.parameters().values():
            parameter.grad = None
    held = MemoryUse.now(before.device)
    kept = held.bytes - before.bytes - _bytes(provider.persistent_tensors())
    in_step = _cuda_peak(provider, batch) if batch.is_cuda else _cpu_peak(lambda: provider(batch))
    return max(kept, 0) + in_step + max(held.idle_in_pools - before.idle_in_pools, 0)


def _cuda_peak(provider: Provider, batch: Tensor) -> int:
    begin = torch.cuda.memory_allocated(batch.device)
    torch.cuda.reset_peak_memory_stats(batch.device)
    provider(batch)
    torch.cuda.synchronize(batch.device)
    return torch.cuda.max_memory_allocated(batch.device) - begin


def _idle_in_private_pools() -> int:
    """Bytes that the allocator reserves for graphs beside live tensors."""
    segments = torch.cuda.memory_snapshot()
    private = [segment for segment in segments if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in private)


def _cpu_peak(act: Callable[[], object]) -> int:
    """Peak of the bytes allocated in `act`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert changes, "the profiler saw no allocation"
    alive = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def _is_tensor(thing: object) -> bool:
    # By its type: `isinstance` would run code of lazy proxies.
    return issubclass(type(thing), Tensor)


def _bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the storages, each counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
            continue
        if isinstance(tensor, FakeTensor):
            continue  # it has no memory, and warns when asked for its address
        try:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        except (NotImplementedError, RuntimeError):
            continue  # other tensors without memory
    return sum(size for address, size in sizes.items() if address)
