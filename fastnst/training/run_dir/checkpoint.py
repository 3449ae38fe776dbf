"""Save and load checkpoints atomically.

    checkpoints/step_00001000/
        state.safetensors   all tensors: weights, optimizer, random generators
        state.json          everything else
        manifest.json       sizes and SHA-256 of both, written last

A checkpoint is written to a hidden folder, fsynced and renamed; the rename is fsynced before older checkpoints are
removed. So the newest complete checkpoint survives a kill or power cut at any moment, and every folder named `step_…`
was complete when it got that name.

Every byte is checked on load: the two state files by size and hash, the manifest by its only valid serialization.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fastnst.errors import DataError
from fastnst.images import printable
from fastnst.models.files.file_checks import check_safetensors_start
from fastnst.storage import make_folder, storage_error, sync_folder, write_atomic

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 1
_NO_FOLDER_RENAME = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EMFILE})
LARGEST_MANIFEST = 1 << 16
"""Bytes; real ones have about 400."""
LARGEST_FILE = 1 << 28
"""Bytes; the transform net's weights and Adam's moments have about 20 million."""


class CheckpointMissing(DataError):
    """The checkpoint or one of its files is missing."""


class CheckpointDamaged(DataError):
    """A checkpoint's file cannot be read or differs from what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    """On the CPU, contiguous."""
    state: dict[str, Any]


