"""The cache folder, which may be missing: everything in it can be made again."""

import functools
import logging
import os
from pathlib import Path

from fastnst.storage.files import StorageError, write_atomic

log = logging.getLogger(__name__)

_ADVICE = "set FASTNST_CACHE=FOLDER to keep it"
NOWHERE = Path(os.devnull) / "fastnst"
"""The cache folder where there is none. Nobody, not even root, can create it, so nothing is found in it."""


def cache_folder() -> Path:
    """Return `$FASTNST_CACHE`, else `$XDG_CACHE_HOME/fastnst`, else `~/.cache/fastnst`.

    Without a home folder there is no cache: that is said once, and `NOWHERE` returned.
    """
    if own := os.environ.get("FASTNST_CACHE"):
        return Path(own)
    # A relative path would name another folder in each working directory; the XDG specification says to ignore it.
    if (base := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return base / "fastnst"
    if (home := home_folder()) is None:
        _say_once(
            f"there is no home folder (HOME is {os.environ.get('HOME', 'unset') or 'empty'}, and the system knows none "
            f"for user {os.getuid()}), so nothing is cached; {_ADVICE}"
        )
        return NOWHERE
    return home / ".cache" / "fastnst"


def home_folder() -> Path | None:
    """Return `$HOME`, else the folder in the system's list of users; None if neither is an absolute path."""
    if (home := Path(os.environ.get("HOME", ""))).is_absolute():
        return home
    import pwd

    try:
        listed = Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None
    return listed if listed.is_absolute() else None


def write_cached(path: Path, content: bytes) -> None:
    """Write a file of the cache folder; say once if that fails, since the next start only takes longer."""
    try:
        write_atomic(path, content)
    except StorageError as error:
        if NOWHERE not in path.parents:
            _say_once(f"nothing is cached: {error}, or {_ADVICE}")


@functools.cache
def _say_once(message: str) -> None:
    log.warning("%s", message)
