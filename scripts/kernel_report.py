"""Compile every kernel for several GPUs, without having one, and check the machine code against rules.

    python scripts/kernel_report.py [--architecture sm_80,sm_90,sm_100] [--dtype bf16,fp16,fp32] [--op OP,…]
                                    [--thorough] [--json FILE] [--markdown FILE] [--bytes FILE] [--jobs N]

Records the launches of all public ops, forward and backward, at the networks' shapes and at odd ones; compiles each
distinct kernel with each of its configurations; prints registers, spills, shared memory, programs per multiprocessor,
widths of global accesses, matrix instructions and code size; and the bytes that the launches of a call move over the
minimum. Exits with 1 if a kernel breaks a rule of `kernels/README.md`. Kernels compiled before come from Triton's
cache.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import triton
from kernel_calls import (
    ADD,
    DTYPES,
    IMAGE_OPTIONS,
    IMAGE_SHAPE,
    LAYER_SHAPES,
    NORM_SHAPES,
    OPS,
    UPSAMPLE,
    Call,
    Case,
    broken_rules,
    describe,
    record_calls,
)
from rich import box
from rich.console import Console
from rich.table import Table

from fastnst_kernels.inspection import ARCHITECTURES, CompiledKernel, compile_launches
from fastnst_kernels.inspection.disassembly import BULK

BEGIN = "<!-- written by python scripts/kernel_report.py --bytes kernels/README.md -->"
END = "<!-- end -->"


@dataclass(frozen=True)
class Report:
    """The content of the report, before it is formatted."""

    calls: list[Call]
    kernels: list[CompiledKernel]
    broken: list[str]


def make_report(
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    ops: Sequence[str] = tuple(OPS),
    dtypes: Sequence[str] = tuple(DTYPES),
    jobs: int = 1,
    *,
    thorough: bool = False,
) -> Report:
    """Record (`thorough`: every combination), compile in `jobs` processes, and check.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    calls = [
        call for architecture in architectures for call in record_calls(architecture, ops, dtypes, thorough=thorough)
    ]
    kernels = compile_launches([launch for call in calls for launch in call.launches], jobs)
    kernels.sort(key=lambda kernel: (kernel.module, kernel.kernel, kernel.architecture.capability))
    return Report(calls, kernels, broken_rules(kernels, calls))


def kernel_row(kernel: CompiledKernel) -> dict[str, str]:
    """A kernel's figures as text, by column."""
    largest = max(kernel.launches[0].operands, key=lambda operand: operand.bytes)
    images = [operand for operand in kernel.launches[0].operands if len(operand.shape) == 4]
    lead = images[0] if images else largest
    name = {dtype: short for short, dtype in DTYPES.items()}.get(lead.dtype, str(lead.dtype).removeprefix("torch."))
    layout = ("channels_last" if lead.channels_last else "contiguous") if images else "matrix"
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


def traffic_rows(calls: Sequence[Call], shapes: Sequence[tuple[int, int, int]]) -> list[dict[str, str]]:
    """Bytes moved over the minimum, and launches in brackets, of calls that `is_in_tables`."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for call in calls:
        case = call.case
        if is_in_tables(case) and case.shape[1:] in shapes:
            row = rows.setdefault((case.name, call.direction), {"op": f"`{case.name}`", "": call.direction})
            ratio = call.bytes / call.minimum_bytes
            row["×".join(map(str, case.shape[1:]))] = f"{ratio:.3f} ({len(call.launches)})"
    return list(rows.values())


def is_in_tables(case: Case) -> bool:
    """Whether it is in the tables of bytes: bf16, channels_last, N = 16; of the norms' epilogues three."""
    epilogue = {name: value for name, value in case.options.items() if name != "training"}
    kind = (case.dtype, case.layout, case.shape[0], case.hot)
    return kind == ("bf16", "channels_last", 16, True) and (
        not case.op.endswith("norm") or epilogue in ({}, ADD, UPSAMPLE)
    )


def bytes_section() -> str:
    """The tables of bytes in `kernels/README.md`; nothing is compiled."""
    calls = record_calls("sm_90", thorough=True, only=is_in_tables)
    norms = [call for call in calls if call.case.op.endswith("norm")]
    images = [call for call in calls if call.case.op in IMAGE_OPTIONS]
    layers = [call for call in calls if not call.case.op.endswith("norm") and call.case.op not in IMAGE_OPTIONS]
    kinds = ((norms, NORM_SHAPES), (layers, LAYER_SHAPES), (images, [IMAGE_SHAPE]))
    tables = [_markdown_table(traffic_rows(*kind)) for kind in kinds]
    return "\n\n".join("\n".join(table) for table in tables)


