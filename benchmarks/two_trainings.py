"""Measure trainings at the same time: images/s of several `fastnst train` together, over those of one alone.

    python benchmarks/two_trainings.py PHOTOS STYLE --steps 8 --turns 2 --json rows.json -- --set data.image_size=128

What follows `--` goes to each `fastnst train`. Weights of VGG19 are random, which changes no step's time. One alone and
all at once take turns; a training's rate is that of its steps after the first, waiting for images included. On a GPU
they share the device, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from kernel_bench.environment import environment
from result_files import result_file

from fastnst.errors import DataError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 3 with a training's message if it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("style", type=Path)
    parser.add_argument("--trainings", type=int, default=2, help="at the same time; default: 2")
    parser.add_argument("--steps", type=int, default=8, help="of each training, the first untimed; default: 8")
    parser.add_argument("--turns", type=int, default=2, help="default: 2")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write the result here")
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:end])
    options.train = given[end + 1 :]
    if min(options.trainings, options.turns) < 1 or options.steps < 2:
        parser.error("--trainings and --turns are at least 1, --steps at least 2")
    alone, together = [], []
    try:
        for _ in range(options.turns):
            alone += _rates(options, 1)
            together.append(sum(_rates(options, options.trainings)))
    except DataError as error:
        print(f"two_trainings: {error}", file=sys.stderr)
        return error.exit_code
    result: dict[str, Any] = {
        "trainings": options.trainings,
        "options": options.train,
        "steps": options.steps,
        "images_per_second_alone": alone,
        "images_per_second_together": together,
        "together_over_alone": statistics.mean(together) / statistics.mean(alone),
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    print(f"one alone {statistics.mean(alone):.2f} images/s, {options.trainings} at once together", end=" ")
    print(f"{statistics.mean(together):.2f}: {result['together_over_alone']:.2f}×")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


def _rates(options: argparse.Namespace, count: int) -> list[float]:
    """Images per second of each of `count` trainings at the same time."""
    command = [sys.executable, "-m", "fastnst", "train", "--data", str(options.photos), "--style", str(options.style)]
    command += ["--vgg", "random", "--steps", str(options.steps), "--set", "train.log_every=1", *options.train]
    running: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder, str(index)) for index in range(count)]
        try:
            for run in runs:
                with Path(f"{run}.log").open("wb") as log:
                    running.append(subprocess.Popen([*command, "--out", str(run)], stdout=log, stderr=log))
            for run, process in zip(runs, running, strict=True):
                if process.wait():
                    lines = Path(f"{run}.log").read_text("utf-8", "replace").splitlines()
                    raise DataError(f"a training ended with {process.returncode}: {lines[-1] if lines else ''}")
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [_rate(run / "metrics.jsonl") for run in runs]


def _rate(file: Path) -> float:
    """Images per second over all steps but the first."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return statistics.harmonic_mean([line["speed/images_per_second"] for line in lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
