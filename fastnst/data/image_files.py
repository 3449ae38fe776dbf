"""Which files of a folder are images by their names."""

import os
import stat
from pathlib import Path

from fastnst.errors import DataError
from fastnst.images import OTHER_SUFFIXES, READABLE_SUFFIXES, explain_os_error, printable

ImageFile = tuple[str, int, int]
"""Path relative to the folder, size in bytes, modification time in ns."""


def list_image_files(folder: Path) -> tuple[list[tuple[str, str]], list[ImageFile], int]:
    """List the images of a folder and its subfolders by their suffix; links are followed, hidden files skipped.

    Returns:
        Path and reason of each unreadable file; the image files, sorted by path; and the number of other files.

    Raises:
        DataError: the folder is missing or unreadable.
    """
    try:
        next(folder.iterdir(), None)
    except NotADirectoryError as error:
        raise DataError(f"{printable(folder)} is a file; give the folder that the images are in") from error
    except OSError as error:
        raise DataError(f"cannot read the folder {printable(folder)}: {explain_os_error(error)}") from error
    unreadable: list[tuple[str, str]] = []
    candidates: list[ImageFile] = []
    suffixes = READABLE_SUFFIXES | OTHER_SUFFIXES
    ignored = 0
    visited: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        unreadable.append((os.path.relpath(error.filename, folder), explain_os_error(error)))

    for directory, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(directory).stat()
        if (status.st_dev, status.st_ino) in visited:  # A link back to a folder seen before.
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in suffixes:  # noqa: PTH122
                ignored += 1
                continue
            path = os.path.join(directory, name)  # noqa: PTH118
            try:
                file = os.stat(path)  # noqa: PTH116
            except OSError as error:
                refuse(error)
                continue
            relative = os.path.relpath(path, folder)
            if stat.S_ISREG(file.st_mode):
                candidates.append((relative, file.st_size, file.st_mtime_ns))
            else:
                unreadable.append((relative, "it is not a regular file; remove it"))
    candidates.sort(key=lambda candidate: os.fsencode(candidate[0]))
    return unreadable, candidates, ignored
