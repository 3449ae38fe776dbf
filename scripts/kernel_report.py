"""What every kernel compiles to, for GPUs that need not be there, and whether that is as it should be.

    python scripts/kernel_report.py [--architecture sm_80,sm_90,sm_100] [--dtype bf16,fp16,fp32] [--op OP,…]
                                    [--json FILE] [--markdown FILE] [--jobs N]

Records the launches of all public ops, forward and backward, at the shapes that count and at odd ones; compiles each
distinct kernel with each of its configurations; prints registers, spills, shared memory, programs that fit on a
multiprocessor, widths of global accesses, matrix instructions and code size; and how many bytes the launches of a call
move against the least that it could. Exits with 1 if a kernel breaks a rule of `kernels/README.md`. What was compiled
before comes out of Triton's cache.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import triton
from kernel_calls import DTYPES, OPS, Call, broken_rules, describe, record_calls
from rich import box
from rich.console import Console
from rich.table import Table

from fastnst_kernels.disassembly import BULK
from fastnst_kernels.inspection import ARCHITECTURES, CompiledKernel, compile_launches

COLUMNS = (
    "kernel",
    "type, layout",
    "configuration",
    "registers",
    "spilled",
    "shared",
    "programs/SM",
    "warps",
    "stages",
    "loads",
    "stores",
    "matrix",
    "code",
)


@dataclass(frozen=True)
class Report:
    """Everything that the report says, before it is written in one form or another."""

    calls: list[Call]
    kernels: list[CompiledKernel]
    broken: list[str]


def make_report(
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    ops: Sequence[str] = tuple(OPS),
    dtypes: Sequence[str] = tuple(DTYPES),
    jobs: int = 1,
) -> Report:
    """Records, compiles in `jobs` processes, and judges.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    calls = [call for architecture in architectures for call in record_calls(architecture, ops, dtypes)]
    kernels = compile_launches([launch for call in calls for launch in call.launches], jobs)
    kernels.sort(key=lambda kernel: (kernel.module, kernel.kernel, kernel.architecture.capability))
    return Report(calls, kernels, broken_rules(kernels, calls))


def kernel_row(kernel: CompiledKernel) -> dict[str, str]:
    """A kernel's figures as text, by column."""
    largest = max(kernel.launches[0].operands, key=lambda operand: operand.bytes)
    pictures = [operand for operand in kernel.launches[0].operands if len(operand.shape) == 4]
    lead = pictures[0] if pictures else largest
    name = {dtype: short for short, dtype in DTYPES.items()}.get(lead.dtype, str(lead.dtype).removeprefix("torch."))
    layout = ("channels_last" if lead.channels_last else "contiguous") if pictures else "matrix"
    options = ("num_warps", "num_stages")
    chosen = {key: value for key, value in kernel.configuration.items() if key not in options}
    limit = kernel.architecture.shared_memory
    return {
        "kernel": kernel.kernel.removeprefix("_").removesuffix("_kernel"),
        "type, layout": f"{name} {layout}",
        "configuration": describe(chosen),
        "registers": str(kernel.registers),
        "spilled": str(kernel.stack + kernel.local),
        "shared": f"{kernel.shared_memory / 1024:.3g} of {limit // 1024} KiB",
        "programs/SM": str(kernel.programs_per_multiprocessor),
        "warps": str(kernel.num_warps),
        "stages": str(kernel.num_stages),
        "loads": _counted(kernel.loads, _width),
        "stores": _counted(kernel.stores, _width),
        "matrix": _counted(kernel.matrix, str),
        "code": f"{kernel.code_size / 1024:.3g} KiB",
    }


def _width(bits: int) -> str:
    return "bulk" if bits == BULK else f"{bits} bit"


def _counted(counts: Any, name: Callable[[Any], str]) -> str:
    """`128 bit ×8, 32 bit ×2`, the widest first."""
    return ", ".join(f"{name(key)} ×{number}" for key, number in sorted(counts.items(), reverse=True))


def traffic_rows(calls: Sequence[Call]) -> list[dict[str, str]]:
    """Launches and bytes of the hot calls in bf16 channels_last at one batch size; alike calls share a row."""
    rows: dict[tuple[str, str, str], list[Call]] = {}
    for call in calls:
        if call.case.hot and (call.case.dtype, call.case.layout, call.case.shape[0]) == ("bf16", "channels_last", 16):
            rows.setdefault((call.case.name, call.direction, call.architecture), []).append(call)
    return [
        {
            "op": name,
            "direction": direction,
            "architecture": architecture,
            "launches": _range([len(call.launches) for call in group], "d"),
            "moved/minimum": _range([call.bytes / call.minimum_bytes for call in group], ".3f"),
        }
        for (name, direction, architecture), group in rows.items()
    ]


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} … {high}"


