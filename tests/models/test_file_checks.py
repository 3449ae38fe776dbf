"""Checks of untrusted weights files: each rule with a file that only this rule refuses."""

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fastnst.models.files.file_checks import UnsafeFileError, check_safetensors_file, check_torch_file
from helpers.malformed.files import Call, zipped
from helpers.malformed.safetensors import with_header
from helpers.malformed.zips import Record, raw_zip

WEIGHTS = OrderedDict({"features.0.weight": torch.ones(4, 3), "features.0.bias": torch.arange(4.0).half()})


def saved(*, in_zip: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save({"state_dict": WEIGHTS, "epoch": 7}, stream, _use_new_zipfile_serialization=in_zip)
    return stream.getvalue()


def check(folder: Path, data: bytes) -> None:
    (folder / "weights.pth").write_bytes(data)
    check_torch_file(folder / "weights.pth")


def old_format(payload: bytes) -> bytes:
    return b"".join(pickle.dumps(part, 2) for part in (1, 1001, {})) + payload + pickle.dumps([], 2)


def archive(*records: Record) -> bytes:
    return raw_zip([*records, Record("archive/version", b"3\n")])


@pytest.mark.parametrize("in_zip", [True, False])
def test_check_torch_file_accepts_files_of_torch_save(tmp_path: Path, in_zip: bool) -> None:
    check(tmp_path, saved(in_zip=in_zip))


@pytest.mark.parametrize("around", [zipped, old_format], ids=["zip", "old format"])
@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (pickle.dumps(Call(os.system, "true"), 2), r"it names \w+\.system, which weights do not need"),
        (pickle.dumps({"a": Call(torch.load, "b")}, 2), r"it names torch\.serialization\.load"),
        (pickle.dumps(Call(os.system, "true"), 4), r"does more \(STACK_GLOBAL\)"),
        (b"(S'true'\nios\nsystem\n.", r"does more \(INST\)"),
        (b"\x80\x02\x82\x01.", r"does more \(EXT1\)"),
    ],
    ids=["system", "load", "from the stack", "an instance", "an extension"],
)
def test_check_torch_file_refuses_other_names_in_pickles(
    tmp_path: Path, around: Any, payload: bytes, reason: str
) -> None:
    with pytest.raises(UnsafeFileError, match=reason):
        check(tmp_path, around(payload))


@pytest.mark.parametrize("around", [zipped, old_format], ids=["zip", "old format"])
def test_check_torch_file_refuses_nested_tuples(tmp_path: Path, around: Any) -> None:
    """A tuple of two tuples of two tuples …; a depth of sixteen is accepted."""

    def nested(depth: int) -> bytes:
        return b"\x80\x02}K\x00\x85" + b"q\x00h\x00\x86" * depth + b"K\x01s."

    check(tmp_path, around(nested(16)))
    with pytest.raises(UnsafeFileError, match="nests tuples"):
        check(tmp_path, around(nested(17)))


def test_check_torch_file_refuses_flipped_bit(tmp_path: Path) -> None:
    data = bytearray(saved())
    data[data.index(torch.ones(4, 3).numpy().tobytes()) + 2] ^= 1
    with pytest.raises(UnsafeFileError, match=r"the checksum of its record .* does not fit; fetch it again"):
        check(tmp_path, bytes(data))


def test_check_torch_file_refuses_compressed_record(tmp_path: Path) -> None:
    pickled = Record("archive/data.pkl", pickle.dumps({}, 2))
    check(tmp_path, archive(pickled))
    with pytest.raises(UnsafeFileError, match="is compressed"):
        check(tmp_path, archive(pickled, Record("archive/data/0", b"\0" * 9, packed=1 << 30)))


def test_check_torch_file_refuses_overlapping_records(tmp_path: Path) -> None:
    inside = Record("archive/data/0", b"1234", offset=0)
    outer = Record("archive/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(UnsafeFileError, match="overlaps another one"):
        check(tmp_path, archive(outer, inside))


def test_check_safetensors_file_refuses_long_header(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(save(dict(WEIGHTS)))
    check_safetensors_file(file)
    file.write_bytes(with_header(b"{" + b" " * (1 << 20) + b"}", bytes(16)))
    with pytest.raises(
        UnsafeFileError, match="its header of 1,048,578 bytes is longer than the 1,048,576 of any model"
    ):
        check_safetensors_file(file)
