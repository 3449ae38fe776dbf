"""The benchmark of the loaders runs, and reports what it says it reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import data_pipeline
import pytest

PROJECT = Path(__file__).resolve().parents[2]


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
    assert report["settings"]["images"] == 12
    assert report["settings"]["image_size"] == 32
    assert {"python", "torch", "dali", "pillow", "cores", "processor", "device"} <= set(report["environment"])
    assert len(report["rows"]) == 4
    assert report["rows"][3]["name"] == "Cache, 1 threads"
    assert report["rows"][3]["seconds_to_make"] > 0
    assert report["rows"][3]["bytes"] >= 8 * 32 * 32 * 3
    lines = result.stdout.splitlines()
    for row, line in zip(report["rows"], lines, strict=True):
        assert line.startswith(row["name"])
        assert f"{row['pictures_per_second']:.1f} images/s" in line
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
    assert "holds no images" in result.stderr
    assert "Traceback" not in result.stderr


def test_settings_of_dali_are_tried(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dali = pytest.importorskip(
        "fastnst.data.loaders.dali", reason="DALI is made for Linux on x86-64 only", exc_type=ImportError
    )
    monkeypatch.setattr(data_pipeline, "TUNED_THREADS", (1, 2, 99_999))
    monkeypatch.setattr(data_pipeline, "TUNED_PREFETCH", (1, 2))
    share, file = dali.HW_DECODER_LOAD, tmp_path / "rows.json"
    arguments = ["--folder", generated_photos, "--image-size", 16, "--batch-size", 2, "--batches", 2, "--repeats", 1]
    with pytest.raises(SystemExit) as ended:
        data_pipeline.main([*map(str, arguments), "--tune", "--json", str(file)])
    assert ended.value.code == 0
    rows = json.loads(file.read_text())["rows"]
    # More threads than twice the cores would only wait.
    assert [(row["workers"], row["prefetch"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(row["pictures_per_second"] > 0 for row in rows)
    best = max(rows, key=lambda row: row["pictures_per_second"])
    assert capsys.readouterr().out.splitlines()[-1] == f"fastest: {best['name']}"
    assert share == dali.HW_DECODER_LOAD
