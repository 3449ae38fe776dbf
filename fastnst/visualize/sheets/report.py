"""What a command has found, and how it is written: PNG sheets, arrays and an `index.html` that shows them."""

import contextlib
import errno
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastnst.device import ran_out_of_memory
from fastnst.errors import DataError, DeviceError, UserError
from fastnst.images import printable, write_image
from fastnst.storage import storage_error, write_atomic
from fastnst.visualize.sheets.page import Figure, build_page

PAGE_NAME = "index.html"


@dataclass(frozen=True)
class Sheet:
    """One image for people, with the numbers behind it."""

    name: str
    """Of its file, without `.png`."""
    tag: str
    """In TensorBoard."""
    image: np.ndarray
    """uint8 `[H, W, 3]`."""
    caption: str
    alt: str
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Ending of the file's name → uint8 `[H, W, 3]` for `….png`, or numbers for `….npy`."""
    table: Sequence[Sequence[str]] = ()
    """Details for the page, the first row being the heads."""


@dataclass(frozen=True)
class Report:
    """All that one command shows."""

    title: str
    about: str
    """What is seen, and how to read it."""
    settings: Mapping[str, str]
    sheets: Sequence[Sheet]


def check_out(out: Path) -> None:
    """Refuse, before any work, an output folder that cannot be one.

    Raises:
        UserError: a file has that name.
        DataError: it cannot be written to.
    """
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
    """Write sheets, arrays and, last, the page. Files of the same names are replaced, others stay, inputs always do.

    Args:
        report: all of it; nothing is computed here.
        out: the folder; made if need be.
        command: the command line, for the page.
        inputs: files that must not be replaced.

    Returns:
        The page, then the other files in its order.

    Raises:
        UserError: a result would replace an input.
        DataError: an image's name leaves no room for the result's, or the storage refuses.
    """
    contents: dict[str, np.ndarray] = {}
    figures = []
    for sheet in report.sheets:
        contents[f"{sheet.name}.png"] = sheet.image
        extras = {sheet.name + ending: array for ending, array in sheet.extras.items()}
        contents |= extras
        size = sheet.image.shape[1], sheet.image.shape[0]
        figures.append(Figure(f"{sheet.name}.png", size, sheet.caption, sheet.alt, list(extras), sheet.table))
    page = build_page(report.title, report.about, {"command": command, **report.settings}, figures)
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
    """Title, meaning and settings, for TensorBoard's text page."""
    rows = {"command": command, **report.settings}
    lines = [f"    {name:12} {printable(value)}" for name, value in rows.items()]
    return "\n".join([f"## {printable(report.title)}", "", printable(report.about), "", *lines])


def image_names(paths: Sequence[Path]) -> list[str]:
    """A name for each image's results: the file's without its suffix, numbered where several are alike."""
    names: list[str] = []
    for path in paths:
        name, again = path.stem, 2
        while name in names:
            name, again = f"{path.stem}-{again}", again + 1
        names.append(name)
    return names


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """DeviceError, with what may help, where the device's memory is too small."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise DeviceError(f"out of memory; {advice}") from error


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
