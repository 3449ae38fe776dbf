"""The benchmark of large images: its rows, ratios, agreement and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import stylize
from click.testing import CliRunner

from fastnst.errors import UserError
from helpers.run_command import script_exit_code


def test_stylize_benchmark_prints_rows_and_ratios_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.json"
    for sizes in ("64x48", "80x20"):  # the second time the first row is kept
        command = ["--sizes", sizes, "--threads", "1", "--json", str(file)]
        result = CliRunner().invoke(stylize.main, command, catch_exceptions=False)
        assert result.exit_code == 0
    report = json.loads(file.read_text("utf-8"))
    assert report["settings"] == {"architecture": "hwalsuklee", "threads": 1}
    assert {"python", "torch", "device", "threads", "revision", "date"} <= set(report["environment"])
    assert [(row["width"], row["height"]) for row in report["rows"]] == [(80, 20), (64, 48)]
    row = report["rows"][0]
    assert row["difference"] in (0, 1)
    for key in ("seconds", "peak_bytes"):
        assert row["ratios"][key] == row["strips"][key] / row["whole"][key]
    assert result.stdout.splitlines()[1].split()[0] == "80x20"
    monkeypatch.setattr(stylize, "_difference", lambda _: 2)
    with pytest.raises(UserError, match="the results of 64 × 48 px differ by 2 levels, allowed: 1"):
        stylize._row(64, 48, "lengstrom", 1)


def test_stylize_benchmark_says_where_the_whole_image_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastnst.memory.available_host_memory", lambda: 1000)
    assert stylize._measure("whole", tmp_path / "out.npy", 64, 48, "lengstrom", 1) is None
    row = {"width": 64, "height": 48, "strips": {"seconds": 1.0, "peak_bytes": 2e6}, "whole": None}
    assert stylize._line(row).endswith("does not fit")


def test_stylize_benchmark_compares_all_rows(tmp_path: Path) -> None:
    one, other = np.zeros((300, 4, 3), np.uint8), np.zeros((300, 4, 3), np.uint8)
    other[299, 3, 2] = 7
    for name, array in (("strips", one), ("whole", other)):
        np.save(tmp_path / f"{name}.npy", array)
    assert stylize._difference(tmp_path) == 7


def test_stylize_benchmark_reports_errors_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'64' is no size; give width x height" in str(
        script_exit_code(monkeypatch, stylize.__file__, "--sizes", "64")
    )
