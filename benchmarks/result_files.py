"""Files that a benchmark is told to write: only an earlier result is replaced, and that is checked before measuring."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import click
from PIL import Image

SOFTWARE = "fastnst benchmarks"
"""What a plot says of itself in its PNG."""
_TITLES = ("# Training steps", "# Kernel benchmarks", "# A training step on ")
_KEYS = ("environment", "benchmarks", "passes")


def result_file(text: str) -> Path:
    """Return the path, as `type` of an argparse option; it must not be somebody else's file."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    if path.exists() and not _is_result(path):
        raise argparse.ArgumentTypeError(f"{path} exists, and is no result of a benchmark; name another, or remove it")
    return path


def checked(_context: click.Context, _option: click.Parameter, value: Path | None) -> Path | None:
    """Check the path in the same way, as `callback` of a click option."""
    try:
        return None if value is None else result_file(str(value))
    except argparse.ArgumentTypeError as error:
        raise click.BadParameter(str(error)) from error


json_option = click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    callback=checked,
    help="Also write rows and environment here.",
)


def _is_result(path: Path) -> bool:
    try:
        if path.stat().st_size == 0:
            return path.is_file()  # nothing would be lost
        if path.suffix == ".png":
            with Image.open(path) as image:
                return image.info.get("Software") == SOFTWARE
        text = path.read_text("utf-8")
        if text.startswith(_TITLES):
            return True
        value: Any = json.loads(text)
        rows = value if isinstance(value, list) else [value]
        return bool(rows) and all(isinstance(row, dict) and any(key in row for key in _KEYS) for row in rows)
    except (OSError, ValueError):
        return False
