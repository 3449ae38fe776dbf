"""`index.html`: it parses, its links lead to files beside it, and it loads nothing from a network."""

import os
import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastnst.visualize.sheets.page import Figure, build_page
from helpers.html_page import Page

IMAGE = np.zeros((8, 12, 3), np.uint8)


def test_build_page_needs_no_network_and_no_scripts() -> None:
    content = build_page("t", "a", {}, [Figure("x", "tag", IMAGE, "c", "a")])
    page = Page(content)
    assert not {"script", "iframe", "link", "object", "embed"} & set(page.tags)
    assert re.search(rb"https?:|//[a-z]|@import|url\(", content) is None
    assert b"prefers-color-scheme: dark" in content
    assert b'<html lang="en">' in content


def test_build_page_escapes_texts() -> None:
    table = [("map", "image"), ("1", "<b>.jpg")]
    figure = Figure("<i>", "tag", IMAGE, "caption of <i>", 'an "alt" & more', {".npy": IMAGE}, table)
    settings = {"command": "a <b", "VGG19": 'a "file" <x>'}
    page = Page(build_page("Title & <more>", "About it.", settings, [figure]))
    text = " ".join(page.text)
    for words in ("Title & <more>", "About it.", "a <b", 'a "file" <x>', "caption of <i>", "<b>.jpg", "<i>.npy"):
        assert words in text
    assert page.images == [{"src": "./%3Ci%3E.png", "width": "12", "height": "8", "alt": 'an "alt" & more'}]
    assert not {"i", "b"} & set(page.tags)


@given(text=st.text(max_size=50), name=st.text(min_size=1, max_size=30).filter(lambda name: "\0" not in name))
def test_build_page_of_any_text_and_name(text: str, name: str) -> None:
    # Only low surrogates are drawn elsewhere: they stand for bytes that are not UTF-8.
    name = name.encode("utf-8", "ignore").decode().replace("/", "_") or "x"
    page = Page(build_page(text, text, {text: text}, [Figure(name, "", IMAGE, text, text, {".npy": IMAGE}, [[text]])]))
    assert page.tags.count("img") == 1
    assert page.files == {os.fsencode(name + end) for end in (".png", ".npy")}
