"""The benchmark of the loaders, run as a script in this process."""

import json
from pathlib import Path

import data_pipeline
import pytest

from helpers.run_command import script_exit_code

OPTIONS = "--image-size 16 --batch-size 2 --batches 2 --repeats 1 --workers 1".split()  # noqa: SIM905


def test_data_pipeline_prints_all_sources_and_writes_json(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")
    file = tmp_path / "out.json"
    options = ["--folder", generated_photos, "--json", file, "--step-seconds", 0.01, *OPTIONS]
    assert script_exit_code(monkeypatch, data_pipeline.__file__, *options) == 0
    output = capfd.readouterr()
    assert not output.err
    report = json.loads(file.read_text("utf-8"))
    assert report["settings"]["pictures"] == 12
    assert report["settings"]["image_size"] == 16
    assert {"python", "torch", "dali", "pillow", "cores", "processor", "device"} <= set(report["environment"])
    assert len(report["rows"]) == 4
    assert report["rows"][3]["name"] == "Cache, 1 threads"
    assert report["rows"][3]["seconds_to_make"] > 0
    assert report["rows"][3]["bytes"] >= 8 * 16 * 16 * 3
    for row, line in zip(report["rows"], output.out.splitlines(), strict=True):
        assert line.startswith(row["name"])
        assert f"{row['pictures_per_second']:.1f} images/s" in line
        assert 0 < row["slowest"] <= row["pictures_per_second"] <= row["fastest"]
        assert 0 <= row["waiting_share"] <= 1


def test_data_pipeline_reports_errors_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "holds no images" in str(script_exit_code(monkeypatch, data_pipeline.__file__, "--folder", tmp_path))


def test_data_pipeline_tune(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dali = pytest.importorskip(
        "fastnst.data.loaders.dali", reason="DALI is made for Linux on x86-64 only", exc_type=ImportError
    )
    monkeypatch.setattr(data_pipeline, "TUNED_THREADS", (1, 2, 99_999))
    monkeypatch.setattr(data_pipeline, "TUNED_PREFETCH", (1, 2))
    share, file = dali.HW_DECODER_LOAD, tmp_path / "rows.json"
    with pytest.raises(SystemExit) as ended:
        data_pipeline.main(["--folder", str(generated_photos), "--tune", "--json", str(file), *OPTIONS])
    assert ended.value.code == 0
    rows = json.loads(file.read_text())["rows"]
    # More threads than twice the cores would only wait.
    assert [(row["workers"], row["prefetch"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(row["pictures_per_second"] > 0 for row in rows)
    best = max(rows, key=lambda row: row["pictures_per_second"])
    assert capsys.readouterr().out.splitlines()[-1] == f"fastest: {best['name']}"
    assert share == dali.HW_DECODER_LOAD
