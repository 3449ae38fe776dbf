"""Read the results of a run, compare them with the targets, and format them as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COPY, FASTNST, EAGER, COMPILE = "copy", "fastnst", "eager", "compile"
DIRECTIONS = ("forward", "backward", "forward+backward")
_DRIFT = 0.03
_TARGET_DEVICE, _TARGET_BATCH = "H200", 16
_TARGET_FORM = ("bf16", "channels_last")

Row = dict[str, Any]


class UnusableResults(Exception):
    """The file holds no kernel benchmarks."""


@dataclass
class Results:
    """Rows of one or more runs on one device, the last of each kind, and the ceilings of each run.

    Attributes:
        rows: `extra_info` of each benchmark.
        ceilings: GB/s of the plain copy at the beginning and end of each run.
    """

    rows: list[Row]
    ceilings: list[tuple[float, float]]

    def __post_init__(self) -> None:
        self._index = {_key(row): row for row in self.rows}
        self.rows = list(self._index.values())

    @property
    def environment(self) -> Row:
        return self.rows[0]

    @property
    def ceiling(self) -> float:
        """GB/s of the plain copy that the percentages refer to, the mean of the runs."""
        return sum(row["copy_gb_per_s"] for row in self.rows) / len(self.rows)

    def get(self, op: str, shape: Sequence[int], direction: str, provider: str) -> Row | None:
        return self._index.get((op, tuple(shape), direction, provider))

    def cases(self, direction: str, batch: int | None = None) -> list[tuple[str, tuple[int, ...]]]:
        """Op and shape of everything measured in one direction, in the order measured."""
        found = {(row["op"], tuple(row["shape"])): None for row in self.rows if row["direction"] == direction}
        return [case for case in found if batch is None or case[1][0] == batch]

    def providers(self) -> list[str]:
        return list(dict.fromkeys(row["provider"] for row in self.rows))

    def batch_to_show(self) -> int:
        """16, the targets' batch; else the largest."""
        batches = {row["shape"][0] for row in self.rows}
        return _TARGET_BATCH if _TARGET_BATCH in batches else max(batches)


def _key(row: Row) -> tuple[str, tuple[int, ...], str, str]:
    return row["op"], tuple(row["shape"]), row["direction"], row["provider"]


