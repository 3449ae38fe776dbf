"""The benchmark of the loaders runs, and reports what it says it reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def test_benchmark_prints_all_sources_and_writes_json(generated_photos: Path, tmp_path: Path) -> None:
    options = "--image-size 32 --batch-size 4 --batches 2 --repeats 1 --workers 1 --step-seconds 0.01".split()  # noqa: SIM905
    result = subprocess.run(
        [
            *(sys.executable, "-W", "error", PROJECT / "benchmarks" / "data_pipeline.py"),
            *("--folder", generated_photos, "--json", tmp_path / "out.json", *options),
        ],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    report = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert report["settings"]["pictures"] == 12
    assert report["settings"]["image_size"] == 32
    assert {"python", "torch", "dali", "pillow", "cores", "processor", "device"} <= set(report["environment"])
    assert len(report["rows"]) == 4
    assert report["rows"][3]["name"] == "Cache, 1 threads"
    assert report["rows"][3]["seconds_to_make"] > 0
    assert report["rows"][3]["bytes"] >= 8 * 32 * 32 * 3
    lines = result.stdout.splitlines()
    for row, line in zip(report["rows"], lines, strict=True):
        assert line.startswith(row["name"])
        assert f"{row['pictures_per_second']:.1f} pictures/s" in line
        assert 0 < row["slowest"] <= row["pictures_per_second"] <= row["fastest"]
        assert 0 <= row["waiting_share"] <= 1


def test_benchmark_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, PROJECT / "benchmarks" / "data_pipeline.py", "--folder", tmp_path],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert "holds no pictures" in result.stderr
    assert "Traceback" not in result.stderr
