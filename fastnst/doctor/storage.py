"""Free space, the cache folder, VGG19's weights."""

import contextlib
import fcntl
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastnst.doctor.verdict import Verdict, failed, gib, passed, warned
from fastnst.doctor.workers import Results
from fastnst.errors import shell_quote

_COMFORTABLE_DISK, _LEAST_DISK = 2 * 2**30, 2**28
"""Bytes for runs: checkpoints take about 100 MB, a log with images as much or more."""
_LACKING = "fastnst works without them: after a power cut the last files may be missing"
_ELSEWHERE = "free some space there, or keep it elsewhere:\n  export FASTNST_CACHE=FOLDER"
_GIVE_A_FOLDER = "name a folder for the cache:\n  export FASTNST_CACHE=FOLDER"


def probe_folders() -> dict[str, Any]:
    """Measure free space in the working directory and the cache folder, and whether both are writable."""
    from fastnst.storage import NOWHERE, cache_folder

    here, cache = Path.cwd(), cache_folder()
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    refused = None
    if there == cache:
        try:
            # Writing is the only proof: permissions say nothing of full or read-only disks and quotas.
            with tempfile.TemporaryFile(dir=cache) as file:
                file.write(b"fastnst")
                file.flush()
        except OSError as error:
            refused = error.strerror or str(error)
    elif not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        refused = "it does not exist and cannot be created"
    return {
        "here_free": shutil.disk_usage(here).free,
        "here_writable": os.access(here, os.W_OK | os.X_OK),
        "here_lacks": missing_operations(here) if os.access(here, os.W_OK | os.X_OK) else [],
        "cache": None if cache == NOWHERE else str(cache),
        "cache_exists": there == cache,
        "cache_free": shutil.disk_usage(there).free,
        "cache_refused": refused,
        "cache_lacks": missing_operations(cache) if there == cache and not refused else [],
    }


def missing_operations(folder: Path) -> list[str]:
    """Try what network and cloud file systems may lack, in a temporary folder inside `folder`; name what fails."""

    def lock() -> None:
        with file.open("rb+") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def fsync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def map_memory() -> None:
        with file.open("rb") as opened:
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ).close()

    lacks = []
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=".fastnst-doctor-", dir=folder) as inside:
        file, other = Path(inside, "file"), Path(inside, "other")
        file.write_bytes(b"fastnst")
        other.write_bytes(b"fastnst")
        operations: dict[str, Callable[[], object]] = {
            "locks": lock,
            "durable files (fsync)": lambda: fsync(file),
            "durable names (fsync of folders)": lambda: fsync(Path(inside)),
            "memory maps": map_memory,
            "replacement of files by renaming": lambda: other.replace(file),
        }
        for name, operation in operations.items():
            try:
                operation()
            except OSError as error:
                lacks.append(f"{name}: {error.strerror or error}")
    return lacks


def probe_weights() -> dict[str, Any]:
    """Hash VGG19's weights where `--vgg auto` looks for them. Downloads nothing."""
    from fastnst.models.weights import TORCHVISION, URL_VARIABLE, cached_files
    from fastnst.storage import sha256_of

    files = []
    for path in cached_files(TORCHVISION):
        found: dict[str, Any] = {"path": str(path), "size": None, "sha256": None}
        files.append(found)
        if not path.is_file():
            continue
        try:
            found["size"] = path.stat().st_size
            found["sha256"] = sha256_of(path)
        except OSError as error:
            found["unreadable"] = error.strerror or str(error)
    part = Path(files[0]["path"] + ".part")
    return {
        "files": files,
        "wanted": TORCHVISION.sha256,
        "size": TORCHVISION.size,
        "url": f"${URL_VARIABLE}" if os.environ.get(URL_VARIABLE) else TORCHVISION.url,
        "part": part.stat().st_size if part.is_file() else None,
    }