def _load(file: Path) -> dict[str, Any]:
    """The kernel benchmarks in one of pytest-benchmark's JSON files.

    Raises:
        UnusableResults: it is missing, is something else, or has none.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        content["benchmarks"] = [bench for bench in content["benchmarks"] if "op" in bench["extra_info"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UnusableResults(f"{file} is no JSON of kernel benchmarks: {error!r}") from error
    if not content["benchmarks"]:
        raise UnusableResults(f"{file} holds no kernel benchmarks")
    return content


def read(files: Iterable[Path]) -> Results:
    """The rows of pytest-benchmark's JSON files.

    Raises:
        UnusableResults: a file holds no kernel benchmarks, or is of another device, dtype or layout than the first.
    """
    contents = [_load(file) for file in files]
    rows = [bench["extra_info"] for content in contents for bench in content["benchmarks"]]
    for key in ("device", "dtype", "layout"):
        values = {row[key] for row in rows}
        if len(values) > 1:
            raise UnusableResults(f"the files differ in their {key}: {', '.join(sorted(values))}; report them apart")
    return Results(rows, [ends for content in contents for ends in _ceilings(content)])


def _ceilings(content: dict[str, Any]) -> list[tuple[float, float]]:
    return [(copy["begin"], copy["end"]) for copy in content.get("copy_gb_per_s", [])]


def merge(files: Sequence[Path], target: Path) -> None:
    """Write one file with the benchmarks of all; other content is that of the first file.

    Raises:
        UnusableResults: as for `read`.
    """
    contents = [_load(file) for file in files]
    for key in ("benchmarks", "copy_gb_per_s"):
        contents[0][key] = [entry for content in contents for entry in content.get(key, [])]
    target.write_text(json.dumps(contents[0], indent=1), "utf-8")


@dataclass(frozen=True)
class Target:
    """A target of the library for some ops in one direction, at N = 16 on an H200, for every shape.

    Attributes:
        text: for the table.
        op: the ops' name up to a `+`.
        direction: forward, backward or both.
        least: of `value`.
        cases: combinations of op and shape to measure.
        against: the value is this provider's time over the library's; without one it is TB/s.
    """

    text: str
    op: str
    direction: str
    least: float
    cases: int = 5
    against: str | None = None

    def value(self, results: Results, op: str, shape: Sequence[int]) -> float | None:
        own = results.get(op, shape, self.direction, FASTNST)
        if own is None:
            return None
        if self.against is None:
            return own["gb_per_s"] / 1000
        other = results.get(op, shape, self.direction, self.against)
        return None if other is None else other["p50_us"] / own["p50_us"]

    @property
    def unit(self) -> str:
        return " TB/s" if self.against is None else "×"


def _norm_targets(op: str) -> list[Target]:
    return [
        Target(f"{op} forward", op, "forward", 3.6, 15),
        Target(f"{op} backward", op, "backward", 3.4, 15),
        Target(f"{op} forward + backward against eager", op, "forward+backward", 3.0, 15, EAGER),
        Target(f"{op} forward + backward against torch.compile", op, "forward+backward", 1.3, 15, COMPILE),
    ]


TARGETS = [
    *_norm_targets("instance_norm"),
    *_norm_targets("batch_norm_training"),
    Target(
        "style_loss forward + backward against torch.compile", "style_loss", "forward+backward", 1.5, against=COMPILE
    ),
    Target(
        "style_loss forward + backward against cuBLAS (eager)", "style_loss", "forward+backward", 1.0, against=EAGER
    ),
    Target("max_pool2d_switches forward", "max_pool2d_switches", "forward", 3.6),
    Target("max_pool2d_switches forward against eager", "max_pool2d_switches", "forward", 2.0, against=EAGER),
    Target("max_unpool2d_switches forward against eager", "max_unpool2d_switches", "forward", 3.0, against=EAGER),
]


@dataclass(frozen=True)
class Verdict:
    """`met`, `not met`, `not measured` or, if no case fails but some are missing, `not measured in full`."""

    target: Target
    word: str
    worst: float | None
    where: str
    met: int
    measured: int


def check(target: Target, results: Results) -> Verdict:
    """Met: by every case, on the target's device, dtype and layout."""
    conditions, values = results.environment, []
    if _TARGET_DEVICE in conditions["device"] and (conditions["dtype"], conditions["layout"]) == _TARGET_FORM:
        for op, shape in results.cases(target.direction, _TARGET_BATCH):
            value = target.value(results, op, shape) if op.partition("+")[0] == target.op else None
            if value is not None:
                values.append((value, f"{op} {list(shape)}"))
    if not values:
        return Verdict(target, "not measured", None, "", 0, 0)
    met = sum(value >= target.least for value, _ in values)
    worst, where = min(values)
    complete = "met" if len(values) >= target.cases else "not measured in full"
    return Verdict(target, complete if met == len(values) else "not met", worst, where, met, len(values))


def markdown(results: Results) -> str:
    """The whole report."""
    conditions = results.environment
    of = [f"{conditions['device']}", f"PyTorch {conditions['torch']}", f"Triton {conditions['triton']}"]
    if conditions["driver"]:
        of += [f"CUDA {conditions['cuda']}", f"driver {conditions['driver']}"]
    parts = [
        "# Kernel benchmarks",
        f"{', '.join(of)}; {conditions['date']}, revision {conditions['revision']}; "
        f"{conditions['dtype']}, {conditions['layout']}.",
        "Times are medians of device time with cold caches; GB/s counts the minimum bytes of the op; "
        "% is of a plain copy in the same run. A provider with wrong results has no row.",
        _ceiling_text(results),
    ]
    if conditions["device_type"] == "cpu":
        parts.append("**Measured on a CPU with PyTorch's own code: this says nothing about the kernels.**")
    parts += ["## Targets", _target_table(results)]
    for direction in DIRECTIONS:
        if results.cases(direction):
            parts += [f"## {direction.replace('+', ' + ').capitalize()}", _table(results, direction)]
    if remarks := _remarks(results):
        parts += ["## Caveats", "\n".join(f"- {remark}" for remark in remarks)]
    return "\n\n".join(parts) + "\n"


