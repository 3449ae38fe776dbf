"""Measure fastnst with its loader, which reads, decodes and resizes images while the previous step runs."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fastnst.config import Config
from fastnst.data.loaders import Loader, open_loader
from fastnst.data.manifest import Manifest, build_manifest
from fastnst.data.sampler import Sampler
from step_bench import measure
from step_bench.measure import synchronized_time
from step_bench.providers import Fastnst, Task

WITH_LOADER = "fastnst_fed"


def measure_with_loader(task: Task, folder: Path, steps: int) -> tuple[Fastnst, dict[str, Any]]:
    """Time `steps` steps after a warm-up longer than the loader's prefetch.

    Images per second are over the whole time, waiting included; percentiles are of single steps.

    Raises:
        UserError: the folder holds no images, or the loader is not installed.
    """
    config, device = task.config, task.device
    manifest = build_manifest(folder)
    warm_up = warm_up_steps(config, device)
    provider = Fastnst(task)
    marks: list[Any] = []
    waited = 0.0
    with loader_of(config, manifest, config.train.seed, warm_up + steps, device) as loader:
        batches = iter(loader)
        for _ in range(warm_up):
            provider(provider.fetch(batches))
        begin = synchronized_time(device)
        marks.append(_mark(device))
        for _ in range(steps):
            asked = time.perf_counter()
            batch = provider.fetch(batches)
            waited += time.perf_counter() - asked
            provider(batch)
            marks.append(_mark(device))
        elapsed = synchronized_time(device) - begin
    seconds = [_between(a, b) for a, b in pairwise(marks)]
    measured = measure.statistics(seconds, config.train.batch_size)
    measured |= {
        "images_per_second": steps * config.train.batch_size / elapsed,
        "ms_per_step": 1000 * elapsed / steps,
        "peak_memory_bytes": None,  # cannot separate the loader's and the step's
        "loader": config.data.loader,
        "images": len(manifest.images),
        "waiting_share": waited / elapsed,
    }
    return provider, measured


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def warm_up_steps(config: Config, device: torch.device) -> int:
    """More steps than the loader prefetches."""
    return 2 * config.data.prefetch + (8 if device.type == "cuda" else 1)


def loader_of(config: Config, manifest: Manifest, seed: int, steps: int, device: torch.device) -> Loader:
    """Open the loader for so many steps."""
    images, data = len(manifest.images), config.data
    order = Sampler(seed, images, config.train.batch_size, steps, fit=data.fit, flip=data.flip)
    return open_loader(manifest, order, data, device=device)
