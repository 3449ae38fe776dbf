"""`index.html` and what lies beside it: it parses, its links lead to the files, and it asks no network for anything."""

import os
import re
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastnst.errors import DataError, UserError
from fastnst.visualize.sheets.page import Figure, build_page
from fastnst.visualize.sheets.report import Report, Sheet, check_out, image_names, write_report

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags, texts and links of a page whose elements are all closed, in order."""

    def __init__(self, content: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(content.decode("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def files(self) -> set[bytes]:
        """What the links lead to, as a browser reads them: up to `#` or `?`, then unquoted."""
        parts = [urllib.parse.urlsplit(urllib.parse.urljoin("file:///out/index.html", link)) for link in self.links]
        assert all(part.scheme == "file" and not part.netloc and not part.query and not part.fragment for part in parts)
        return {urllib.parse.unquote_to_bytes(part.path).removeprefix(b"/out/") for part in parts}


def image(height: int = 8, width: int = 12) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def report(*names: str) -> Report:
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    extras = {"-heat.png": image(), "-heat.npy": numbers}
    table = [("map", "image"), ("1", "<b>.jpg")]
    sheets = [Sheet(name, f"visualize/{name}", image(), f"caption of {name}", "alt", extras, table) for name in names]
    return Report("Title & <more>", "About it.", {"layer": "conv1_1", "VGG19": 'a "file" <x>'}, sheets)


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


def test_every_link_leads_to_a_file_that_was_written(tmp_path: Path) -> None:
    written = write_report(report(*NAMES), tmp_path / "out", command="fastnst …", inputs=[])
    assert written[0] == tmp_path / "out" / "index.html"
    page = Page(written[0].read_bytes())
    names = {os.fsencode(path.name) for path in (tmp_path / "out").iterdir()}
    assert page.files == names - {b"index.html"}
    assert {os.fsencode(path.name) for path in written} == names
    assert len(names) == 3 * len(NAMES) + 1


def test_the_page_needs_no_network_and_runs_nothing() -> None:
    content = build_page("t", "a", {}, [Figure("x.png", (3, 4), "c", "a")])
    page = Page(content)
    assert not {"script", "iframe", "link", "object", "embed"} & set(page.tags)
    assert re.search(rb"https?:|//[a-z]|@import|url\(", content) is None
    assert b"prefers-color-scheme: dark" in content
    assert b'<html lang="en">' in content


def test_texts_are_escaped_and_all_there() -> None:
    values = report("<i>")
    sheet = values.sheets[0]
    figure = Figure("<i>.png", (12, 8), sheet.caption, 'an "alt" & more', ["<i>.npy"], sheet.table)
    page = Page(build_page(values.title, values.about, {"command": "a <b", **values.settings}, [figure]))
    text = " ".join(page.text)
    for words in ("Title & <more>", "About it.", "a <b", 'a "file" <x>', "caption of <i>", "<b>.jpg", "<i>.npy"):
        assert words in text
    assert page.images == [{"src": "./%3Ci%3E.png", "width": "12", "height": "8", "alt": 'an "alt" & more'}]
    assert not {"i", "b"} & set(page.tags)


@given(text=st.text(max_size=50), name=st.text(min_size=1, max_size=30).filter(lambda name: "\0" not in name))
def test_any_text_and_any_name_make_a_page(text: str, name: str) -> None:
    # Lone surrogates are what names that are not UTF-8 become, if low; no file system yields others.
    name = name.encode("utf-8", "ignore").decode().replace("/", "_") or "x"
    page = Page(build_page(text, text, {text: text}, [Figure(name, (1, 1), text, text, [name], [[text]])]))
    assert page.tags.count("img") == 1
    assert page.files == {os.fsencode(name)} or name in (".", "..")


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    write_report(report("x"), tmp_path, command="", inputs=[])
    array = np.load(tmp_path / "x-heat.npy", allow_pickle=False)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [[0, 1, 2], [3, 4, 5]])


def test_what_is_there_is_replaced_what_is_foreign_stays(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("old")
    (tmp_path / "letter.txt").write_text("mine")
    write_report(report("x"), tmp_path, command="", inputs=[])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "x-heat.png").write_text("precious")
    (tmp_path / "link.png").symlink_to(tmp_path / "x-heat.png")
    for name in ("x-heat.png", "link.png"):
        with pytest.raises(UserError, match=r"x-heat\.png would be replaced, and is an input"):
            write_report(report("x"), tmp_path, command="", inputs=[tmp_path / name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "x-heat.png"]
    assert (tmp_path / "x-heat.png").read_text() == "precious"


def test_a_name_too_long_for_the_results_is_refused_before_the_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too long"):
        write_report(report("a", "ä" * 125), tmp_path, command="", inputs=[])
    assert list(tmp_path.iterdir()) == []
    write_report(report("ä" * 120), tmp_path, command="", inputs=[])


def test_the_output_must_be_a_folder_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_images_of_one_name_are_numbered() -> None:
    paths = [Path("a/x.jpg"), Path("b/x.png"), Path("x-2.jpg"), Path("c/x.jpg"), Path("y.tar.png")]
    assert image_names(paths) == ["x", "x-2", "x-2-2", "x-3", "y.tar"]
