"""A command of fastnst in the process of the test."""

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
