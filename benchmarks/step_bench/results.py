"""Format rows as a table, and compare fastnst with the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from step_bench.providers import EAGER

Row = dict[str, Any]

_HEAD = "| provider | precision | batch | busy | images/s | ms/step | p20–p80 | within 5 % | peak MB | roofline |"


def compare(rows: Sequence[Row], batch_size: int) -> None:
    """Add to fastnst's row of this batch size its ratios to the fastest eager baseline."""
    own = [row for row in rows if row["batch_size"] == batch_size]
    eager = [row for row in own if row["provider"] in EAGER]
    for row in own:
        if row["provider"] == "fastnst" and eager:
            best = max(eager, key=lambda other: other["images_per_second"])
            row["best_eager"] = best["provider"]
            row["speed_over_best_eager"] = row["images_per_second"] / best["images_per_second"]
            row["memory_over_best_eager"] = row["peak_memory_bytes"] / best["peak_memory_bytes"]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, and a line for each comparison."""
    if not rows:
        return "nothing was measured\n"
    lines = [_HEAD, "|" + " --- |" * (_HEAD.count("|") - 1)]
    for row in rows:
        peak = "–" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:.1f}"
        lines.append(
            f"| {row['provider']} | {row['precision']} | {row['batch_size']} | {row['busy']} | "
            f"{row['images_per_second']:.2f} | {row['ms_per_step']:.2f} | {row['p20_ms']:.2f}–{row['p80_ms']:.2f} | "
            f"{row['within_5_percent']:.0%} | {peak} | {row['roofline_percent']:.1f} % |"
        )
    for row in rows:
        others = [other for other in rows if other["batch_size"] == row["batch_size"]]
        if row["provider"] != "fastnst" or len(others) < 2:
            continue
        ratios = [
            f"{row['images_per_second'] / other['images_per_second']:.2f}× {other['provider']}"
            for other in others
            if not other["provider"].startswith("fastnst")
        ]
        line = f"\nbatch {row['batch_size']}: fastnst processes {', '.join(ratios)} images/s"
        if "best_eager" in row:
            line += f", and needs {row['memory_over_best_eager']:.2f}× the memory of {row['best_eager']}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def page(rows: Sequence[Row]) -> str:
    """The table with its conditions."""
    if not rows:
        return "# Training steps\n\nNothing was measured.\n"
    row, conditions = rows[0], rows[0]["environment"]
    return (
        f"# Training steps\n\n{conditions['device']}, torch {conditions['torch']}, {conditions['threads']} threads, "
        f"revision {conditions['revision']}, {conditions['date']}; preset {row['preset']}, {row['image_size']}², "
        f"{row['steps']} steps of each provider, in turns. Peak: beyond the weights. Roofline: "
        f"{row['tflops']:.4g} TFLOP/s, {row['tb_per_s']:.4g} TB/s.\n\n{table(rows)}"
    )
