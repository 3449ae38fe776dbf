"""Damaged weights and checkpoints without end: refused with a DataError, or what they were."""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fastnst.errors import DataError
from fastnst.models.vgg19 import VGG19
from fastnst.models.weights import load_vgg19, torchvision_key
from fastnst.training.run_dir.checkpoint import STATE, TENSORS, load_checkpoint, save_checkpoint

NET = VGG19("conv1_1", generator=torch.Generator().manual_seed(0))
TENSORS_OF_NET = {f"{torchvision_key(name[:7])}.{name[8:]}": t.contiguous() for name, t in NET.state_dict().items()}


def _saved(*, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(TENSORS_OF_NET, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


SAFETENSORS, ZIPPED, OLD = save(TENSORS_OF_NET), _saved(zipped=True), _saved(zipped=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def load(path: Path, data: bytes) -> VGG19 | None:
    path.write_bytes(data)
    try:
        return load_vgg19(str(path), last_layer="conv1_1", flavour="caffe")
    except DataError as error:
        refusal = str(error)
    assert 20 < len(refusal) < 2000
    return None


def same(net: VGG19) -> bool:
    return all(torch.equal(tensor, NET.state_dict()[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(("name", "data"), [("a.safetensors", SAFETENSORS), ("a.pth", ZIPPED), ("b.pth", OLD)])
def test_load_vgg19_reads_each_file_undamaged(folder: Path, name: str, data: bytes) -> None:
    net = load(folder / name, data)
    assert net is not None
    assert same(net)


@given(st.integers(0, len(ZIPPED) - 1), st.integers(0, 7))
@settings(max_examples=200)
def test_load_vgg19_flipped_bit_of_an_archive_changes_no_weight(folder: Path, place: int, bit: int) -> None:
    damaged = bytearray(ZIPPED)
    damaged[place] ^= 1 << bit
    net = load(folder / "flipped.pth", bytes(damaged))
    assert net is None or same(net)


@given(st.integers(0, len(ZIPPED) - 1))
@settings(max_examples=100)
def test_load_vgg19_refuses_a_cut_archive(folder: Path, length: int) -> None:
    assert load(folder / "cut.pth", ZIPPED[:length]) is None


edits = st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 4), st.binary(max_size=6)), min_size=1, max_size=4)


def edited(data: bytes, changes: list[tuple[float, int, bytes]], reach: int) -> bytes:
    """With pieces of the first `reach` bytes replaced by others."""
    for place, length, piece in changes:
        at = int(place * min(reach, len(data)))
        data = data[:at] + piece + data[at + length :]
    return data


@given(edits)
@settings(max_examples=200)
def test_load_vgg19_edited_safetensors_and_pickles(folder: Path, changes: list[tuple[float, int, bytes]]) -> None:
    load(folder / "edited.safetensors", edited(SAFETENSORS, changes, 220))
    load(folder / "edited.pth", edited(OLD, changes, 700))


@given(st.binary(max_size=100), st.sampled_from(["x.pth", "x.safetensors"]))
@settings(max_examples=100)
@example(b"PK\3\4", "x.pth")
@example(b"\x80\x02.", "x.pth")
def test_load_vgg19_refuses_random_bytes(folder: Path, data: bytes, name: str) -> None:
    assert load(folder / name, data) is None


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return save_checkpoint(folder, 7, tensors={"a": torch.arange(6.0)}, state={"x": [1, None, "y"]}, keep=1)


def load_it(path: Path) -> None:
    try:
        found = load_checkpoint(path)
    except DataError as error:
        refusal = str(error)
        assert 20 < len(refusal) < 2000
    else:
        assert found.step == 7
        assert isinstance(found.state, dict)
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.tensors.values())


@contextmanager
def restored(file: Path) -> Iterator[bytes]:
    before = file.read_bytes()
    try:
        yield before
    finally:
        file.write_bytes(before)


def load_with(path: Path, name: str, data: bytes) -> None:
    """Load the checkpoint with other bytes in a file, and their hash in the manifest."""
    file, manifest = path / name, path / "manifest.json"
    with restored(file), restored(manifest) as before:
        value = json.loads(before)
        value["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        file.write_bytes(data)
        manifest.write_text(json.dumps(value, indent=2) + "\n")
        load_it(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["format", "step", "files", STATE, TENSORS, "size", "sha256"]


@given(st.dictionaries(st.sampled_from(NAMES), json_values | st.dictionaries(st.sampled_from(NAMES), json_values)))
@settings(max_examples=80)
@example({"format": 1, "step": 10**400, "files": {}})
@example({"format": 1, "step": True, "files": {STATE: {}, TENSORS: {}}})
def test_load_checkpoint_manifest_of_any_values(checkpoint: Path, value: dict[str, object]) -> None:
    with restored(checkpoint / "manifest.json"):
        (checkpoint / "manifest.json").write_text(json.dumps(value))
        load_it(checkpoint)


@given(edits)
@settings(max_examples=80)
def test_load_checkpoint_refuses_an_edited_manifest(checkpoint: Path, changes: list[tuple[float, int, bytes]]) -> None:
    with restored(checkpoint / "manifest.json") as before:
        after = edited(before, changes, len(before))
        (checkpoint / "manifest.json").write_bytes(after)
        if after != before:
            with pytest.raises(DataError):
                load_checkpoint(checkpoint)


@given(edits)
@settings(max_examples=80)
def test_load_checkpoint_edited_tensors_with_the_right_hash(
    checkpoint: Path, changes: list[tuple[float, int, bytes]]
) -> None:
    data = (checkpoint / TENSORS).read_bytes()
    load_with(checkpoint, TENSORS, edited(data, changes, len(data)))


@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=80)
@example(b"[" * 100_000)
@example(b'{"a": ' + b"9" * 5000 + b"}")
def test_load_checkpoint_any_state_with_the_right_hash(checkpoint: Path, data: bytes) -> None:
    load_with(checkpoint, STATE, data)


@pytest.mark.campaign
@given(edits, st.sampled_from([(SAFETENSORS, 220, ".safetensors"), (OLD, 700, ".pth"), (ZIPPED, len(ZIPPED), ".pth")]))
@settings(max_examples=100_000)
def test_load_vgg19_edited_files_campaign(
    folder: Path, changes: list[tuple[float, int, bytes]], seed: tuple[bytes, int, str]
) -> None:
    """Ten minutes: `pytest -m campaign tests/models/test_fuzz_weights.py`."""
    data, reach, suffix = seed
    load(folder / f"many{suffix}", edited(data, changes, reach))
