"""Without a usable home folder nothing is cached, one line says so, and no folder is made by accident."""

import os
import pwd
from pathlib import Path

import pytest

from fastnst.cli import process
from fastnst.data.manifest import build_manifest
from fastnst.storage import cache, cache_folder, write_cached


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cache._say_once.cache_clear()
    for name in ("FASTNST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the system does not list."""

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize("home", [None, "", "relative"])
def test_cache_folder_without_a_home_is_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, generated_photos: Path, home: str | None
) -> None:
    if home is not None:
        monkeypatch.setenv("HOME", home)
    for _ in range(2):
        assert len(build_manifest(generated_photos).images) == 12
    (message,) = caplog.messages
    assert message.startswith("there is no home folder (HOME is ")
    assert "so nothing is cached; set FASTNST_CACHE=FOLDER" in message
    assert not cache_folder().exists()


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_cache_folder_ignores_relative_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str) -> None:
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(("u", "x", 1, 1, "", str(tmp_path), "sh")))
    monkeypatch.setenv(variable, "somewhere")
    assert cache_folder() == tmp_path / ".cache" / "fastnst"


def test_write_cached_says_once_that_it_cannot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        write_cached(tmp_path / "file" / "below", b"data")
    (message,) = caplog.messages
    assert message.startswith(f"nothing is cached: cannot write {tmp_path}/file/below: ")


@pytest.mark.usefixtures("stranger")
def test_keep_compiled_code_elsewhere_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    for name in variables:
        monkeypatch.setenv(name, "before")  # so that both are put back
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process.keep_compiled_code_elsewhere()
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [Path(os.environ[name]).parent for name in variables] == [folder, folder]
    for name in variables:
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    process.keep_compiled_code_elsewhere()
    assert not any(name in os.environ for name in variables)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    process.keep_compiled_code_elsewhere()
    assert not any(name in os.environ for name in variables)
