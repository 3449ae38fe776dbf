"""Checkpoints that are whole or not there.

    checkpoints/step_00001000/
        state.safetensors   all tensors: weights, optimiser, random generators
        state.json          everything else
        manifest.json       sizes and SHA-256 of both, written last

A checkpoint is built in a hidden folder beside its place, made durable, and renamed; then its name is made durable,
and only then older ones go. So whatever ends the process, or the machine, the newest complete checkpoint stays usable,
and a folder named `step_…` was complete when it got its name.

The manifest accounts for every byte: sizes and hashes for those of the other files, and its own form, which is the only
one that it may have.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fastnst.errors import DataError
from fastnst.images import printable
from fastnst.models.file_checks import check_safetensors_start
from fastnst.storage import make_folder, storage_error, sync_folder, write_atomic

FOLDER = "checkpoints"
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 1
LARGEST_MANIFEST = 1 << 16
"""Bytes; one that is written here has some 400."""
LARGEST_FILE = 1 << 28
"""Bytes; weights and optimiser of the transform net have some 20 million."""


class CheckpointMissing(DataError):
    """There is no checkpoint, or a file of it is not there."""


class CheckpointDamaged(DataError):
    """A checkpoint's file is there, and is not what was written, or cannot be read."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    """On the CPU, contiguous."""
    state: dict[str, Any]


def save_checkpoint(run: Path, step: int, *, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoints/step_XXXXXXXX/` of a run, then remove old ones.

    One process at a time may save into a run (`storage.lock_run`).

    Args:
        run: the run directory.
        step: steps done; a checkpoint of the same step is replaced.
        tensors: by dotted name, of any device and memory format; every bit comes back from `load_checkpoint`.
        state: whatever else is to come back; JSON values.
        keep: how many checkpoints up to this step stay, this one included. Later ones are not touched.

    Returns:
        The folder written.

    Raises:
        StorageError: the storage refuses; the checkpoints that were there still are.
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
        _tidy(folder)
        part.mkdir()
        for name, data in contents.items():
            write_atomic(part / name, data)
        _put_in_place(part, path)
        sync_folder(folder)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(_replaced(path), ignore_errors=True)
    remove_old_checkpoints(run, step, keep=keep)
    return path


def remove_old_checkpoints(run: Path, step: int, *, keep: int) -> None:
    """What a save ends with; a process that was killed in one leaves it to the next owner of the run.

    Args:
        run: the run directory.
        step: of a valid checkpoint.
        keep: how many checkpoints up to this step stay. Later ones are not touched.
    """
    # What cannot be removed takes up space, which is no reason to end a run.
    with contextlib.suppress(OSError):
        _tidy(run / FOLDER)
        for old in [old for old_step, old in _by_step(run / FOLDER) if old_step <= step][:-keep]:
            with contextlib.suppress(OSError):
                _discard(old)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check one checkpoint.

    Raises:
        CheckpointMissing: the folder, its manifest, or a file is not there.
        CheckpointDamaged: a file cannot be read, or its size, SHA-256 or content is not as written.
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
        # Not one byte more than was written, and than anyone writes: whoever exchanged a file may have larger ones.
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
    except Exception as error:  # The bytes are as written, by whoever wrote them; the reader raises nearly anything.
        raise CheckpointDamaged(f"{path / TENSORS} is damaged: not a safetensors file ({error})") from error
    return Checkpoint(path, step, tensors, _parse_json(path / STATE, contents[STATE]))


def latest_checkpoint(run: Path, notify: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint of a run; None if there is none.

    Like saving, this is for the run's owner (`storage.lock_run`): what a killed process moved aside is put back.

    Args:
        run: the run directory.
        notify: told of each newer one that is passed over: which file, and what is wrong with it.

    Raises:
        DataError: the folder of checkpoints cannot be read.
    """
    folder = run / FOLDER
    _put_back(folder)
    candidates = [folder / f"step_{step:08d}" for step in checkpoint_steps(run)]
    for path in reversed(candidates):
        try:
            return load_checkpoint(path)
        except DataError as error:
            notify(f"checkpoint passed over: {error}")
    return None


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of which a run has a checkpoint, valid or not, in ascending order.

    Raises:
        DataError: the folder of checkpoints cannot be read.
    """
    folder = run / FOLDER
    try:
        return [step for step, _ in _by_step(folder)] if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"cannot read {printable(folder)}: {error.strerror}; check its permissions") from error


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in `folder`, oldest first; whatever else lies there is not ours."""
    found = ((re.fullmatch(r"step_(\d{8,})", path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """Step, and size and SHA-256 of each file."""
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
    # Exactly these names: a manifest must not make anyone read elsewhere.
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
    # Sizes, hashes and the step are held against something else; this leaves no other byte that could change.
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


def _put_in_place(part: Path, path: Path) -> None:
    """Give the finished checkpoint its name; what has that name now steps aside until the new one is durable."""
    if path.exists():
        path.rename(_replaced(path))
    part.rename(path)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _put_back(folder: Path) -> None:
    """Give back its name to what stepped aside for a checkpoint that never came."""
    # Where the storage refuses, the checkpoints that have their names still serve.
    with contextlib.suppress(OSError):
        for replaced in folder.glob(".step_*.replaced"):
            path = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                replaced.rename(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint; its name goes first, so that half of it is never taken for a whole one."""
    grave = path.with_name(f".{path.name}.old.part")
    path.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """What a process that was killed left behind."""
    _put_back(folder)
    for path in folder.glob(".step_*.part"):
        shutil.rmtree(path, ignore_errors=True)
