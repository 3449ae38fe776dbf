"""Reports: all files are written, links lead to them, inputs are never replaced."""

import os
from pathlib import Path

import numpy as np
import pytest

from fastnst.errors import DataError, UserError
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


def test_write_report_replaces_results_and_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("old")
    (tmp_path / "letter.txt").write_text("mine")
    write_report(report("x"), tmp_path, command="", inputs=[])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_write_report_never_replaces_an_input(tmp_path: Path) -> None:
    (tmp_path / "x-heat.png").write_text("precious")
    (tmp_path / "link.png").symlink_to(tmp_path / "x-heat.png")
    for name in ("x-heat.png", "link.png"):
        with pytest.raises(UserError, match=r"x-heat\.png would be replaced, and is an input"):
            write_report(report("x"), tmp_path, command="", inputs=[tmp_path / name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "x-heat.png"]
    assert (tmp_path / "x-heat.png").read_text() == "precious"


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
