"""The result of a `fastnst visualize` command, written as PNG sheets, arrays and an `index.html`."""

import errno
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastnst.errors import DataError, UserError
from fastnst.images import printable, write_image
from fastnst.storage import storage_error, write_atomic
from fastnst.visualize.sheets.page import Figure, build_page

PAGE_NAME = "index.html"


@dataclass(frozen=True)
class Report:
    """The result of one command."""

    title: str
    about: str
    """How to read the figures."""
    settings: Mapping[str, str]
    figures: Sequence[Figure]


def check_out(out: Path) -> None:
    """Check, before any work, that `out` can be a folder of results, or raise UserError or DataError."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {printable(out)} is a file, and a folder is needed; name a folder")
        parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            code = errno.EACCES if parent.is_dir() else errno.ENOTDIR
            raise storage_error(out, OSError(code, os.strerror(code)))
    except OSError as error:
        raise storage_error(out, error) from error


def write_report(report: Report, out: Path, *, command: str, inputs: Sequence[Path]) -> list[Path]:
    """Write images, arrays and, last, the page. Replaces files of the same names, but never an input.

    Args:
        report, command: the results, and the command line for the page.
        out: the folder; created if absent.
        inputs: files that must not be replaced.

    Returns:
        The page, then the other files in its order.

    Raises:
        UserError: a result would replace an input.
        DataError: a file name would be too long, or writing fails.
    """
    contents: dict[str, np.ndarray] = {}
    for figure in report.figures:
        contents |= figure.files
    page = build_page(report.title, report.about, {"command": command, **report.settings}, report.figures)
    kept = {path.resolve() for path in inputs}
    for name in [*contents, PAGE_NAME]:
        if len(os.fsencode(name)) > 255:
            raise DataError(f"{printable(name)} is too long for a file's name; rename the image")
        if (out / name).resolve() in kept:
            raise UserError(f"{printable(out / name)} would be replaced, and is an input; choose another --out")
    for name, array in contents.items():
        if name.endswith(".npy"):
            write_atomic(out / name, _npy(array))
        else:
            write_image(out / name, array)
    write_atomic(out / PAGE_NAME, page)
    return [out / PAGE_NAME, *(out / name for name in contents)]


def as_markdown(report: Report, command: str) -> str:
    """Format title, explanation and settings for TensorBoard's text page."""
    rows = {"command": command, **report.settings}
    lines = [f"    {name:12} {printable(value)}" for name, value in rows.items()]
    return "\n".join([f"## {printable(report.title)}", "", printable(report.about), "", *lines])


def image_names(paths: Sequence[Path]) -> list[str]:
    """Name the results of each image after its file, without the suffix; number equal names."""
    names: list[str] = []
    for path in paths:
        name, again = path.stem, 2
        while name in names:
            name, again = f"{path.stem}-{again}", again + 1
        names.append(name)
    return names


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