def check_disk(results: Results) -> Verdict:
    folders = results["folders"]
    found = f"{gib(folders['here_free'])} free in the working directory"
    if not folders["here_writable"]:
        return warned(f"{found}, which is not writable", "give runs and images a place with --out")
    fix = "free some space, or give runs a place elsewhere with --out"
    if folders["here_free"] < _LEAST_DISK:
        return failed(found, fix)
    if folders["here_free"] < _COMFORTABLE_DISK:
        return warned(f"{found}: little", fix)
    if folders["here_lacks"]:
        return warned(
            f"{found}, without {'; '.join(folders['here_lacks'])}",
            f"{_LACKING}, or give them a place elsewhere with --out",
        )
    return passed(found)


def check_cache(results: Results) -> Verdict:
    folders = results["folders"]
    if folders["cache"] is None:
        return warned("none: there is no home folder, so nothing is kept", _GIVE_A_FOLDER)
    found = f"{folders['cache']}, {gib(folders['cache_free'])} free"
    if folders["cache_refused"]:
        return failed(
            f"{found}, cannot be written: {folders['cache_refused']}",
            "make it writable, or keep it elsewhere:\n  export FASTNST_CACHE=FOLDER",
        )
    if folders["cache_free"] < _LEAST_DISK:
        return warned(f"{found}: little", _ELSEWHERE)
    if folders["cache_lacks"]:
        return warned(
            f"{found}, without {'; '.join(folders['cache_lacks'])}",
            f"{_LACKING}, or keep it elsewhere:\n  export FASTNST_CACHE=FOLDER",
        )
    return passed(found + (", writable" if folders["cache_exists"] else ", created at first use"))


def check_weights(results: Results) -> Verdict:
    weights = results["weights"]
    damaged = [file for file in weights["files"] if file["size"] is not None and file["sha256"] != weights["wanted"]]
    right = [file for file in weights["files"] if file["sha256"] == weights["wanted"]]
    removal = "\n".join("  rm " + shell_quote(file["path"]) for file in damaged)
    said = "; ".join(f"{file['path']} {_fault(file, weights)}" for file in damaged)
    if right:
        found = f"{right[0]['path']}, SHA-256 right"
        return warned(f"{found}; but {said}", f"remove the damaged file:\n{removal}") if damaged else passed(found)
    own = weights["files"][0]["path"]
    download = (
        f"  mkdir -p {shell_quote(Path(own).parent)}\n"
        f"  curl --fail --location --continue-at - --output {shell_quote(own)} {_address(weights['url'])}"
    )
    if damaged:
        mend = "make it readable or remove it" if any("unreadable" in file for file in damaged) else "remove it"
        return failed(said, f"{mend}; the next training downloads it again, or do so now:\n{removal}\n{download}")
    if results.get("folders").get("cache", "") is None:
        return warned("not here, and no folder to keep them in", f"give a file with --vgg FILE, or {_GIVE_A_FOLDER}")
    found = f"not here; --vgg auto downloads them at first use, {weights['size'] / 1e6:.0f} MB"
    if weights["part"] is not None:
        found += f" ({weights['part'] / 1e6:.0f} MB of them came before)"
    free = results.get("folders").get("cache_free")
    if free is not None and free < weights["size"] - (weights["part"] or 0):
        return failed(f"{found}, and the cache folder has only {gib(free)} free", _ELSEWHERE)
    return warned(found, f"get them now, or give a file with --vgg FILE:\n{download}")


def _fault(file: dict[str, Any], weights: dict[str, Any]) -> str:
    if "unreadable" in file:
        return f"cannot be read: {file['unreadable']}"
    if file["size"] != weights["size"]:
        return f"is damaged: {file['size']} bytes, must be {weights['size']}"
    return f"is damaged: SHA-256 {file['sha256'][:8]}…, must be {weights['wanted'][:8]}…"


def _address(url: str) -> str:
    # Not the variable's value, which may be private: the shell fills it in.
    return f'"{url}"' if url.startswith("$") else url
