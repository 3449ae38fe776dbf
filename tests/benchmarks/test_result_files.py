"""Options of benchmarks that name a file to write: whatever is no result of a benchmark is kept."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from result_files import SOFTWARE, result_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_result_file_takes_results_and_new_files(tmp_path: Path) -> None:
    for file in [*BENCHMARKS.glob("results/*.json"), *BENCHMARKS.glob("results/*.md"), tmp_path / "new.json"]:
        assert result_file(str(file)) == file
    (tmp_path / "empty.md").write_text("")
    (tmp_path / "table.md").write_text("# Training steps\n\nNothing was measured.\n")
    (tmp_path / "plan.json").write_text('{"settings": {}, "passes": []}')
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", SOFTWARE)
    Image.new("RGB", (8, 8)).save(tmp_path / "plot.png", pnginfo=mark)
    for file in tmp_path.iterdir():
        assert result_file(str(file)) == file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("README.md", b"# My notes\n"), ("package.json", b'{"name": "x"}'), ("rows.json", b"[1, 2]")),
        *(
            ("list.json", b"[]"),
            ("cut.json", b'{"environment": '),
            ("photo.png", b"\x89PNG"),
            ("bytes.md", b"\xff\xfe"),
        ),
    ],
)
def test_result_file_keeps_other_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(argparse.ArgumentTypeError, match="exists, and is no result of a benchmark; name another"):
        result_file(str(tmp_path / name))
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder"):
        result_file(str(tmp_path))


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("end_to_end", ["--json"]),
        ("end_to_end", ["--markdown"]),
        ("roofline", ["--json"]),
        ("roofline", ["--markdown"]),
        ("styles", ["--folder", ".", "--json"]),
        ("visualize", ["--folder", ".", "--json"]),
        ("data_pipeline", ["--folder", ".", "--json"]),
        ("report", ["x.json", "--markdown"]),
        ("report", ["x.json", "--plot"]),
        ("report", ["x.json", "--merge"]),
    ],
)
def test_benchmarks_check_what_they_would_replace(
    script: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine").write_text("precious")
    monkeypatch.setattr(sys, "argv", [script, *arguments, str(tmp_path / "mine")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "is no result of a benchmark" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "mine").read_text() == "precious"
