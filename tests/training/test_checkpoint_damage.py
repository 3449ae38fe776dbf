"""Whatever happens to a byte of a checkpoint is found, and missing is told from damaged."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastnst.training.run_dir.checkpoint import CheckpointDamaged, CheckpointMissing, load_checkpoint, save_checkpoint

FILES = ("state.safetensors", "state.json", "manifest.json")


def damages(data: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Empty, cut short at 20 places (the very last byte among them), 100 single bits turned over."""
    draw = random.Random(seed)
    yield "empty", b""
    for length in [len(data) - 1, 1, *draw.sample(range(2, len(data) - 1), 18)]:
        yield f"cut to {length} bytes", data[:length]
    for bit in draw.sample(range(8 * len(data)), 100):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} turned over", bytes(flipped)


def write_one(run: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.weight": torch.randn(4, 3, generator=generator), "rng.cpu": generator.get_state()}
    return save_checkpoint(run, 7, tensors=tensors, state={"scaler": {}, "images": 12}, keep=1)


@pytest.mark.parametrize("name", FILES)
def test_all_damage_is_found(tmp_path: Path, name: str) -> None:
    file = write_one(tmp_path) / name
    whole = file.read_bytes()
    count = 0
    for what, data in damages(whole, seed=len(name)):
        file.write_bytes(data)
        with pytest.raises(CheckpointDamaged) as caught:
            print(f"{name}, {what}", load_checkpoint(file.parent))
        # A hash that does not fit may be wrong on either side.
        assert str(file if name != "manifest.json" else file.parent) in str(caught.value), what
        count += 1
    assert count == 121
    file.unlink()
    with pytest.raises(CheckpointMissing, match="is missing"):
        load_checkpoint(file.parent)
    file.write_bytes(whole)
    assert load_checkpoint(file.parent).step == 7


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    """The one file that no hash covers: one bit of each byte, each length, and bytes behind its end."""
    file = write_one(tmp_path) / "manifest.json"
    whole = file.read_bytes()
    variants = [whole[:length] for length in range(len(whole))] + [whole + extra for extra in (b" ", b"\n", b"\0")]
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        variants.append(bytes(flipped))
    accepted = []
    for data in variants:
        file.write_bytes(data)
        try:
            load_checkpoint(file.parent)
        except CheckpointDamaged:
            continue
        accepted.append(data)
    assert accepted == []


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"format": 1' + b"0" * 5000 + b"}", b" " * 70_000, b'{"format": true}', b'{"format": NaN}'],
    ids=["deep", "long number", "large", "boolean", "NaN"],
)
def test_a_hostile_manifest_is_damaged_and_no_more(tmp_path: Path, content: bytes) -> None:
    file = write_one(tmp_path) / "manifest.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json is damaged"):
        load_checkpoint(file.parent)


def test_a_larger_file_than_was_written_is_not_read(tmp_path: Path) -> None:
    file = write_one(tmp_path) / "state.safetensors"
    with file.open("r+b") as grown:
        grown.truncate(1 << 40)  # sparse: 1 TiB that no memory would hold
    with pytest.raises(CheckpointDamaged, match="1099511627776 bytes, at most"):
        load_checkpoint(file.parent)


def test_a_pipe_is_no_checkpoint_file(tmp_path: Path) -> None:
    file = write_one(tmp_path) / "state.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointDamaged, match="no regular file"):
        load_checkpoint(file.parent)