def save_checkpoint(run: Path, step: int, *, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoints/step_XXXXXXXX/` and remove old checkpoints; the caller owns the run (`storage.lock_run`).

    Args:
        run: the run directory.
        step: steps done; an existing checkpoint of this step is replaced.
        tensors: by dotted name, on any device, in any memory format; restored bit for bit.
        state: JSON values.
        keep: how many checkpoints up to this step remain, including this one. Later ones are not touched.

    Returns:
        The new folder.

    Raises:
        StorageError: writing failed; existing checkpoints are intact.
    """
    assert keep >= 1
    folder = run / FOLDER
    path = folder / f"step_{step:08d}"
    contents = {
        TENSORS: safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        STATE: _json_bytes(state),
    }
    files = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    contents[MANIFEST] = _json_bytes({"format": FORMAT, "step": step, "files": files})
    part = folder / f".{path.name}.part"
    try:
        make_folder(folder)
        sync_folder(run)
        _remove_leftovers(folder)
        part.mkdir()
        for name, data in contents.items():
            write_atomic(part / name, data)
        _rename_into_place(part, path)
        sync_folder(folder)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(_aside(path), ignore_errors=True)
    remove_old_checkpoints(run, step, keep=keep)
    return path


def remove_old_checkpoints(run: Path, step: int, *, keep: int) -> None:
    """Remove leftovers and all but the newest `keep` checkpoints up to `step`; failures to remove are ignored."""
    with contextlib.suppress(OSError):
        _remove_leftovers(run / FOLDER)
        for old in [old for old_step, old in _list_checkpoints(run / FOLDER) if old_step <= step][:-keep]:
            with contextlib.suppress(OSError):
                _delete(old)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointMissing: the folder or one of its files is missing.
        CheckpointDamaged: a file cannot be read, or its size, SHA-256 or content is wrong.
    """
    try:
        is_there = path.is_dir()
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error.strerror}") from error
    if not is_there:
        raise CheckpointMissing(f"there is no checkpoint {path}; give a folder like {FOLDER}/step_00001000 of a run")
    step, files = _read_manifest(path)
    contents: dict[str, bytes] = {}
    for name, (size, sha256) in files.items():
        # A manifest from elsewhere may claim any size.
        if size > LARGEST_FILE:
            raise CheckpointDamaged(f"{path / name} is damaged: {size} bytes, a checkpoint has {LARGEST_FILE} at most")
        data = contents[name] = _read(path / name, at_most=size)
        if len(data) != size:
            raise CheckpointDamaged(f"{path / name} is damaged: {len(data)} bytes, {size} were written")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CheckpointDamaged(f"{path / name} is damaged: its SHA-256 is not that of the manifest")
    try:
        check_safetensors_start(contents[TENSORS], len(contents[TENSORS]))
        tensors = safetensors.torch.load(contents[TENSORS])
    except Exception as error:  # the hash matches, but the reader raises nearly anything on foreign bytes
        raise CheckpointDamaged(f"{path / TENSORS} is damaged: not a safetensors file ({error})") from error
    return Checkpoint(path, step, tensors, _parse_json(path / STATE, contents[STATE]))


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """Load a run's newest valid checkpoint, or None; log each damaged newer one.

    The caller owns the run (`storage.lock_run`): a checkpoint that a killed process moved aside gets its name back.

    Raises:
        DataError: the checkpoints folder cannot be read.
    """
    folder = run / FOLDER
    _restore_moved_aside(folder)
    candidates = [folder / f"step_{step:08d}" for step in checkpoint_steps(run)]
    for path in reversed(candidates):
        try:
            return load_checkpoint(path)
        except DataError as error:
            log.warning("checkpoint passed over: %s", error)
    return None


def checkpoint_steps(run: Path) -> list[int]:
    """List the steps of a run's checkpoints, valid or not, in ascending order.

    Raises:
        DataError: the checkpoints folder cannot be read.
    """
    folder = run / FOLDER
    try:
        return [step for step, _ in _list_checkpoints(folder)] if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"cannot read {printable(folder)}: {error.strerror}; check its permissions") from error


def _list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List the checkpoints in `folder`, oldest first, ignoring other files."""
    found = ((re.fullmatch(r"step_(\d{8,})", path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """Return the step, and size and SHA-256 of each file."""
    manifest = path / MANIFEST
    data = _read(manifest, at_most=LARGEST_MANIFEST)
    value = _parse_json(manifest, data)
    if isinstance(value.get("format"), int) and value["format"] > FORMAT:
        raise CheckpointDamaged(
            f"{manifest} has format {value['format']}, this fastnst reads up to {FORMAT}; use a newer fastnst"
        )
    match value:
        case {"format": int(), "step": int(step), "files": dict(files)} if not isinstance(step, bool):
            pass
        case _:
            raise CheckpointDamaged(f"{manifest} is damaged: it lacks format, step or files")
    # A manifest must not make the program read other files.
    if set(files) != {TENSORS, STATE}:
        raise CheckpointDamaged(f"{manifest} names {sorted(files)}, a checkpoint has {[STATE, TENSORS]}")
    if path.name != f"step_{step:08d}":
        raise CheckpointDamaged(f"{manifest} is of step {step}, its folder is {path.name}; one of them was renamed")
    checks: dict[str, tuple[int, str]] = {}
    for name, entry in files.items():
        match entry:
            case {"size": int(size), "sha256": str(sha256)}:
                checks[name] = (size, sha256)
            case _:
                raise CheckpointDamaged(f"{manifest} is damaged: no size and SHA-256 of {name}")
    # No hash covers the manifest itself: any byte that differs from its one serialization is damage.
    entries = {name: {"size": size, "sha256": sha256} for name, (size, sha256) in checks.items()}
    if data != _json_bytes({"format": FORMAT, "step": step, "files": entries}):
        raise CheckpointDamaged(f"{manifest} is damaged: it is not as it was written")
    return step, checks


def _read(file: Path, *, at_most: int) -> bytes:
    try:
        status = file.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointDamaged(f"{file} cannot be read: it is no regular file")
        if status.st_size > at_most:
            raise CheckpointDamaged(f"{file} is damaged: {status.st_size} bytes, at most {at_most} were written")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointMissing(f"{file} is missing") from error
    except OSError as error:
        raise CheckpointDamaged(f"{file} cannot be read: {error.strerror}") from error


def _parse_json(file: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{file} is damaged: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointDamaged(f"{file} is damaged: not a JSON object")
    return value


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _rename_into_place(part: Path, path: Path) -> None:
    """Rename `part` to `path`; an existing checkpoint is moved aside until the new name is durable."""
    try:
        if path.exists():
            path.rename(_aside(path))
        part.rename(path)
    except OSError as error:
        if error.errno not in _NO_FOLDER_RENAME:
            raise
        # Some file systems (gcsfuse) rename no folders. Without its manifest, a checkpoint is passed over.
        path.mkdir(exist_ok=True)
        (path / MANIFEST).unlink(missing_ok=True)
        for name in (TENSORS, STATE, MANIFEST):
            (part / name).replace(path / name)
        sync_folder(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _restore_moved_aside(folder: Path) -> None:
    """Rename checkpoints back that were moved aside for one that was never finished."""
    # If renaming fails, the other checkpoints are still usable.
    with contextlib.suppress(OSError):
        for replaced in folder.glob(".step_*.replaced"):
            path = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                replaced.rename(path)


def _delete(path: Path) -> None:
    """Rename a checkpoint, so that no part of it can be mistaken for a whole one, then remove it."""
    renamed = path.with_name(f".{path.name}.old.part")
    try:
        path.rename(renamed)
    except OSError as error:
        if error.errno not in _NO_FOLDER_RENAME:
            raise
        (path / MANIFEST).unlink(missing_ok=True)
        renamed = path
    shutil.rmtree(renamed, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left."""
    _restore_moved_aside(folder)
    for path in folder.glob(".step_*.part"):
        shutil.rmtree(path, ignore_errors=True)
