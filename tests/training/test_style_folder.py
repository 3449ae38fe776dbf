"""The folder of several styles: their names, and what a damaged list of them says."""

from pathlib import Path

import pytest

from fastnst.errors import DataError, UserError
from fastnst.training.run_dir.style_folder import STYLES_NAME, saved_styles, style_names


def test_style_names_are_stems_and_differ() -> None:
    assert style_names([Path("a/wave.jpg"), Path("b/scream.png")]) == {
        "wave": Path("a/wave.jpg"),
        "scream": Path("b/scream.png"),
    }
    with pytest.raises(UserError, match=r"b/wave\.png would have the same run directory as a/wave\.jpg: 'wave'"):
        style_names([Path("a/wave.jpg"), Path("b/wave.png")])
    with pytest.raises(UserError, match=r"the same run directory as itself: 'wave'; give each style once"):
        style_names([Path("a/wave.jpg"), Path("a/wave.jpg")])


@pytest.mark.parametrize(
    "content",
    [
        *(b"[]", b"{}", b'{"a": 1}', b'{"..": "/x.jpg"}', b'{"a/b": "/x.jpg"}', b'{".": "/x.jpg"}', b"\xff"),
        *(b"[" * 100_000, b'{"a": "' + b"x" * (1 << 22) + b'"}'),
    ],
    ids=range(9),
)
def test_saved_styles_refuses_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STYLES_NAME).write_bytes(content)
    with pytest.raises(DataError, match=r"styles\.json is damaged; go on with each style by fastnst train --resume"):
        saved_styles(tmp_path)
