"""Checkpoints: every bit comes back, all damage is found and named, and no failure costs the last good one."""

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastnst import storage
from fastnst.errors import DataError
from fastnst.training.run_dir.checkpoint import (
    CheckpointDamaged,
    CheckpointMissing,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from helpers.tiny_runs import newest


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


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_load_checkpoint_restores_every_bit(tmp_path: Path) -> None:
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
        assert (back.tensors[name].dtype, back.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(back.tensors[name]) == bits(tensor)
    back.tensors["model.conv1.weight"].add_(1)  # not a read-only view of the file's bytes
    torch.Generator().set_state(back.tensors["rng.cpu"])


texts = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(state=st.dictionaries(texts, json_values, max_size=4))
@settings(max_examples=30)
def test_load_checkpoint_restores_any_json_state(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]
) -> None:
    path = save_checkpoint(tmp_path_factory.mktemp("run"), 1, tensors={}, state=state, keep=1)
    assert load_checkpoint(path).state == state


def test_save_checkpoint_makes_files_that_others_may_read(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert (path / "state.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


# Which checkpoint is the latest, and which are removed.


def test_latest_checkpoint_is_the_one_with_the_most_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 10, 100_000_000, 9):
        save(tmp_path, step)
    assert newest(tmp_path).step == 100_000_000
    assert caplog.messages == []


def test_save_checkpoint_removes_old_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    others = ["step_1", "step_00000001.bak", "notes", "step_abcdefgh"]
    for name in others:
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step_00000000").write_text("a file")
    for step in (2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == sorted([*others, "step_00000000", "step_00000003", "step_00000004"])
    assert newest(tmp_path).step == 4


def test_save_checkpoint_keeps_the_new_one_beside_a_damaged_later_one(tmp_path: Path) -> None:
    save(tmp_path, 2)
    later = save(tmp_path, 6)
    (later / "state.json").write_text("{")
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step_00000004", "step_00000006"]
    assert newest(tmp_path).step == 4
    save(tmp_path, 6, keep=1, written="again")
    assert names(tmp_path) == ["step_00000006"]
    assert newest(tmp_path).state == {"written": "again"}


def test_save_checkpoint_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        save(tmp_path, 1)


# Damage.


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def make_unreadable(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("name", "damage", "error", "reason"),
    [
        ("state.json", lambda file: file.write_bytes(file.read_bytes()[:-1]), CheckpointDamaged, "bytes,"),
        ("state.safetensors", flip_a_bit, CheckpointDamaged, "SHA-256"),
        ("state.json", make_unreadable, CheckpointDamaged, "cannot be read: Is a directory"),
        ("state.safetensors", Path.unlink, CheckpointMissing, "is missing"),
        ("manifest.json", Path.unlink, CheckpointMissing, "is missing"),
    ],
)
def test_latest_checkpoint_names_a_damaged_one_and_takes_the_one_before(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
    error: type[DataError],
    reason: str,
) -> None:
    save(tmp_path, 1, good=True)
    file = save(tmp_path, 2) / name
    damage(file)
    with pytest.raises(error, match=reason) as caught:
        load_checkpoint(file.parent)
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 3
    assert newest(tmp_path).state == {"good": True}
    assert caplog.messages == [f"checkpoint passed over: {caught.value}"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b" " * 70_000, "70000 bytes, at most 65536"),
        (b"[]", "not a JSON object"),
        (b"{}", "lacks format, step or files"),
        (b'{"format": NaN}', "lacks format, step or files"),
        (b'{"format": true, "step": true, "files": {}}', "lacks format, step or files"),
        (b'{"format": 1, "step": "2", "files": {}}', "lacks format, step or files"),
        (b'{"format": 2, "step": 2, "files": {}}', "format 2, this fastnst reads up to 1"),
        (b'{"format": 1, "step": 2, "files": {}}', r"names \[\]"),
        (b'{"format": 1, "step": 2, "files": {"state.json": 1, "state.safetensors": 1}}', "no size and SHA-256 of sta"),
    ],
    ids=range(13),
)
def test_load_checkpoint_refuses_a_malformed_manifest(tmp_path: Path, content: bytes, reason: str) -> None:
    manifest = save(tmp_path, 2) / "manifest.json"
    manifest.write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=reason) as caught:
        load_checkpoint(manifest.parent)
    assert str(manifest) in str(caught.value)


