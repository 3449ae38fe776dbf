"""Processes without streams, home, terminal or working directory, and streams that take no text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = f"{sys.executable} -m fastnst"


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("redirection", "out", "err"),
    [
        ("2>&-", True, ""),
        (">&-", False, "stdout is closed, so results are not shown\n"),
        ("<&-", True, None),
        ("<&- >&- 2>&-", False, ""),
    ],
)
def test_data_check_works_with_closed_streams(
    generated_photos: Path, tmp_path: Path, redirection: str, out: bool, err: str | None
) -> None:
    done = shell(f"{COMMAND} data check {generated_photos} {redirection}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12 images accepted") == out
    assert err is None or done.stderr.startswith(err)
    assert "Traceback" not in done.stderr


def test_open_closed_streams_keeps_messages_out_of_files(tmp_path: Path) -> None:
    script = """
import os, subprocess, sys
from fastnst.cli.process import open_closed_streams
closed = open_closed_streams()
with open("file", "wb", buffering=0) as file:
    os.write(2, b"a message")
    sys.stderr.write("another")
    sys.stderr.flush()
    subprocess.run([sys.executable, "-c", "import os; os.write(2, b'of a child')"], check=True)
    file.write(b"content")
with open("closed", "w") as file:
    file.write(" ".join(sorted(closed)))
"""
    (tmp_path / "script.py").write_text(script)
    done = shell(f"{sys.executable} script.py <&- >&- 2>&-", tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b"content"
    assert (tmp_path / "closed").read_text() == "stderr stdin stdout"


@pytest.mark.parametrize("arguments", ["data check {photos}", "--help", "data check --json {photos}"])
def test_results_that_cannot_be_written_to_stdout(generated_photos: Path, tmp_path: Path, arguments: str) -> None:
    done = shell(f"{COMMAND} {arguments.format(photos=generated_photos)} > /dev/full", tmp_path)
    assert done.returncode == 3
    (message,) = [line for line in done.stderr.splitlines() if not line.startswith("check images:")]
    assert message.startswith("fastnst: cannot write the results to stdout: No space left on device; free some space")


def test_messages_that_cannot_be_written_to_stderr(generated_photos: Path, tmp_path: Path) -> None:
    done = shell(f"{COMMAND} data check {generated_photos} 2> /dev/full", tmp_path)
    assert (done.returncode, done.stdout[:18]) == (0, "12 images accepted")
    assert shell(f"{COMMAND} data check nowhere 2> /dev/full", tmp_path).returncode == 3


def test_results_in_an_encoding_without_their_characters(generated_photos: Path, tmp_path: Path) -> None:
    photos = tmp_path / "größe ×"
    photos.mkdir()
    (photos / "größe ×.png").write_bytes(b"no image")
    (photos / "good.jpg").write_bytes(min(generated_photos.glob("*.jpg")).read_bytes())
    for encoding in ("ascii", "latin-1", "koi8-r", "utf-8"):
        done = shell(f"{COMMAND} data check '{photos}'", tmp_path, PYTHONIOENCODING=f"{encoding}:strict")
        assert done.returncode == 0, done.stderr
    done = shell(f"{COMMAND} data check '{photos}'", tmp_path, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert "1 images accepted" in done.stdout


@pytest.mark.parametrize("arguments", ["data check {photos}", "train --style a --data b", "demo", "tensorboard ."])
def test_every_command_names_a_deleted_working_directory(
    generated_photos: Path, tmp_path: Path, arguments: str
) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd gone && rmdir ../gone && {COMMAND} {arguments.format(photos=generated_photos)}"
    done = shell(command, tmp_path)
    assert done.returncode == 3
    assert done.stderr == (
        "fastnst: the working directory no longer exists; cd to another one and run the command again\n"
    )


def test_help_works_in_a_deleted_working_directory(tmp_path: Path) -> None:
    for index, arguments in enumerate(("--version", "train --help")):
        folder = tmp_path / f"gone{index}"
        folder.mkdir()
        done = shell(f"cd {folder} && rmdir {folder} && {COMMAND} {arguments}", tmp_path)
        assert done.returncode == 0, done.stderr


NO_HOME = """
import os
os.getuid = lambda: 54321  # nobody has it
from fastnst.cli.main import main
main()
"""


def test_data_check_without_home_user_or_temporary_folder(generated_photos: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(NO_HOME)
    unset = "env -u HOME -u USER -u LOGNAME -u FASTNST_CACHE -u XDG_CACHE_HOME TMPDIR=/nowhere"
    done = shell(f"{unset} {sys.executable} script.py data check {generated_photos}", tmp_path)
    assert done.returncode == 0, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if not line.startswith("check images:")]
    assert "there is no home folder" in message
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
