"""Benchmark training steps of fastnst and of plain PyTorch: images/s, ms, memory, share of the roofline.

    python benchmarks/end_to_end.py --device cuda --image-size 256 --batch-size 4,16,32 --steps 200 --json rows.json
    python benchmarks/end_to_end.py --device cpu --image-size 128 --batch-size 4 --steps 10 \\
        --providers fastnst,eager_fp32,eager_channels_last

All providers have the same networks, weights, style, loss, optimiser and uint8 batches, which are in device memory;
weights are random, which changes no step's time. Each provider's loss, gradients and update are checked before it is
timed, and loss and gradients again after its warm-up: a wrong result has no row, and the exit code is 1.

    fastnst              fastnst's own training step with this configuration and --set; its row says whether steps were
                         captured as a CUDA graph (--set train.capture=off launches them)
    eager_fp32           as in published example codes: plain modules, contiguous, TF32 where PyTorch uses it by default
    eager_channels_last  the same in channels_last
    eager_amp            the same with bf16 autocast; slow on a CPU without bf16 instructions
    compile              torch.compile: of eager_amp in max-autotune on a GPU, of eager_channels_last on a CPU

--busy keeps so many processes busy meanwhile, as on a machine that people share. The baselines run with the short spin
of threads that `import fastnst` sets; with GOMP_SPINCOUNT=300000, libgomp's default, before the command all providers
run as a program does that knows nothing of fastnst. Each row says which.

--folder measures fastnst once more with its loader, which reads JPEG files: the row fastnst_fed. The loader prefetches
as in training, and nothing else runs meanwhile.

`roofline_percent` is the bound of `benchmarks/roofline.py` (bf16 on a GPU, fp32 on a CPU, for every provider) over the
median step; the two rates are measured first, or given. The bound counts convolutions in their plain form: algorithms
with fewer products, as on a CPU, may exceed 100 %. `benchmarks/step_bench/measure.py` defines time and memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastnst  # noqa: F401  sets how long threads spin, which is read when torch is imported

# Silences the profiler, which counts memory on a CPU; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from kernel_bench.environment import environment
from neighbours import busy
from result_files import result_file
from roofline import Machine, configured
from step_bench import correctness, measure, results
from step_bench.cost_model import training_step
from step_bench.machine_rates import measured_machine
from step_bench.providers import PROVIDERS, Provider, Task, make_task
from step_bench.with_loader import WITH_LOADER, measure_with_loader
from torch import Tensor

from fastnst.config import Config
from fastnst.device import resolve_device
from fastnst.errors import UserError
from fastnst.models.architectures import ARCHITECTURES
from fastnst.training import determinism

BATCHES = 2


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if a provider was refused or could not run; 2 or 5 with a message."""
    options = _parser().parse_args(arguments)
    try:
        return _Run(options).run()
    except UserError as error:
        print(f"end_to_end: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="auto", help="cpu or cuda; default: cuda where there is one")
    add("--preset", help="networks, loss layers and weights; default: hwalsuklee")
    add("--image-size", type=int, default=256, help="side of the images; default: 256")
    add("--batch-size", default="4", metavar="N,…", help="one or more; default: 4")
    add("--steps", type=_positive, default=20, help="timed steps of each provider; default: 20")
    add("--providers", default=",".join(PROVIDERS), metavar="NAME,…", help="default: all")
    add("--set", dest="assignments", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as fastnst train")
    add("--busy", type=_count, default=0, metavar="N", help="busy processes beside each provider; default: 0")
    add("--folder", type=Path, metavar="PHOTOS", help="measure fastnst with its loader on this folder, too")
    add("--tflops", type=float, help="rate of matrix products; default: measured")
    add("--tb-per-s", type=float, help="rate of a plain copy; default: measured")
    add("--json", type=result_file, metavar="FILE", help="write the rows here")
    add("--markdown", type=result_file, metavar="FILE", help="write the table here, too")
    return parser


def _count(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text}; expected at least 0")
    return int(text)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected at least 1")
    return int(text)


@dataclass
class _Run:
    options: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def run(self) -> int:
        options = self.options
        names = options.providers.split(",")
        if unknown := [name for name in names if name not in PROVIDERS]:
            raise UserError(f"--providers: {unknown[0]!r} is unknown; known: {', '.join(PROVIDERS)}")
        if not all(part.isdecimal() and int(part) > 0 for part in options.batch_size.split(",")):
            raise UserError(f"--batch-size: {options.batch_size!r}; expected positive numbers such as 4,16,32")
        self.device = resolve_device(options.device)
        configs = [self._config(int(size)) for size in options.batch_size.split(",")]
        self.machine = measured_machine(self.device, options.tflops, options.tb_per_s)
        self._say(
            f"{environment(self.device)['device']}: {self.machine.tflops:.4g} TFLOP/s, {self.machine.tb_per_s:.4g} TB/s"
        )
        for config in configs:
            with determinism.algorithms(config.train), busy(options.busy):
                self._measure(config, names)
                if options.folder is not None:
                    self._measure_with_loader(config)
            self._write()
        print(results.table(self.rows), end="")
        return 1 if self.refused else 0

    def _config(self, batch_size: int) -> Config:
        options = self.options
        config = configured(options.preset, options.image_size, batch_size, options.assignments, self.device)
        if config.model.norm != "instance":
            raise UserError(f"model.norm is {config.model.norm!r}; the baselines have instance norm only")
        architecture, size = config.model.architecture, config.data.image_size
        spec = ARCHITECTURES[architecture]
        if spec.padding == "same" and size % 4:
            raise UserError(f"data.image_size is {size}; the plain {architecture} net takes multiples of 4, choose one")
        if spec.border and size <= spec.border:
            raise UserError(f"data.image_size is {size}; {architecture} reflects {spec.border} pixels, give more")
        return config

    def _measure(self, config: Config, names: Sequence[str]) -> None:
        task = make_task(config, self.device)
        batches = _batches(config, self.device)
        reference = correctness.reference_step(task, batches[0])
        warm: dict[str, Provider] = {}
        measured: dict[str, dict[str, Any]] = {}
        for name in names:
            made = self._attempt(name, config, lambda name=name: _warm(name, task, batches, reference))
            if made is not None:
                warm[name], measured[name] = made
        if warm:
            seconds = measure.time_steps(dict(warm), batches, self.options.steps, self.device)
            for name, provider in warm.items():
                times = measure.statistics(seconds[name], config.train.batch_size)
                self._add(name, config, provider, times | measured[name])
        results.compare(self.rows, config.train.batch_size)
        warm.clear()
        _release(self.device)

    def _measure_with_loader(self, config: Config) -> None:
        task = make_task(config, self.device)
        made = self._attempt(
            WITH_LOADER, config, lambda: measure_with_loader(task, self.options.folder, self.options.steps)
        )
        if made is not None:
            provider, measured = made
            self._add(WITH_LOADER, config, provider, measured)
        _release(self.device)

    def _attempt(self, name: str, config: Config, act: Callable[[], Any]) -> Any:
        """Return the result of `act`; None, with a message, if it fails, so that the others go on."""
        try:
            return act()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.refused.append(name)
            self._say(f"{name}, batch {config.train.batch_size}: refused: {kind}{lines[0][:400]}")
            _release(self.device)
            return None

    def _add(self, name: str, config: Config, provider: Provider, measured: dict[str, Any]) -> None:
        """Append a row."""
        bound = _bound(config, self.machine, self.device)
        row = {
            "provider": name,
            "preset": config.preset,
            "image_size": config.data.image_size,
            "batch_size": config.train.batch_size,
            "precision": provider.precision,
            "busy": self.options.busy,
            "spin_count": os.environ.get("GOMP_SPINCOUNT"),
            **provider.notes,
            **measured,
            "bound_ms": 1000 * bound,
            "roofline_percent": 100 * 1000 * bound / measured["ms_per_step"],
            "tflops": self.machine.tflops,
            "tb_per_s": self.machine.tb_per_s,
            "environment": environment(self.device),
        }
        self.rows.append(row)
        self._say(f"{name}, batch {config.train.batch_size}: {row['images_per_second']:.2f} images/s")

    def _write(self) -> None:
        """Write all rows so far, after each batch size."""
        if self.options.json is not None:
            self.options.json.write_text(json.dumps(self.rows, indent=1) + "\n", "utf-8")
        if self.options.markdown is not None:
            self.options.markdown.write_text(results.page(self.rows), "utf-8")

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _warm(
    name: str, task: Task, batches: Sequence[Tensor], reference: correctness.Reference
) -> tuple[Provider, dict[str, Any]]:
    """The provider, checked and warm, and its memory and errors."""
    before = measure.MemoryUse.now(task.device)
    provider = PROVIDERS[name](task)
    correctness.check(provider, task, reference, batches[0], first=True)
    for step in range(8 if task.device.type == "cuda" else 1):
        provider(batches[step % len(batches)])
    errors = correctness.check(provider, task, reference, batches[0])
    peak = measure.peak_beyond_weights(provider, batches[0], before)
    return provider, {"peak_memory_bytes": peak, **errors}


def _batches(config: Config, device: torch.device) -> list[Tensor]:
    side = config.data.image_size
    generator = torch.Generator().manual_seed(config.train.seed + 1)
    shape = (config.train.batch_size, side, side, 3)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device) for _ in range(BATCHES)]


def _bound(config: Config, machine: Machine, device: torch.device) -> float:
    return machine.seconds(training_step(config, "bf16" if device.type == "cuda" else "fp32"))


def _release(device: torch.device) -> None:
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
