"""The benchmark of the projections: its rows, ratios and errors."""

import json
from pathlib import Path

import pytest
import torch
import visualize
from click.testing import CliRunner

from helpers.run_command import script_exit_code


def test_visualize_benchmark_prints_rows_and_ratios_and_writes_json(generated_photos: Path, tmp_path: Path) -> None:
    options = ["--vgg", "random", "--size", "48", "--quick", "--json", str(tmp_path / "out.json")]
    options += ["--threads", str(torch.get_num_threads())]
    result = CliRunner().invoke(visualize.main, ["--folder", str(generated_photos), *options], catch_exceptions=False)
    assert result.exit_code == 0
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


def test_visualize_benchmark_reports_errors_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "holds no images" in str(script_exit_code(monkeypatch, visualize.__file__, "--folder", tmp_path))