def enter(checkpoint: Path, name: str, file: Path, removed: str = "") -> None:
    """Name another file in the manifest, with the size and hash of `file`."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"].pop(removed, None)
    manifest["files"][name] = {"size": file.stat().st_size, "sha256": storage.sha256_of(file)}
    storage.write_json(checkpoint / "manifest.json", manifest)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/state.json", "..", "", "notes"])
@pytest.mark.parametrize("replaces", [True, False])
def test_load_checkpoint_reads_no_other_file_that_a_manifest_names(tmp_path: Path, name: str, replaces: bool) -> None:
    path = save(tmp_path, 2)
    for file in (path / "notes", path.parent / "secret"):
        file.write_text("secret")
    enter(path, name, path / "notes", removed="state.json" if replaces else "")
    with pytest.raises(CheckpointDamaged, match=r"a checkpoint has \['state.json', 'state.safetensors'\]"):
        load_checkpoint(path)


def test_load_checkpoint_refuses_a_renamed_folder(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    path = path.rename(path.with_name("step_00000009"))
    with pytest.raises(CheckpointDamaged, match="is of step 2, its folder is step_00000009"):
        load_checkpoint(path)
    with pytest.raises(CheckpointMissing, match="there is no checkpoint"):
        load_checkpoint(path.with_name("step_00000001"))


def test_load_checkpoint_refuses_files_that_match_their_manifest_and_are_no_state(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    (path / "state.safetensors").write_bytes(b"junk")
    enter(path, "state.safetensors", path / "state.safetensors")
    with pytest.raises(CheckpointDamaged, match="not a safetensors file"):
        load_checkpoint(path)


def damages(data: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Empty, cut short at 20 places (the very last byte among them), 100 single bits flipped."""
    draw = random.Random(seed)
    yield "empty", b""
    for length in [len(data) - 1, 1, *draw.sample(range(2, len(data) - 1), 18)]:
        yield f"cut to {length} bytes", data[:length]
    for bit in draw.sample(range(8 * len(data)), 100):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", bytes(flipped)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_load_checkpoint_finds_damage_of_any_byte(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 7, scaler={}, images=12) / name
    whole = file.read_bytes()
    for what, data in damages(whole, seed=len(name)):
        file.write_bytes(data)
        with pytest.raises(CheckpointDamaged) as caught:
            print(f"{name}, {what}", load_checkpoint(file.parent))
        assert str(file) in str(caught.value), what
    file.write_bytes(whole)
    assert load_checkpoint(file.parent).step == 7


def test_load_checkpoint_finds_damage_of_every_byte_of_a_manifest(tmp_path: Path) -> None:
    """The one file that no hash covers: one bit of each byte, each length, and bytes behind its end."""
    file = save(tmp_path, 7) / "manifest.json"
    whole = file.read_bytes()
    variants = [whole[:length] for length in range(len(whole))] + [whole + extra for extra in (b" ", b"\n", b"\0")]
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        variants.append(bytes(flipped))
    accepted = []
    for data in variants:
        file.write_bytes(data)
        with contextlib.suppress(CheckpointDamaged):
            load_checkpoint(file.parent)
            accepted.append(data)
    assert accepted == []


def test_load_checkpoint_does_not_read_a_larger_file_than_was_written(tmp_path: Path) -> None:
    file = save(tmp_path, 7) / "state.safetensors"
    with file.open("r+b") as grown:
        grown.truncate(1 << 40)  # sparse: 1 TiB that no memory would hold
    with pytest.raises(CheckpointDamaged, match="1099511627776 bytes, at most"):
        load_checkpoint(file.parent)


def test_load_checkpoint_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    file = save(tmp_path, 7) / "state.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointDamaged, match="no regular file"):
        load_checkpoint(file.parent)
