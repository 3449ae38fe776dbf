"""Checkpoints: every bit comes back, real damage is found and named, and no failure costs the last good one."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastnst import storage
from fastnst.errors import DataError
from fastnst.training.run_dir.checkpoint import (
    Checkpoint,
    CheckpointDamaged,
    CheckpointMissing,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.conv1.weight": torch.randn(4, 3, 9, 9, generator=generator).to(memory_format=torch.channels_last),
        "model.conv1.scale": torch.randn(4, generator=generator, dtype=torch.float64),
        "model.half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "optimizer.step.conv1.weight": torch.tensor(float(seed)),
        "rng.cpu": generator.get_state(),
        "empty": torch.empty(0, 3),
    }


def save(run: Path, step: int, keep: int = 10, **state: Any) -> Path:
    return save_checkpoint(run, step, tensors=some_tensors(step), state=state, keep=keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class Notes(list[str]):
    """What `notify` was told."""

    def __call__(self, text: str) -> None:
        self.append(text)


def latest(run: Path, notes: Notes) -> Checkpoint:
    checkpoint = latest_checkpoint(run, notes)
    assert checkpoint is not None
    return checkpoint


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


# What goes in comes out.


def test_every_bit_comes_back(tmp_path: Path) -> None:
    tensors = some_tensors(3)
    tensors["odd values"] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    tensors["view"] = torch.arange(12.0).view(3, 4).T[1:]  # neither contiguous nor at the start of its storage
    tensors["alias"] = tensors["view"]  # shares memory with another
    path = save_checkpoint(tmp_path, 1000, tensors=tensors, state={"scaler": {"scale": 65536.0}}, keep=1)
    assert path == tmp_path / "checkpoints" / "step_00001000"
    back = load_checkpoint(path)
    assert (back.path, back.step, back.state) == (path, 1000, {"scaler": {"scale": 65536.0}})
    assert set(back.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert back.tensors[name].shape == tensor.shape
        assert bits(back.tensors[name]) == bits(tensor)


def test_what_comes_back_can_be_trained_on(tmp_path: Path) -> None:
    tensor = load_checkpoint(save(tmp_path, 1)).tensors["model.conv1.weight"]
    tensor.add_(1)  # not a read-only view of the file's bytes
    generator = torch.Generator()
    generator.set_state(load_checkpoint(save(tmp_path, 1)).tensors["rng.cpu"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(state=st.dictionaries(st.text(st.characters(codec="utf-8")), json_values, max_size=4))
def test_any_json_state_comes_back(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    path = save_checkpoint(tmp_path_factory.mktemp("run"), 1, tensors=some_tensors(), state=state, keep=1)
    assert load_checkpoint(path).state == state


def test_the_manifest_holds_sizes_and_hashes_and_the_files_are_readable_by_others(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert sorted(manifest["files"]) == ["state.json", "state.safetensors"]
    for name, entry in manifest["files"].items():
        assert entry["size"] == (path / name).stat().st_size
        assert entry["sha256"] == storage.sha256_of(path / name)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert (path / "state.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


# Which one is the newest, and which stay.


def test_the_newest_is_the_one_with_the_most_steps(tmp_path: Path) -> None:
    for step in (2, 10, 100_000_000, 9):
        save(tmp_path, step)
    notes = Notes()
    assert latest(tmp_path, notes).step == 100_000_000
    assert notes == []


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, Notes()) is None
    (tmp_path / "checkpoints").mkdir()
    assert latest_checkpoint(tmp_path, Notes()) is None


def test_old_ones_go_and_what_is_not_a_checkpoint_stays(tmp_path: Path) -> None:
    save(tmp_path, 1)
    others = ["step_1", "step_00000001.bak", "notes", "step_abcdefgh"]
    for name in others:
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step_00000000").write_text("a file")
    for step in (2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == sorted([*others, "step_00000000", "step_00000003", "step_00000004"])
    assert latest(tmp_path, Notes()).step == 4


def test_a_damaged_later_one_neither_counts_nor_costs_the_new_one(tmp_path: Path) -> None:
    save(tmp_path, 2)
    later = save(tmp_path, 6)
    (later / "state.json").write_text("{")
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step_00000004", "step_00000006"]
    assert latest(tmp_path, Notes()).step == 4
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step_00000006"]
    assert latest(tmp_path, Notes()).step == 6


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, written="first")
    path = save(tmp_path, 1, written="second")
    assert load_checkpoint(path).state == {"written": "second"}
    assert names(tmp_path) == ["step_00000001"]


def test_an_old_one_that_cannot_be_removed_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "step_00000001":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert load_checkpoint(save(tmp_path, 2, keep=1)).step == 2


# Real damage.


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def make_unreadable(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        (truncate, CheckpointDamaged, "bytes,"),
        (lengthen, CheckpointDamaged, "bytes,"),
        (flip_a_bit, CheckpointDamaged, "SHA-256"),
        (make_unreadable, CheckpointDamaged, "cannot be read: Is a directory"),
        (Path.unlink, CheckpointMissing, "is missing"),
    ],
)
def test_damage_is_named_and_passed_over(
    tmp_path: Path, name: str, damage: Callable[[Path], None], error: type[DataError], reason: str
) -> None:
    save(tmp_path, 1, good=True)
    file = save(tmp_path, 2) / name
    damage(file)
    with pytest.raises(error, match=reason) as caught:
        load_checkpoint(file.parent)
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 3
    notes = Notes()
    assert latest(tmp_path, notes).state == {"good": True}
    assert len(notes) == 1
    assert str(file) in notes[0]
    assert reason in notes[0]


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        (None, CheckpointMissing, "is missing"),
        (b"", CheckpointDamaged, "not JSON"),
        (b"\xff\xfe{", CheckpointDamaged, "not JSON"),
        (b"[]", CheckpointDamaged, "not a JSON object"),
        (b"{}", CheckpointDamaged, "lacks format, step or files"),
        (b'{"format": 1, "step": "2", "files": {}}', CheckpointDamaged, "lacks format, step or files"),
        (b'{"format": 2, "step": 2, "files": {}}', CheckpointDamaged, "format 2, this fastnst reads up to 1"),
        (b'{"format": 1, "step": 2, "files": {}}', CheckpointDamaged, r"names \[\]"),
        (
            b'{"format": 1, "step": 2, "files": {"state.json": 1, "state.safetensors": 1}}',
            CheckpointDamaged,
            "no size and SHA-256 of state.json",
        ),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, content: bytes | None, error: type[DataError], reason: str) -> None:
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    with pytest.raises(error, match=reason):
        load_checkpoint(manifest.parent)
    notes = Notes()
    assert latest(tmp_path, notes).step == 1
    assert str(manifest) in notes[0]


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/state.json", "..", "", "other.json"])
def test_a_manifest_cannot_point_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "secret").write_text("{}")
    path = save(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointDamaged, match=r"a checkpoint has \['state.json', 'state.safetensors'\]"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["../secret", "notes"])
def test_a_manifest_names_nothing_beside_its_files(tmp_path: Path, name: str) -> None:
    """Not even what is there, and as the manifest says."""
    path = save(tmp_path, 2)
    (path / name).write_text("secret")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": 6, "sha256": storage.sha256_of(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    with pytest.raises(CheckpointDamaged, match=r"a checkpoint has \['state.json', 'state.safetensors'\]"):
        load_checkpoint(path)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    path = path.rename(path.with_name("step_00000009"))
    with pytest.raises(CheckpointDamaged, match="is of step 2, its folder is step_00000009"):
        load_checkpoint(path)


def test_files_that_match_their_manifest_and_make_no_sense(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    (path / "state.safetensors").write_bytes(b"junk")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.safetensors"] = {"size": 4, "sha256": storage.sha256_of(path / "state.safetensors")}
    storage.write_json(path / "manifest.json", manifest)
    with pytest.raises(CheckpointDamaged, match="not a safetensors file"):
        load_checkpoint(path)


def test_all_damaged_means_none_and_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        truncate(save(tmp_path, step) / "state.safetensors")
    notes = Notes()
    assert latest_checkpoint(tmp_path, notes) is None
    assert [f"step_0000000{step}" in note for step, note in zip((3, 2, 1), notes, strict=True)] == [True] * 3


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "checkpoints" / "step_00000001")


# Failure while writing.


@pytest.mark.parametrize("fails_at", range(4))
def test_no_space_left_costs_nothing_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    save(tmp_path, 1, keep=1)
    calls = iter(range(100))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == fails_at + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device; free some space"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_00000001"]
    assert latest(tmp_path, Notes()).step == 1


def test_a_place_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        save(tmp_path, 1)


def test_killed_while_writing_the_last_good_one_stays_and_the_rest_is_tidied(tmp_path: Path) -> None:
    save(tmp_path, 1)
    # Dies as by SIGKILL after the tensors, before the manifest.
    program = """
import os, signal, sys
from pathlib import Path
import torch
from fastnst.training.run_dir import checkpoint

def write_atomic(path, data):
    if path.name == "manifest.json":
        os.kill(os.getpid(), signal.SIGKILL)
    path.write_bytes(data)

checkpoint.write_atomic = write_atomic
checkpoint.save_checkpoint(Path(sys.argv[1]), 2, tensors={"x": torch.ones(3)}, state={}, keep=1)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".step_00000002.part", "step_00000001"]
    notes = Notes()
    assert latest(tmp_path, notes).step == 1
    assert notes == []
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
