"""Benchmark training several styles in one process against one process for each: seconds per step of all styles.

    python benchmarks/styles.py --folder PHOTOS --styles 3 --image-size 128 --batch-size 4 --steps 8 --json FILE

Both modes run fastnst's own training step with its loader on image files. Together, each batch is decoded once and φ
sees its content once; alone, each style has its own loader, and the styles run one after the other. The modes take
turns. Each turn opens its loaders anew, with a warm-up longer than their prefetch, and the order goes on as far after
the timed steps, so that the loader reads as many images as the timed steps use.

Both modes see the same images in the same order, so their weights must be equal to the last bit on a CPU, and within
the type's rounding on a GPU. Otherwise there is no result, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from kernel_bench.environment import environment
from result_files import result_file
from roofline import configured
from step_bench.measure import synchronized_time
from step_bench.with_loader import loader_of, warm_up_steps

from fastnst.config import Config
from fastnst.data.manifest import Manifest, build_manifest
from fastnst.device import resolve_device
from fastnst.errors import UserError
from fastnst.losses.perceptual import PerceptualLoss
from fastnst.models.transform_net import TransformNet
from fastnst.models.vgg19 import VGG19, deepest_layer
from fastnst.training import determinism
from fastnst.training.step.train_step import NetTrainer

STYLE_SIDE = 256
TOLERANCE = {"fp32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}
"""Tolerance of the weights' relative distance on a GPU: Adam turns a rounding error of a small gradient into a step."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if the two modes train differently; 2, 3 or 5 with a message."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except UserError as error:
        print(f"styles: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, required=True, metavar="PHOTOS", help="a folder of images")
    add("--styles", type=int, default=3, help="default: 3")
    add("--device", default="auto", help="cpu or cuda; default: cuda where there is one")
    add("--preset", help="networks, loss layers and weights; default: hwalsuklee")
    add("--image-size", type=int, default=256, help="side of the images; default: 256")
    add("--batch-size", type=int, default=4, help="default: 4")
    add("--steps", type=int, default=8, help="timed steps of a turn; default: 8")
    add("--turns", type=int, default=2, help="of each mode; default: 2")
    add("--set", dest="assignments", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as fastnst train")
    add("--json", type=result_file, metavar="FILE", help="write the result here")
    return parser


def _run(options: argparse.Namespace) -> int:
    if min(options.styles, options.steps, options.turns) < 1:
        raise UserError("--styles, --steps and --turns are at least 1")
    device = resolve_device(options.device)
    config = configured(options.preset, options.image_size, options.batch_size, options.assignments, device)
    precision = config.train.precision
    manifest = build_manifest(options.folder)
    with determinism.algorithms(config.train):
        bench = _Bench(config, manifest, options, device)
        seconds = bench.measure()
        distance = bench.distance()
    if distance > (TOLERANCE[precision] if device.type == "cuda" else 0.0):
        print(f"styles: the weights of both modes differ by {distance:.3g} relative; no figures", file=sys.stderr)
        return 1
    medians = {mode: statistics.median(values) for mode, values in seconds.items()}
    result = {
        "styles": options.styles,
        "preset": config.preset,
        "image_size": config.data.image_size,
        "batch_size": config.train.batch_size,
        "precision": precision,
        "loader": config.data.loader,
        "images": len(manifest.images),
        "steps_per_turn": options.steps,
        "seconds_per_step_of_all": {mode: list(values) for mode, values in seconds.items()},
        "together_over_alone": medians["together"] / medians["alone"],
        "weights_relative_distance": distance,
        "environment": environment(device),
    }
    for mode, median in medians.items():
        print(f"{mode:9} {1000 * median:9.1f} ms a step of {options.styles} styles")
    print(f"together / alone = {result['together_over_alone']:.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


class _Bench:
    """The training steps of the same styles twice: together and alone."""

    def __init__(self, config: Config, manifest: Manifest, options: argparse.Namespace, device: torch.device) -> None:
        self._config, self._manifest, self._device = config, manifest, device
        self._steps, self._turns = options.steps, options.turns
        self._warm_up = warm_up_steps(config, device)
        layers = [*config.loss.content_layers, *config.loss.style_layers]
        vgg = VGG19(deepest_layer(layers), generator=torch.Generator().manual_seed(0)).to(device)
        self._together: list[NetTrainer] = []
        self._alone: list[NetTrainer] = []
        for index in range(options.styles):
            for steps, shares in ((self._together, True), (self._alone, False)):
                beside = steps[0] if shares and steps else None
                steps.append(self._make(vgg, index, beside))

    def _make(self, vgg: VGG19, index: int, beside: NetTrainer | None) -> NetTrainer:
        config = self._config
        generator = torch.Generator().manual_seed(config.train.seed)
        net = TransformNet(config.model.architecture, config.model.norm, generator=generator)
        net.to(device=self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        loss = PerceptualLoss(vgg, config.loss).to(self._device)
        style = torch.rand(1, 3, STYLE_SIDE, STYLE_SIDE, generator=torch.Generator().manual_seed(index))
        loss.set_style(style.to(self._device))
        return NetTrainer(net.train(), loss, config.train, self._device, shared_vgg=beside)

    def measure(self) -> dict[str, list[float]]:
        """Seconds per step of all styles, by mode and turn."""
        seconds: dict[str, list[float]] = {"together": [], "alone": []}
        for turn in range(self._turns):
            modes = ["together", "alone"] if turn % 2 == 0 else ["alone", "together"]
            for mode in modes:
                groups = [self._together] if mode == "together" else [[step] for step in self._alone]
                seconds[mode].append(sum(self._segment(turn, group) for group in groups) / self._steps)
                print(f"turn {turn + 1}, {mode}: {seconds[mode][-1]:.3f} s", file=sys.stderr, flush=True)
        return seconds

    def _segment(self, turn: int, group: list[NetTrainer]) -> float:
        """Seconds of the timed steps of a group on one loader."""
        config = self._config
        seed, steps = config.train.seed + turn, self._warm_up + self._steps + self._warm_up
        begin = 0.0
        with loader_of(config, self._manifest, seed, steps, self._device) as loader:
            for number, batch in enumerate(loader):
                if number == self._warm_up:
                    begin = synchronized_time(self._device)
                if number == self._warm_up + self._steps:
                    return synchronized_time(self._device) - begin
                content: Any = group[0].content_features(batch) if len(group) > 1 else None
                for step in group:
                    step.train_step(number + 1, batch, content)
        raise AssertionError("the loader ended before the timed steps did")

    def distance(self) -> float:
        """The largest relative distance between the weights of a style's two networks."""
        distances = [0.0]
        for one, other in zip(self._together, self._alone, strict=True):
            others = dict(other.net.named_parameters())
            for name, weight in one.net.named_parameters():
                difference = float((weight - others[name]).detach().norm())
                distances.append(difference / max(float(others[name].detach().norm()), 1e-30))
        return max(distances)


if __name__ == "__main__":
    sys.exit(main())
