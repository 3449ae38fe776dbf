"""Check what is given as the folder of images, before torch is imported."""

from pathlib import Path

from fastnst.errors import DataError, UserError
from fastnst.file_kind import file_group, file_kind, read_ends
from fastnst.images import explain_os_error, printable

_FIXES = {
    "archive": "unpack it, and give the folder",
    "video": "save its frames as JPEG files in a folder, and give that",
}


def check_folder(folder: Path | None) -> Path:
    """Return `folder` if it exists; whether it holds images shows later, after longer work.

    Raises:
        UserError: None.
        DataError: it is missing, or a file; the message says what file, and what to do with it.
    """
    if folder is None:
        raise UserError("no training images; give a folder with --data FOLDER")
    if folder.is_dir():
        return folder
    try:
        ends = read_ends(folder)
    except FileNotFoundError as error:
        raise DataError(f"{printable(folder)} does not exist; give a folder of images") from error
    except OSError as error:
        raise DataError(f"cannot read the folder {printable(folder)}: {explain_os_error(error)}") from error
    kind = file_kind(*ends) or "a file"
    fix = _FIXES.get(file_group(*ends) or "", "give a folder of images")
    raise DataError(f"{printable(folder)} is {kind}, and not a folder; {fix}")
