"""The result of a `fastnst visualize` command, written as PNG sheets, arrays and an `index.html`."""

import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import numpy as np

from fastnst.errors import UserError
from fastnst.images import SOFTWARE, check_writable_name, is_own_image, printable, write_image
from fastnst.storage import (
    ForeignFileError,
    check_folder,
    open_nonblocking,
    read_regular_file,
    storage_error,
    write_atomic,
)
from fastnst.visualize.sheets.page import GENERATOR, Figure, build_page

log = logging.getLogger(__name__)

PAGE_NAME = "index.html"
_LARGEST_PAGE = 1 << 30


@dataclass(frozen=True)
class Report:
    """The result of one command."""

    title: str
    about: str
    """How to read the figures."""
    settings: Mapping[str, str]
    figures: Sequence[Figure]


def check_out(out: Path, *, overwrite: bool = False) -> None:
    """Check, before any work, that `out` can be a folder of results.

    Raises:
        UserError: it is a file.
        ForeignFileError: its page is not fastnst's, and `overwrite` is not set.
        StorageError: it cannot be written.
    """
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {printable(out)} is a file, and a folder is needed; name a folder")
        page = out / PAGE_NAME
        if not overwrite and os.path.lexists(page) and not _is_own(page):
            raise ForeignFileError(page)
    except OSError as error:
        raise storage_error(out, error) from error
    check_folder(out)


def write_report(
    report: Report, out: Path, *, command: str, inputs: Sequence[Path], overwrite: bool = False
) -> list[Path]:
    """Write images, arrays and, last, the page. Replaces results of earlier reports.

    A figure gets a number where an input, or a file that fastnst did not write, has one of its names.

    Args:
        report, command: the results, and the command line for the page.
        out: the folder; created if absent.
        inputs: files that must not be replaced.
        overwrite: also replace files that fastnst did not write; never an input.

    Returns:
        The page, then the other files in its order.

    Raises:
        ForeignFileError: the page would replace a file that fastnst did not write.
        DataError: a file name would be too long, or writing fails.
    """
    figures = _free_figures(report.figures, out, inputs, overwrite=overwrite)
    contents: dict[str, np.ndarray] = {}
    for figure in figures:
        contents |= figure.files
    may_replace = None if overwrite else _is_own
    for name, array in contents.items():
        if name.endswith(".npy"):
            write_atomic(out / name, _npy(array), may_replace=may_replace)
        else:
            write_image(out / name, array, overwrite=overwrite)
    page = build_page(report.title, report.about, {"command": command, **report.settings}, figures)
    write_atomic(out / PAGE_NAME, page, may_replace=may_replace)
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


def _free_figures(figures: Sequence[Figure], out: Path, inputs: Sequence[Path], *, overwrite: bool) -> list[Figure]:
    """Return the figures, with a number after the names that files which must be kept have in `out`."""
    kept = {path.resolve() for path in inputs}

    def is_free(name: str) -> bool:
        check_writable_name(name)
        path = out / name
        if path.resolve() in kept or (path.is_dir() and not path.is_symlink()):
            return False
        return overwrite or not os.path.lexists(path) or _is_own(path)

    names = {figure.name for figure in figures}
    free: list[Figure] = []
    for figure in figures:
        numbered = (replace(figure, name=f"{figure.name}-{number}") for number in count(2))
        candidates = chain([figure], (other for other in numbered if other.name not in names))
        found = next(other for other in candidates if all(map(is_free, other.files)))
        names.add(found.name)
        free.append(found)
    if renamed := [(old.name, new.name) for old, new in zip(figures, free, strict=True) if old.name != new.name]:
        old, new = map(printable, renamed[0])
        log.info(
            "%s: kept files that fastnst did not write; %s is written as %s%s (--overwrite replaces all but inputs)",
            printable(out),
            old,
            new,
            f", and {len(renamed) - 1} more likewise" if len(renamed) > 1 else "",
        )
    return free


def _is_own(path: Path) -> bool:
    """Return whether fastnst wrote the file at `path`: a page, an array or an image."""
    if path.is_symlink():
        return False
    try:
        if path.name == PAGE_NAME:
            return GENERATOR in read_regular_file(path, _LARGEST_PAGE)
        if path.suffix == ".npy":
            with open(path, "rb", opener=open_nonblocking) as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 256))
                return re.search(rb"\x93NUMPY[^\n]*\nfastnst [^\n]*$", file.read()) is not None
    except OSError:
        return False
    return is_own_image(path)


def _npy(array: np.ndarray) -> bytes:
    """Return an array's file; a second array in it, which `np.load` does not read, says that fastnst wrote it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    np.save(buffer, np.array(SOFTWARE.encode()), allow_pickle=False)
    return buffer.getvalue()
