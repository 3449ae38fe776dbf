"""Lower bound of a training step on any GPU, layer by layer: FLOPs, bytes, ms and images/s.

    python benchmarks/roofline.py --tflops 790 --tb-per-s 4.3
    python benchmarks/roofline.py --preset johnson --batch-size 32 --precision bf16 --markdown plan.md --json plan.json

A GPU is described by two rates: of its matrix products, and of a plain copy (bytes read and written together). A layer
takes at least its FLOPs over the one or its bytes over the other, whichever is longer, and the step the sum of its
layers, without overlap. `bound` counts the minimum bytes, `plan` those that we move; both are defined in
`benchmarks/step_bench/cost_model.py`. The default is an H200: 790 TFLOP/s in bf16, 4.3 TB/s.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from result_files import result_file
from step_bench.cost_model import totals, training_step
from step_bench.kernel_traffic import ARCHITECTURE, can_record
from step_bench.operations import PARTS, Operation

from fastnst.config import Config, load_config
from fastnst.device import resolve_precision
from fastnst.errors import UserError

H200_TFLOPS, H200_TB_PER_S = 790.0, 4.3


@dataclass(frozen=True)
class Machine:
    """The two rates of a GPU or CPU."""

    tflops: float = H200_TFLOPS
    tb_per_s: float = H200_TB_PER_S

    def seconds(self, operations: Sequence[Operation], *, planned: bool = False) -> float:
        rates = self.tflops * 1e12, self.tb_per_s * 1e12
        return sum(operation.seconds(*rates, planned=planned) for operation in operations)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tflops", type=_positive, default=H200_TFLOPS, help="10¹² FLOPs per second; default: 790")
    add("--tb-per-s", type=_positive, default=H200_TB_PER_S, help="10¹² bytes per second; default: 4.3")
    add("--preset", help="default: hwalsuklee")
    add("--image-size", type=int, default=256, help="side of the images; default: 256")
    add("--batch-size", type=int, default=32, help="default: 32")
    add("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: bf16")
    add("--set", dest="assignments", action="append", default=[], metavar="SECTION.KEY=VALUE")
    add("--markdown", type=result_file, metavar="FILE", help="write the tables here instead of to the terminal")
    add("--json", type=result_file, metavar="FILE", help="write every pass and the sums here")
    options = parser.parse_args(arguments)
    try:
        config = configured(options.preset, options.image_size, options.batch_size, options.assignments)
    except UserError as error:
        print(f"roofline: {error}", file=sys.stderr)
        return error.exit_code
    machine = Machine(options.tflops, options.tb_per_s)
    operations = training_step(config, options.precision)
    text = markdown(config, options.precision, machine, operations)
    if options.markdown is None:
        print(text, end="")
    else:
        options.markdown.write_text(text, "utf-8")
    if options.json is not None:
        report = as_json(config, options.precision, machine, operations)
        options.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


def configured(
    preset: str | None,
    image_size: int,
    batch_size: int,
    assignments: Sequence[str] = (),
    device: torch.device | None = None,
) -> Config:
    """Load a preset's configuration at these sizes, without FASTNST_ variables; `device` resolves its precision.

    Raises:
        UserError: a value is wrong.
    """
    sizes = {"data.image_size": image_size, "train.batch_size": batch_size}
    config = load_config(preset=preset, assignments=assignments, options=sizes, environment={})
    if device is None:
        return config
    resolved = {"precision": resolve_precision(config.train.precision, device), "device": device.type}
    return config.model_copy(update={"train": config.train.model_copy(update=resolved)})


def summary(config: Config, machine: Machine, operations: Sequence[Operation]) -> dict[str, Any]:
    """Sums over the step."""
    batch, sums = config.train.batch_size, totals(operations)
    bound, plan = machine.seconds(operations), machine.seconds(operations, planned=True)
    return {
        **sums,
        "moved_over_minimum": sums["moved_bytes"] / sums["minimum_bytes"],
        "gflop_per_image": sums["flops"] / batch / 1e9,
        "bound_ms": 1000 * bound,
        "bound_images_per_second": batch / bound,
        "plan_ms": 1000 * plan,
        "plan_images_per_second": batch / plan,
        "flops_only_images_per_second": batch * machine.tflops * 1e12 / sums["flops"],
    }


def as_json(config: Config, precision: str, machine: Machine, operations: Sequence[Operation]) -> dict[str, Any]:
    rows = []
    for operation in operations:
        bound, plan = machine.seconds([operation]), machine.seconds([operation], planned=True)
        rows.append(asdict(operation) | {"bound_us": 1e6 * bound, "plan_us": 1e6 * plan})
    return {"settings": _settings(config, precision, machine), **summary(config, machine, operations), "passes": rows}


def markdown(config: Config, precision: str, machine: Machine, operations: Sequence[Operation]) -> str:
    """Format the sums, the parts of the step, and its layers."""
    settings, whole = _settings(config, precision, machine), summary(config, machine, operations)
    lines = [
        f"# A training step on {machine.tflops:g} TFLOP/s and {machine.tb_per_s:g} TB/s",
        "",
        f"Preset {settings['preset']}, {settings['image_size']}², batch {settings['batch_size']}, {precision}; "
        f"our bytes: {settings['moved_bytes_from']}.",
        "",
        f"- {whole['gflop_per_image']:.1f} GFLOP per image; by FLOPs alone "
        f"{whole['flops_only_images_per_second']:.0f} images/s",
        f"- bound: {whole['bound_ms']:.2f} ms per step, {whole['bound_images_per_second']:.0f} images/s",
        f"- plan: {whole['plan_ms']:.2f} ms per step, {whole['plan_images_per_second']:.0f} images/s, moving "
        f"{whole['moved_over_minimum']:.3f} times the minimum bytes",
        "",
        *_table("part", [(part, [op for op in operations if op.part == part]) for part in PARTS], machine),
        *_table("all", [("step", list(operations))], machine),
        "",
        "## Layers",
        "",
        *_table("pass", [(f"{op.part}: {op.layer} {op.kind}", [op]) for op in operations], machine),
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, groups: Sequence[tuple[str, Sequence[Operation]]], machine: Machine) -> list[str]:
    lines = [
        f"| {title} | GFLOP | minimum MB | moved MB | moved / minimum | bound µs | plan µs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in groups:
        if not group:
            continue
        sums = totals(group)
        least, moved = sums["minimum_bytes"], sums["moved_bytes"]
        ratio = f"{moved / least:.2f}" if least else "–"
        bound, plan = (1e6 * machine.seconds(group, planned=planned) for planned in (False, True))
        lines.append(
            f"| {name} | {sums['flops'] / 1e9:.1f} | {least / 1e6:.1f} | {moved / 1e6:.1f} | {ratio} | {bound:.1f} | "
            f"{plan:.1f} |"
        )
    return lines


def _settings(config: Config, precision: str, machine: Machine) -> dict[str, Any]:
    recorded = f"launches recorded for {ARCHITECTURE}" if can_record() else "the cost model (no Triton to record with)"
    return {
        "preset": config.preset,
        "image_size": config.data.image_size,
        "batch_size": config.train.batch_size,
        "precision": precision,
        "moved_bytes_from": recorded,
        **asdict(machine),
    }


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a rate; give a number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