def _ceiling_text(results: Results) -> str:
    text = f"Plain copy, the ceiling: {results.ceiling:,.0f} GB/s"
    ends = ", ".join(f"{begin:,.0f} at the beginning and {end:,.0f} at the end" for begin, end in results.ceilings)
    return f"{text} ({ends} of the run)." if ends else f"{text}."


def _target_table(results: Results) -> str:
    lines = []
    for target in TARGETS:
        verdict = check(target, results)
        worst = "" if verdict.worst is None else f"{verdict.worst:.2f}{target.unit} ({verdict.where})"
        count = (
            "" if verdict.worst is None else f": {verdict.met} of {verdict.measured} measured, {target.cases} in all"
        )
        lines.append((target.text, f"≥ {target.least}{target.unit}", worst, verdict.word + count))
    return _lines(("at N = 16, bf16, channels_last, on an H200", "wanted", "worst", "verdict"), lines)


def _table(results: Results, direction: str) -> str:
    others = [name for name in results.providers() if name not in (FASTNST, COPY)]
    heads = ["op", "shape", "least MB", "fastnst µs", "p20 … p80", "GB/s", "%"]
    heads += [head for name in others for head in (f"{name} µs", f"× {name}")] + ["copy µs", "launches", "peak MB"]
    lines = []
    for op, shape in results.cases(direction):
        rows = {name: results.get(op, shape, direction, name) for name in results.providers()}
        some = next(row for row in rows.values() if row is not None)
        own = rows.get(FASTNST)
        line = [op, "×".join(map(str, shape)), f"{some['minimum_bytes'] / 1e6:,.1f}"]
        line += [
            _of(own, lambda r: f"{r['p50_us']:,.1f}"),
            _of(own, lambda r: f"{r['p20_us']:,.1f} … {r['p80_us']:,.1f}"),
        ]
        line += [_of(own, lambda r: f"{r['gb_per_s']:,.0f}"), _of(own, lambda r: f"{r['percent_of_copy']:.0f}")]
        for name in others:
            other = rows[name]
            line.append(_of(other, lambda r: f"{r['p50_us']:,.1f}"))
            line.append(f"{other['p50_us'] / own['p50_us']:.2f}" if own and other else "–")
        line.append(_of(rows.get(COPY), lambda r: f"{r['p50_us']:,.1f}"))
        line.append(_of(own, lambda r: "–" if r["launches"] is None else str(r["launches"])))
        line.append(
            _of(own, lambda r: "–" if r["peak_memory_bytes"] is None else f"{r['peak_memory_bytes'] / 1e6:,.0f}")
        )
        lines.append(tuple(line))
    return _lines(heads, lines)


def _of(row: Row | None, text: Callable[[Row], str]) -> str:
    return "–" if row is None else text(row)


def _remarks(results: Results) -> list[str]:
    remarks = []
    for row in results.rows:
        name = f"{row['op']} {row['shape']} {row['direction']}, {row['provider']}"
        if row["launch_overhead_included"]:
            remarks.append(f"{name}: the host could not keep ahead of the device, so launching is in the time")
        if row["device_type"] == "cuda" and abs(row["drift"] - 1) > _DRIFT:
            remarks.append(f"{name}: its second half took {row['drift']:.2f} times as long as its first")
    return remarks


def _lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