def with_bytes_section(text: str) -> str:
    """`text` with its section of bytes rewritten.

    Raises:
        ValueError: it has no such section.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN} … {END} to write between")
    return f"{head}{begin}\n{bytes_section()}\n{end}{tail}"


def as_markdown(report: Report) -> str:
    """The report as a file: compare those before and after a change."""
    lines = [
        "# Machine code of the kernels",
        "",
        f"Written by `scripts/kernel_report.py`, without a GPU; Triton {triton.__version__}.",
        "",
        "A cell: registers per thread, programs that fit on a multiprocessor, shared memory of a program, bits of the "
        "widest global load and store, matrix instructions; spilled bytes if there are any.",
    ]
    kinds: dict[tuple[str, str], list[CompiledKernel]] = {}
    for kernel in report.kernels:
        kinds.setdefault((kernel.module.removeprefix("fastnst_kernels."), kernel.kernel), []).append(kernel)
    for (module, name), kernels in kinds.items():
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for kernel in kernels:
            kind, configuration = kernel_row(kernel)["type, layout"], f"`{_shortened(kernel.configuration)}`"
            row = rows.setdefault((kind, configuration), {"type, layout": kind, "configuration": configuration})
            # Kernels of one configuration may differ in which arguments are multiples of 16.
            known = row.get(kernel.architecture.name, "").split("<br>")
            row[kernel.architecture.name] = "<br>".join(sorted({*known, _cell(kernel)} - {""}))
        lines += ["", f"## `{module}.{name}`", "", *_markdown_table(list(rows.values()))]
    lines += ["", "## Broken rules", "", *([f"- {line}" for line in report.broken] or ["None."]), ""]
    return "\n".join(lines)


def _shortened(configuration: Mapping[str, Any]) -> str:
    """Without options that are off."""
    return describe({name: value for name, value in configuration.items() if value not in (False, None, 0)})


def _cell(kernel: CompiledKernel) -> str:
    words = [
        f"{kernel.registers} reg",
        f"{kernel.programs_per_multiprocessor}/SM",
        f"{kernel.shared_memory / 1024:.3g} KiB",
        f"{kernel.widest_load}/{kernel.widest_store}",
        _counted(kernel.matrix, str),
        f"{kernel.stack + kernel.local} spilled" if kernel.stack + kernel.local else "",
    ]
    return " · ".join(word for word in words if word)


def _markdown_table(rows: Sequence[dict[str, str]]) -> list[str]:
    header = _header(rows)
    cells = [[row.get(name, "") for name in header] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *cells)]


def _header(rows: Sequence[dict[str, str]]) -> list[str]:
    return list({name: None for row in rows for name in row})


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
    calls = [call for call in report.calls if call.architecture == report.calls[0].architecture]
    for shapes in (NORM_SHAPES, LAYER_SHAPES, [IMAGE_SHAPE]):
        title = "Bytes moved over the minimum (launches); bf16, channels_last, N = 16"
        _print_table(console, title, traffic_rows(calls, shapes))
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
    for name in _header(rows):
        numeric = name in ("registers", "spilled", "programs/SM", "warps", "stages", "code")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in {tuple(row.values()): row for row in rows}.values():
        table.add_row(*(row.get(name, "") for name in _header(rows)))
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


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@_choice("--architecture", list(ARCHITECTURES), "GPUs to compile for.")
@_choice("--dtype", list(DTYPES), "Types of the images.")
@_choice("--op", list(OPS), "Ops to record.")
@click.option("--thorough", is_flag=True, help="Every combination, instead of one per branch of the dispatch.")
@click.option("--json", "json_file", type=_FILE, help="Write all figures here.")
@click.option("--markdown", type=_FILE, help="Write tables here.")
@click.option("--bytes", "readme", type=_FILE, help="Write the tables of bytes into this file; compile nothing.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default="cores", help="Processes that compile.")
def main(
    architecture: tuple[str, ...],
    dtype: tuple[str, ...],
    op: tuple[str, ...],
    thorough: bool,
    json_file: Path | None,
    markdown: Path | None,
    readme: Path | None,
    jobs: int,
) -> None:
    """Compile every kernel without a GPU; print registers, spills, shared memory and access widths."""
    if readme is not None:
        readme.write_text(with_bytes_section(readme.read_text("utf-8")), "utf-8")
        return
    report = make_report(architecture, op, dtype, jobs, thorough=thorough)
    # In a file or a pipe, lines as wide as the tables.
    console = Console(width=None if sys.stdout.isatty() else 320)
    show(report, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(report), indent=1) + "\n", "utf-8")
    if markdown is not None:
        markdown.write_text(as_markdown(report), "utf-8")
    sys.exit(1 if report.broken else 0)


if __name__ == "__main__":
    main()
