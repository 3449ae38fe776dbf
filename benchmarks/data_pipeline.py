"""Measure images per second: Pillow in one process, the Pillow and DALI loaders, and a cache.

    python benchmarks/data_pipeline.py --folder PHOTOS [--image-size 256] [--batch-size 16] [--workers 2] [--json FILE]

Every row reads the same images with the same crops. The time to the first batch is reported separately; warm-up
batches are excluded from the rate. The cache holds the images that are read, lies in the page cache, and is built in a
temporary folder; its row in the JSON file holds the time to build it. With `--step-seconds`, the main thread multiplies
matrices for that long between batches, as a training step would, and the share of time that it waits is reported.

`--tune` measures the DALI loader alone, with several numbers of threads and of batches kept ready, and on a GPU with
several shares of the JPEGs for its decoding engines: to find this machine's best `data.workers`, `data.prefetch` and
`fastnst.data.loaders.dali.HW_DECODER_LOAD`.
"""

import contextlib
import functools
import io
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import PIL
from result_files import json_option

from fastnst.config import DataConfig
from fastnst.data.crop import crop_box, read_crop
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import Manifest, build_manifest
from fastnst.data.sampler import Sampler
from fastnst.errors import UserError
from fastnst.storage import write_json

# torch is imported in functions only: the Pillow loader's workers import this file again, and would start late.
if TYPE_CHECKING:
    import torch

    from fastnst.data.cache.format import CachedManifest

WARM_UP = 2
TUNED_THREADS = (1, 2, 4, 8, 16)
TUNED_PREFETCH = (1, 3, 6)
TUNED_ENGINE_SHARES = (0.0, 0.35, 0.65, 0.9)

Measure = Callable[[str, Callable[[], Any]], dict[str, Any]]
"""Name and source → a row; see `_measure`."""


@click.command()
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="Folder of images.")
@click.option("--image-size", default=256, show_default=True, help="Side of the crops, in pixels.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--batches", default=20, show_default=True, help="Timed batches per repeat.")
@click.option("--repeats", default=3, show_default=True, help="Fresh starts of each loader.")
@click.option("--workers", default=2, show_default=True, help="DALI's threads, Pillow's processes.")
@click.option("--prefetch", default=3, show_default=True, help="Batches kept ready.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--step-seconds", default=0.0, show_default=True, help="Length of a simulated training step.")
@click.option("--tune", is_flag=True, help="Measure the DALI loader with several settings instead.")
@json_option
def main(
    folder: Path,
    image_size: int,
    batch_size: int,
    batches: int,
    repeats: int,
    workers: int,
    prefetch: int,
    device: str,
    step_seconds: float,
    tune: bool,
    json_file: Path | None,
) -> None:
    """Print images per second of plain Pillow, the Pillow loader, the DALI loader and a cache."""
    from fastnst.device import resolve_device

    target = resolve_device(device)
    manifest = build_manifest(folder)
    sampler = Sampler(0, len(manifest.images), batch_size, WARM_UP + batches)
    config = DataConfig(folder=folder, image_size=image_size, workers=workers, prefetch=prefetch)
    settings = {
        "pictures": len(manifest.images),
        "image_size": image_size,
        "batch_size": batch_size,
        "batches": batches,
        "repeats": repeats,
        "step_seconds": step_seconds,
    }
    measure = functools.partial(_measure, sampler=sampler, repeats=repeats, step_seconds=step_seconds, device=target)
    if tune:
        rows = _tune(manifest, sampler, config, target, measure)
    else:
        settings |= {"workers": workers, "prefetch": prefetch}
        rows = _compare(manifest, sampler, config, target, measure)
    if json_file is not None:
        write_json(json_file, {"settings": settings, "environment": _environment(target), "rows": rows})


def _compare(
    manifest: Manifest, sampler: Sampler, base: DataConfig, device: "torch.device", measure: Measure
) -> list[dict[str, Any]]:
    """Measure and print each source."""

    def loader(name: str) -> Callable[[], Any]:
        config = base.model_copy(update={"loader": name})
        return lambda: open_loader(manifest, sampler, config, device=device)

    sources: dict[str, Callable[[], Any]] = {
        "Pillow, one process, no loader": lambda: _PillowBaseline(manifest, sampler, base.image_size),
        f"Pillow loader, {base.workers} processes": loader("pillow"),
        f"DALI loader, {base.workers} threads, {device.type}": loader("dali"),
    }
    rows = []
    with tempfile.TemporaryDirectory() as place:
        cached, seconds = _make_cache(manifest, sampler, Path(place) / "cache", base)
        sources[f"Cache, {base.workers} threads"] = lambda: open_loader(cached, sampler, base, device=device)
        for name, open_source in sources.items():
            try:
                row = measure(name, open_source)
            except UserError as error:
                click.echo(f"{name}: {error}", err=True)
                continue
            if name.startswith("Cache"):
                row |= {"seconds_to_make": seconds, "bytes": cached.cache.bytes}
            rows.append(row)
            click.echo(
                f"{name:34} {row['pictures_per_second']:8.1f} images/s "
                f"({row['slowest']:.1f} … {row['fastest']:.1f})  "
                f"first batch {row['first_batch_seconds']:.2f} s  waits {row['waiting_share']:.1%}"
            )
    return rows


