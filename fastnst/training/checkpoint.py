"""Checkpoints that are whole or not there.

    checkpoints/step_00001000/
        state.safetensors   all tensors: weights, optimiser, random generators
        state.json          everything else
        manifest.json       sizes and SHA-256 of both, written last

A checkpoint is built in a hidden folder beside its place, made durable, and renamed. So whatever ends the process, or
the machine, the newest complete checkpoint stays usable, and a folder named `step_…` was complete when it got its name.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fastnst.errors import DataError
from fastnst.storage import storage_error, sync_folder, write_atomic

FOLDER = "checkpoints"
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 1


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
        DataError: the storage refuses; the checkpoints that were there still are.
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(run)
        _remove_leftovers(folder)
        part = folder / f".{path.name}.part"
        part.mkdir()
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        for name, data in contents.items():
            write_atomic(part / name, data)
        if path.exists():
            _discard(path)
        part.rename(path)
        sync_folder(folder)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in [old for old_step, old in _by_step(folder) if old_step <= step][:-keep]:
        # What cannot be removed takes up space, which is no reason to end a run.
        with contextlib.suppress(OSError):
            _discard(old)
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check one checkpoint.

    Raises:
        CheckpointMissing: the folder, its manifest, or a file is not there.
        CheckpointDamaged: a file cannot be read, or its size, SHA-256 or content is not as written.
    """
    if not path.is_dir():
        raise CheckpointMissing(f"there is no checkpoint {path}; give a folder like {FOLDER}/step_00001000 of a run")
    step, files = _read_manifest(path)
    contents: dict[str, bytes] = {}
    for name, (size, sha256) in files.items():
        data = contents[name] = _read(path / name)
        if len(data) != size:
            raise CheckpointDamaged(f"{path / name} is damaged: {len(data)} bytes, {size} were written")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CheckpointDamaged(f"{path / name} is damaged: its SHA-256 is not that of the manifest")
    try:
        tensors = safetensors.torch.load(contents[TENSORS])
    except (SafetensorError, ValueError) as error:
        raise CheckpointDamaged(f"{path / TENSORS} is damaged: not a safetensors file ({error})") from error
    return Checkpoint(path, step, tensors, _parse_json(path / STATE, contents[STATE]))


def latest_checkpoint(run: Path, notify: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint of a run; None if there is none.

    Args:
        run: the run directory.
        notify: told of each newer one that is passed over: which file, and what is wrong with it.

    Raises:
        DataError: the folder of checkpoints cannot be read.
    """
    folder = run / FOLDER
    if not folder.exists():
        return None
    try:
        candidates = _by_step(folder)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}; check its permissions") from error
    for _, path in reversed(candidates):
        try:
            return load_checkpoint(path)
        except DataError as error:
            notify(f"checkpoint passed over: {error}")
    return None


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in `folder`, oldest first; whatever else lies there is not ours."""
    found = ((re.fullmatch(r"step_(\d{8,})", path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """Step, and size and SHA-256 of each file."""
    manifest = path / MANIFEST
    value = _parse_json(manifest, _read(manifest))
    if isinstance(value.get("format"), int) and value["format"] > FORMAT:
        raise CheckpointDamaged(
            f"{manifest} has format {value['format']}, this fastnst reads up to {FORMAT}; use a newer fastnst"
        )
    match value:
        case {"format": int(), "step": int(step), "files": dict(files)}:
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
    return step, checks


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointMissing(f"{file} is missing") from error
    except OSError as error:
        raise CheckpointDamaged(f"{file} cannot be read: {error.strerror}") from error


def _parse_json(file: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointDamaged(f"{file} is damaged: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointDamaged(f"{file} is damaged: not a JSON object")
    return value


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _discard(path: Path) -> None:
    """Remove a checkpoint; its name goes first, so that half of it is never taken for a whole one."""
    grave = path.with_name(f".{path.name}.old.part")
    path.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """What a process that was killed left behind."""
    for path in folder.glob(".step_*.part"):
        shutil.rmtree(path, ignore_errors=True)
