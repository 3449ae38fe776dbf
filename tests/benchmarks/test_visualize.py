"""The benchmark of the projections runs, and reports what it says it reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", PROJECT / "benchmarks" / "visualize.py", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(PROJECT), str(PROJECT / "kernels")))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_benchmark_prints_all_rows_and_ratios_and_writes_json(generated_photos: Path, tmp_path: Path) -> None:
    options = ["--vgg", "random", "--size", "48", "--threads", "1", "--quick", "--json", tmp_path / "out.json"]
    result = _run("--folder", generated_photos, *options)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert report["settings"]["images"] == 12
    assert (report["settings"]["maps"], report["settings"]["weights"]) == (16, "random")
    assert {"python", "torch", "device", "threads", "revision", "date"} <= set(report["environment"])
    assert str(generated_photos) not in json.dumps(report)
    rows = {row["name"]: row["seconds"] for row in report["rows"]}
    assert len(rows) == 5
    lines = result.stdout.splitlines()
    for row, line in zip(report["rows"], lines, strict=False):
        assert line.startswith(row["name"])
        assert f"{row['seconds']:.2f} s" in line
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
    assert len(report["ratios"]) == 3
    for ratio, line in zip(report["ratios"], lines[5:], strict=True):
        assert ratio["ratio"] == rows[ratio["name"]] / rows[ratio["beside"]]
        assert ratio["met"] == (ratio["ratio"] <= ratio["at_most"])
        assert line.endswith("NOT MET") == (not ratio["met"])


def test_benchmark_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    result = _run("--folder", tmp_path, "--vgg", "random")
    assert result.returncode != 0
    assert "holds no images" in result.stderr
    assert "Traceback" not in result.stderr
