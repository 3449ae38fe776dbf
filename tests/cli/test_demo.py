"""`fastnst demo`: images that it did not write are kept, and every folder has a place for them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fastnst import demo

Fastnst = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object, **__: object) -> None:
        raise AssertionError("the demo began")

    monkeypatch.setattr(demo, "write_photos", write)


@pytest.mark.parametrize("name", ["style.png", "chelsea-stylised.png", "photos/coffee.png"])
def test_demo_keeps_foreign_images(fastnst: Fastnst, tmp_path: Path, name: str) -> None:
    file = tmp_path / "run-images" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    code, _, err = fastnst("demo", "--out", f"{tmp_path}/run/")
    assert code == 2
    assert err == f"fastnst: {file} exists, and fastnst did not write it; choose another --out\n"
    assert file.read_text() == "precious"


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_demo_refuses_folders_in_use(
    fastnst: Fastnst, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "below")
    code, _, err = fastnst("demo", "--out", out)
    assert code == 2
    assert "is not empty" in err