def _tune(
    manifest: Manifest, sampler: Sampler, base: DataConfig, device: "torch.device", measure: Measure
) -> list[dict[str, Any]]:
    """Measure the DALI loader with each setting, and print the fastest last."""
    from fastnst.data.loaders import dali

    cores = len(os.sched_getaffinity(0))
    threads = [count for count in TUNED_THREADS if count <= 2 * cores]
    shares = TUNED_ENGINE_SHARES if device.type == "cuda" else (dali.HW_DECODER_LOAD,)
    usual, rows = dali.HW_DECODER_LOAD, []
    try:
        for count, depth, share in itertools.product(threads, TUNED_PREFETCH, shares):
            config = base.model_copy(update={"loader": "dali", "workers": count, "prefetch": depth})
            dali.HW_DECODER_LOAD = share
            engines = f", {share:.0%} to the engines" if device.type == "cuda" else ""
            name = f"{count} threads, {depth} batches ready{engines}"
            row = measure(name, lambda config=config: open_loader(manifest, sampler, config, device=device))
            rows.append(row | {"workers": count, "prefetch": depth, "engines_share": share if engines else None})
            click.echo(f"{name:48} {row['pictures_per_second']:8.1f} images/s  waits {row['waiting_share']:.1%}")
    finally:
        dali.HW_DECODER_LOAD = usual
    best = max(rows, key=lambda row: row["pictures_per_second"])
    click.echo(f"fastest: {best['name']}")
    return rows


def _make_cache(manifest: Manifest, sampler: Sampler, out: Path, config: DataConfig) -> "tuple[CachedManifest, float]":
    """Build a cache of the images that `sampler` draws; return it with the seconds that it took."""
    from fastnst.data.cache.build import build_cache
    from fastnst.data.cache.format import CachedManifest

    read = sorted({int(index) for step in range(sampler.steps) for index in sampler.batch(step).indices})
    some = replace(manifest, images=[manifest.images[index] for index in read])
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        built = build_cache(some, out, size=config.image_size, fit=config.fit, workers=config.workers)
    seconds = time.perf_counter() - started
    return CachedManifest(out, manifest.images, [], "", cache=built.cache), seconds


class _PillowBaseline:
    """The minimum: read, decode and resize one image after another, in this thread."""

    def __init__(self, manifest: Manifest, sampler: Sampler, image_size: int) -> None:
        self._manifest, self._sampler, self._image_size = manifest, sampler, image_size

    def __enter__(self) -> "_PillowBaseline":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(self._sampler.steps):
            samples = self._sampler.batch(step)
            crops = []
            for index, crop, flip in zip(samples.indices, samples.crop, samples.flip, strict=True):
                entry = self._manifest.images[index]
                box = crop_box(entry.width, entry.height, self._sampler.fit, crop, self._image_size)
                path = str(self._manifest.folder / entry.path)
                crops.append(read_crop(path, entry, box, self._image_size, bool(flip)))
            yield np.stack(crops)


def _measure(
    name: str,
    open_source: Callable[[], Any],
    sampler: Sampler,
    repeats: int,
    step_seconds: float,
    device: "torch.device",
) -> dict[str, Any]:
    import torch

    rates, firsts, shares = [], [], []
    for _ in range(repeats):
        started = time.perf_counter()
        with open_source() as source:
            batches = iter(source)
            next(batches)
            firsts.append(time.perf_counter() - started)
            for _ in range(WARM_UP - 1):
                next(batches)
            waited = 0.0
            begin = time.perf_counter()
            for _ in range(sampler.steps - WARM_UP):
                asked = time.perf_counter()
                next(batches)
                waited += time.perf_counter() - asked
                _multiply_matrices(step_seconds)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elapsed = time.perf_counter() - begin
        rates.append((sampler.steps - WARM_UP) * sampler.batch_size / elapsed)
        shares.append(waited / elapsed)
    return {
        "name": name,
        "pictures_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "first_batch_seconds": statistics.median(firsts),
        "waiting_share": statistics.median(shares),
    }


def _multiply_matrices(seconds: float) -> None:
    import torch

    end = time.perf_counter() + seconds
    factors = torch.rand(256, 256)
    while time.perf_counter() < end:
        factors = torch.mm(factors, factors).clamp_(0, 1)


def _environment(device: "torch.device") -> dict[str, Any]:
    import torch

    try:
        from nvidia import dali

        dali_version = dali.__version__
    except ImportError:
        dali_version = None
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "dali": dali_version,
        "pillow": PIL.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"{error}") from None
