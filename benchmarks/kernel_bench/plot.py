"""Plot the achieved bandwidth of every op and provider against the plain copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from kernel_bench.results import COPY, DIRECTIONS, FASTNST, Results, UnusableResults

mpl.use("Agg")  # needs no display

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory
from result_files import SOFTWARE

# Colours that people with any colour vision can distinguish (Okabe and Ito), and shapes, for printing in grey.
_STYLES: dict[str, dict[str, Any]] = {
    FASTNST: {"color": "#D55E00", "marker": "o", "markersize": 7.5, "zorder": 5},
    "compile": {"color": "#0072B2", "marker": "D", "markersize": 5.5, "zorder": 4},
    "compile-max-autotune": {"color": "#56B4E9", "marker": "d", "markersize": 6.5, "zorder": 3.5},
    "eager": {"color": "#009E73", "marker": "s", "markersize": 5.5, "zorder": 3},
    COPY: {"color": "#777777", "marker": "|", "markersize": 11, "markeredgewidth": 1.8, "zorder": 2},
}
_OTHER = {"color": "#CC79A7", "marker": "^", "markersize": 6, "zorder": 3}
_LABELS = {COPY: "copy of the same size"}
_ROW_INCHES = 0.23
_HEAD_INCHES, _FOOT_INCHES = 1.55, 0.6  # above and below the panels

Row = tuple[str, tuple[int, ...]]


def draw(results: Results, file: Path, batch: int) -> None:
    """Write the plot: one row per op and shape with `batch` samples, one column per direction.

    Raises:
        UnusableResults: nothing was measured with that many samples.
    """
    cases = list(dict.fromkeys(case for direction in DIRECTIONS for case in results.cases(direction, batch)))
    if not cases:
        raise UnusableResults(f"nothing was measured with N = {batch}")
    names: dict[str, float] = {}
    positions: dict[Row, float] = {}
    y = -0.4
    for op in dict.fromkeys(op for op, _ in cases):
        y += 1.4
        names[op] = y
        for case in cases:
            if case[0] == op:
                y += 1
                positions[case] = y
    height = (y + 1) * _ROW_INCHES + _HEAD_INCHES + _FOOT_INCHES
    figure = Figure(figsize=(13, height), facecolor="white")
    axes = figure.subplots(1, len(DIRECTIONS), sharey=True)
    for ax, direction in zip(axes, DIRECTIONS, strict=True):
        _panel(ax, results, positions, direction, batch)
        ax.set_ylim(y + 1, 0)
        for name_y in list(names.values())[1:]:
            ax.axhline(name_y - 0.7, color="#EDEDED", linewidth=0.8, zorder=0)
    axes[0].set_yticks(list(positions.values()), ["×".join(map(str, shape[1:])) for _, shape in positions])
    for op, name_y in names.items():
        text = op.replace("_switches", "").replace("_", " ").replace("+", " + ")
        left_of_panels = blended_transform_factory(figure.transFigure, axes[0].transData)
        axes[0].text(0.015, name_y, text, transform=left_of_panels, va="center", fontsize=9.5, fontweight="bold")
    conditions = results.environment
    title = f"{conditions['device']}: achieved bandwidth, N = {batch}, {conditions['dtype']}, {conditions['layout']}"
    figure.text(0.015, 1 - 0.22 / height, title, fontsize=15, fontweight="bold", va="top")
    figure.text(0.015, 1 - 0.54 / height, _subtitle(results), fontsize=9.5, color="#555555", va="top")
    _legend(figure, results, 1 - 0.74 / height)
    figure.subplots_adjust(
        left=0.195, right=0.985, top=1 - _HEAD_INCHES / height, bottom=_FOOT_INCHES / height, wspace=0.05
    )
    figure.savefig(file, dpi=110, metadata={"Software": SOFTWARE} if file.suffix == ".png" else None)


def _panel(ax: Axes, results: Results, positions: dict[Any, float], direction: str, batch: int) -> None:
    ceiling = results.ceiling
    measured = [row["gb_per_s"] for row in results.rows if row["direction"] == direction and row["shape"][0] == batch]
    ax.set_title(direction.replace("+", " + "), fontsize=12, fontweight="bold", pad=10)
    ax.axvline(ceiling, color="#222222", linewidth=1.4, linestyle=(0, (5, 3)), zorder=1.5)
    ax.set_xlim(0, 1.06 * max([ceiling, *measured]))
    ax.set_xlabel("GB/s of the minimum bytes", fontsize=10)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    ax.grid(axis="x", color="#E3E3E3", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(axis="both", length=0, labelsize=9)
    ax.tick_params(axis="x", labeltop=True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    for (op, shape), y in positions.items():
        rows = [results.get(op, shape, direction, name) for name in results.providers()]
        present = [row for row in rows if row is not None]
        if not present:
            continue
        # A faint line joins the points of a row.
        values = [row["gb_per_s"] for row in present]
        ax.plot([0, max(values)], [y, y], color="#D5D5D5", linewidth=0.9, zorder=1)
        for row in present:
            ends = [row["minimum_bytes"] / row[key] / 1e3 for key in ("p80_us", "p20_us")]
            style = _STYLES.get(row["provider"], _OTHER)
            if row["provider"] != COPY:
                ax.plot(ends, [y, y], color=style["color"], linewidth=2.2, alpha=0.45, zorder=style["zorder"] - 0.2)
            edge: dict[str, Any] = (
                {} if row["provider"] == COPY else {"markeredgecolor": "white", "markeredgewidth": 0.7}
            )
            ax.plot(row["gb_per_s"], y, linestyle="none", **edge, **style)


def _subtitle(results: Results) -> str:
    conditions = results.environment
    versions = f"PyTorch {conditions['torch']}, Triton {conditions['triton']}"
    driver = f", driver {conditions['driver']}" if conditions["driver"] else ""
    bars = "bars span the 20th to the 80th percentile"
    return f"{versions}{driver}; {conditions['date']}, revision {conditions['revision']}. Points are medians, {bars}."


def _legend(figure: Figure, results: Results, top: float) -> None:
    known = list(_STYLES)
    handles = [
        Line2D([], [], linestyle="none", label=_LABELS.get(name, name), **_STYLES.get(name, _OTHER))
        for name in sorted(results.providers(), key=lambda name: known.index(name) if name in known else len(known))
    ]
    text = f"ceiling: a large copy, {results.ceiling:,.0f} GB/s"
    handles.append(Line2D([], [], color="#222222", linewidth=1.4, linestyle=(0, (5, 3)), label=text))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.008, top), ncols=len(handles), frameon=False,
                  fontsize=10, handletextpad=0.5, columnspacing=1.8)  # fmt: skip