def as_markdown(report: Report) -> str:
    """The report as a file to keep beside the kernels, where a change of one shows what it did to the machine code."""
    lines = [
        "# Kernel report",
        "",
        "Written by `python scripts/kernel_report.py --markdown kernels/REPORT.md`, without a GPU; "
        f"Triton {triton.__version__}. Nothing here is a measurement of time.",
        "",
        "## Bytes",
        "",
        "All operands of a call's launches, each counted once per launch, against the least that any design moves "
        "(`fastnst_kernels/cost.py`). bf16, channels_last, N = 16, over the shapes that count.",
        "",
        *_markdown_table(traffic_rows(report.calls)),
        "",
        "## Machine code",
    ]
    for architecture in ARCHITECTURES.values():
        rows = [kernel_row(kernel) for kernel in report.kernels if kernel.architecture is architecture]
        unique = list({tuple(row.values()): row for row in rows}.values())
        if rows:
            lines += ["", f"### {architecture.name} ({architecture.gpu})", "", *_markdown_table(unique)]
    lines += ["", "## Broken rules", "", *([f"- {line}" for line in report.broken] or ["None."]), ""]
    return "\n".join(lines)


def _markdown_table(rows: Sequence[dict[str, str]]) -> list[str]:
    if not rows:
        return ["Nothing was recorded."]
    header = list(rows[0])
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *(row.values() for row in rows))]


def as_json(report: Report) -> dict[str, Any]:
    """All figures, for other programs."""
    return {
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "calls": [
            {
                "op": call.case.op,
                "options": call.case.options,
                "shape": call.case.shape,
                "hot": call.case.hot,
                "direction": call.direction,
                "dtype": call.case.dtype,
                "layout": call.case.layout,
                "architecture": call.architecture,
                "launches": [{"kernel": launch.kernel, "identity": launch.identity} for launch in call.launches],
                "bytes": call.bytes,
                "minimum_bytes": call.minimum_bytes,
            }
            for call in report.calls
        ],
        "kernels": [
            {
                "identity": kernel.launches[0].identity,
                "architecture": kernel.architecture.name,
                "module": kernel.module,
                "kernel": kernel.kernel,
                "configuration": {name: str(value) for name, value in kernel.configuration.items()},
                "registers": kernel.registers,
                "stack": kernel.stack,
                "local": kernel.local,
                "shared_memory": kernel.shared_memory,
                "shared_memory_limit": kernel.architecture.shared_memory,
                "tensor_memory": kernel.tensor_memory,
                "programs_per_multiprocessor": kernel.programs_per_multiprocessor,
                "num_warps": kernel.num_warps,
                "num_stages": kernel.num_stages,
                "instructions": kernel.instructions,
                "code_size": kernel.code_size,
                "loads": kernel.loads,
                "stores": kernel.stores,
                "matrix": kernel.matrix,
            }
            for kernel in report.kernels
        ],
        "broken_rules": report.broken,
    }


def show(report: Report, console: Console) -> None:
    """Tables for a terminal."""
    _print_table(console, "Bytes moved against the minimum (bf16, channels_last, N = 16)", traffic_rows(report.calls))
    for architecture in ARCHITECTURES.values():
        rows = [kernel_row(kernel) for kernel in report.kernels if kernel.architecture is architecture]
        _print_table(console, f"{architecture.name} ({architecture.gpu})", rows)
    for line in report.broken:
        console.print(f"broken: {line}", style="red", markup=False, highlight=False)
    console.print(f"{len(report.kernels)} kernels compiled, {len(report.broken)} rules broken", highlight=False)


def _print_table(console: Console, title: str, rows: Sequence[dict[str, str]]) -> None:
    if not rows:
        return
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    numbers = ("registers", "spilled", "programs/SM", "warps", "stages", "code", "launches", "moved/minimum")
    for name in rows[0]:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in {tuple(row.values()): row for row in rows}.values():
        table.add_row(*row.values())
    console.print(table, markup=False, highlight=False)


class _Choices(click.ParamType):
    """Words of a fixed set, separated by commas."""

    name = "list"

    def __init__(self, choices: Sequence[str]) -> None:
        self._choices = tuple(choices)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        chosen = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        for word in chosen:
            if word not in self._choices:
                self.fail(f"{word!r} is not one of {', '.join(self._choices)}", param, ctx)
        return chosen


def _choice(name: str, choices: Sequence[str], text: str) -> Any:
    return click.option(name, type=_Choices(choices), default=",".join(choices), show_default=True, help=text)


@click.command()
@_choice("--architecture", list(ARCHITECTURES), "GPUs to compile for.")
@_choice("--dtype", list(DTYPES), "Types of the pictures.")
@_choice("--op", list(OPS), "Ops to record.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables here.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default="cores", help="Processes that compile.")
def main(
    architecture: tuple[str, ...],
    dtype: tuple[str, ...],
    op: tuple[str, ...],
    json_file: Path | None,
    markdown: Path | None,
    jobs: int,
) -> None:
    """Compile every kernel without a GPU; print registers, spills, shared memory, access widths and the like."""
    report = make_report(architecture, op, dtype, jobs)
    # Into a file or a pipe, lines as wide as the tables are.
    console = Console(width=None if sys.stdout.isatty() else 320)
    show(report, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(report), indent=1) + "\n", "utf-8")
    if markdown is not None:
        markdown.write_text(as_markdown(report), "utf-8")
    sys.exit(1 if report.broken else 0)


if __name__ == "__main__":
    main()
