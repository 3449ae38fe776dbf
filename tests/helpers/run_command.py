"""Commands of fastnst and scripts in the process of the test."""

import runpy
import sys

import pytest


def exit_code_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `fastnst` with these arguments; whoever asks captures what it prints."""
    from fastnst.cli import main as cli

    monkeypatch.setattr(sys, "argv", ["fastnst", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def script_exit_code(monkeypatch: pytest.MonkeyPatch, script: object, *arguments: object) -> object:
    """Run a Python file as a script in this process; return its exit code, or the message that it ends with."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code
