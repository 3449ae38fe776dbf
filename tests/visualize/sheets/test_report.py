"""Reports: all files are written, links lead to them, inputs are never replaced."""

import os
from pathlib import Path

import numpy as np
import pytest

from fastnst.errors import DataError, UserError
from fastnst.storage import ForeignFileError
from fastnst.visualize.sheets.page import Figure
from fastnst.visualize.sheets.report import Report, check_out, image_names, write_report
from helpers.html_page import Page


def report(*names: str) -> Report:
    image = np.zeros((8, 12, 3), np.uint8)
    extras = {"-heat.png": image, "-heat.npy": np.arange(6, dtype=np.float32).reshape(2, 3)}
    figures = [Figure(name, f"visualize/{name}", image, f"caption of {name}", "alt", extras) for name in names]
    return Report("Title", "About it.", {"layer": "conv1_1"}, figures)


NAMES = [
    "plain",
    "with space",
    "käse",
    "a#b?c%41",
    "<i>&amp;'\"",
    "javascript:alert(1)",
    "日本",
    os.fsdecode(b"caf\xe9"),
]


def test_write_report_links_lead_to_written_files(tmp_path: Path) -> None:
    written = write_report(report(*NAMES), tmp_path / "out", command="fastnst …", inputs=[])
    assert written[0] == tmp_path / "out" / "index.html"
    page = Page(written[0].read_bytes())
    names = {os.fsencode(path.name) for path in (tmp_path / "out").iterdir()}
    assert page.files == names - {b"index.html"}
    assert {os.fsencode(path.name) for path in written} == names
    assert len(names) == 3 * len(NAMES) + 1


def test_write_report_arrays_round_trip(tmp_path: Path) -> None:
    write_report(report("x"), tmp_path, command="", inputs=[])
    array = np.load(tmp_path / "x-heat.npy", allow_pickle=False)
    assert array.dtype == np.float32
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


RESULTS = ["index.html", "x-heat.npy", "x-heat.png", "x.png"]
NUMBERED = ["index.html", "x-2-heat.npy", "x-2-heat.png", "x-2.png"]


def written(out: Path, **options: bool) -> list[str]:
    return sorted(path.name for path in write_report(report("x"), out, command="", inputs=[], **options))


def test_write_report_replaces_results_and_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    for _ in range(2):
        assert written(tmp_path) == RESULTS
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*RESULTS, "letter.txt"])
    assert (tmp_path / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("name", RESULTS[1:])
def test_write_report_numbers_a_figure_beside_a_foreign_file(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / name).write_bytes(b"\x89PNG mine")
    for _ in range(2):  # the second replaces the first's results
        assert written(tmp_path) == NUMBERED
        assert "x is written as x-2" in caplog.text
    assert (tmp_path / name).read_bytes() == b"\x89PNG mine"
    assert {os.fsdecode(file) for file in Page((tmp_path / "index.html").read_bytes()).files} == set(NUMBERED[1:])
    assert written(tmp_path, overwrite=True) == RESULTS
    assert (tmp_path / name).read_bytes() != b"\x89PNG mine"


def test_write_report_numbers_past_its_own_names_and_folders(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("mine")
    (tmp_path / "x-3-heat.png").mkdir()
    paths = write_report(report("x", "x-2"), tmp_path, command="", inputs=[])
    assert [path.stem for path in paths if "heat" not in path.stem] == ["index", "x-4", "x-2"]


def test_write_report_numbers_a_figure_beside_an_input(tmp_path: Path) -> None:
    write_report(report("x"), tmp_path, command="", inputs=[])
    before = (tmp_path / "x-heat.png").read_bytes()
    (tmp_path / "link.png").symlink_to(tmp_path / "x-heat.png")
    for name in ("x-heat.png", "link.png"):
        for overwrite in (False, True):
            paths = write_report(report("x"), tmp_path, command="", inputs=[tmp_path / name], overwrite=overwrite)
            assert sorted(path.name for path in paths) == NUMBERED
    assert (tmp_path / "x-heat.png").read_bytes() == before


@pytest.mark.parametrize("content", [b"<html>my page</html>", b""])
def test_foreign_page_is_found_before_the_work_and_at_its_end(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.html").write_bytes(content)
    with pytest.raises(ForeignFileError, match=r"index\.html exists, and fastnst did not write it; .*--overwrite"):
        check_out(tmp_path)
    with pytest.raises(ForeignFileError):
        written(tmp_path)
    assert (tmp_path / "index.html").read_bytes() == content
    check_out(tmp_path, overwrite=True)
    assert written(tmp_path, overwrite=True) == RESULTS
    check_out(tmp_path)


def test_write_report_replaces_arrays_by_their_mark_alone(tmp_path: Path) -> None:
    # The same numbers, written by somebody else.
    np.save(tmp_path / "x-heat.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    assert written(tmp_path) == NUMBERED


def test_write_report_refuses_too_long_names_before_writing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too long"):
        write_report(report("a", "ä" * 125), tmp_path, command="", inputs=[])
    assert list(tmp_path.iterdir()) == []
    write_report(report("ä" * 120), tmp_path, command="", inputs=[])


def test_check_out_requires_a_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, and a folder is needed"):
        check_out(tmp_path / "file")
    with pytest.raises(DataError, match="cannot write"):
        check_out(tmp_path / "file" / "below")
    check_out(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path)
    with pytest.raises(DataError, match=r"cannot write .*new/deep.*choose a folder you may write to"):
        check_out(tmp_path / "new" / "deep")


def test_image_names_numbers_equal_names() -> None:
    paths = [Path("a/x.jpg"), Path("b/x.png"), Path("x-2.jpg"), Path("c/x.jpg"), Path("y.tar.png")]
    assert image_names(paths) == ["x", "x-2", "x-2-2", "x-3", "y.tar"]
