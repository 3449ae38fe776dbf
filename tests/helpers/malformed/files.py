"""Files made to run code, fill the memory or never end, with the entry point for each.

A payload that runs creates a file, the canary. Every bomb is small or sparse on disk.
"""

import codecs
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastnst.config import load_config, to_toml
from fastnst.models.style_model import FORMAT_VERSION, KIND, save_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.training.run_dir.checkpoint import FOLDER, save_checkpoint
from fastnst.training.run_dir.layout import CONFIG_NAME
from helpers.malformed.safetensors import malformed_safetensors, safetensors_bytes
from helpers.malformed.zips import Record, raw_zip, zeros

GIB = 1 << 30


@dataclass(frozen=True)
class Malformed:
    """One file or folder."""

    way: str
    """Entry points: `vgg`, `style`, `npz`, `config`, `checkpoint`, `image` or `large`."""
    path: Path
    harmless: bool = False
    """Whether it may load, because it does no harm."""


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def malformed_weights(folder: Path, canary: Path) -> list[Malformed]:
    """Make VGG19 files and other files in their place."""
    folder.mkdir()
    touch = f"touch {canary}"
    contents: dict[str, bytes] = {
        f"system_protocol_{protocol}.pth": pickle.dumps(Call(os.system, touch), protocol) for protocol in range(6)
    }
    payloads = {
        "system": Call(os.system, touch),
        "exec": Call(exec, f"open({str(canary)!r}, 'w')"),
        "eval": Call(eval, f"open({str(canary)!r}, 'w')"),
        "popen": Call(subprocess.Popen, ("touch", str(canary))),
        "nested": {"state_dict": OrderedDict(a=[(Call(os.system, touch),)])},
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "torch_load_from_bytes": Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, touch), 2)),
        "torch_load": Call(torch.load, "elsewhere.pth", None),
        "bytearray_of_4_gib": {"features.0.weight": Call(bytearray, 4 * GIB)},
        "hex_of_hex_of_hex": _encoded_again_and_again(40),
    }
    contents |= {f"{name}_in_zip.pth": zipped(pickle.dumps(value, 2)) for name, value in payloads.items()}
    contents |= {f"{name}_in_old_format.pth": _old_format(pickle.dumps(value, 2)) for name, value in payloads.items()}
    contents["in_persistent_id.pth"] = zipped(_persistent(pickle.dumps(Call(os.system, touch), 2)))
    contents["tar.pth"] = _tar(pickle.dumps(Call(os.system, touch), 2))
    contents["hash_bomb_in_zip.pth"] = zipped(_hash_bomb(60))
    contents["hash_bomb_in_old_format.pth"] = _old_format(_hash_bomb(60))
    contents["deep_lists.pth"] = zipped(b"\x80\x02" + b"(l" * 100_000 + b".")
    contents["methods_hidden.pth"] = zipped(_hidden_methods())
    contents["key_that_has_escape_codes.pth"] = _saved({"\x1b[2J" + "x" * 500_000: torch.zeros(1)})
    contents["tensor_larger_than_its_storage.pth"] = zipped(_tensor(numel=4, shape=(1 << 31,)), data=bytes(16))
    contents["storage_of_a_terabyte.pth"] = zipped(_tensor(numel=1 << 38, shape=(4,)), data=bytes(16))
    contents["old_storage_of_a_terabyte.pth"] = _old_format(_tensor(numel=1 << 38, shape=(4,)))
    contents |= _odd_zips()
    contents |= {f"{name}.safetensors": data for name, data in malformed_safetensors(kind=None).items()}
    contents["escape_codes.safetensors"] = safetensors_bytes({"\x1b]0;owned\x07": ("F32", [1], [0, 4])}, data=bytes(4))
    files = [_write(folder / name, data) for name, data in contents.items()]
    files += [*_odd_files(folder, "vgg.pth"), *_odd_files(folder, "vgg.safetensors")]
    return [Malformed("vgg", path) for path in files]


def malformed_style_models(folder: Path) -> list[Malformed]:
    """Make style models."""
    folder.mkdir()
    net = TransformNet("johnson", generator=torch.Generator())
    whole = folder / "whole.safetensors"
    save_style_model(whole, net, metadata={})
    data = whole.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    whole.unlink()
    files = [_write(folder / f"{n}.safetensors", d) for n, d in malformed_safetensors(kind=KIND).items()]
    changes = {
        "version_of_5000_digits": {"format_version": "1" * 5000},
        "version_in_other_digits": {"format_version": "²"},
        "architecture_of_500_kb": {"architecture": "a" * 500_000},
        "architecture_that_has_escape_codes": {"architecture": "\x1b[2J\x1b]0;owned\x07"},
        "architecture_path": {"architecture": "../../../../etc/passwd"},
        "newer_writer_of_500_kb": {"format_version": str(FORMAT_VERSION + 1), "fastnst_version": "9" * 500_000},
    }
    for name, change in changes.items():
        changed = json.dumps(header | {"__metadata__": header["__metadata__"] | change}).encode()
        content = len(changed).to_bytes(8, "little") + changed + data[8 + length :]
        files.append(_write(folder / f"{name}.safetensors", content))
    run = folder / "run_whose_model_is_a_link"
    run.mkdir()
    (run / "model.safetensors").symlink_to("/etc/passwd")
    files += [run, *_odd_files(folder, "style.safetensors")]
    return [Malformed("style", path) for path in files]


def malformed_npz(folder: Path, canary: Path) -> list[Malformed]:
    """Make files for `load_lengstrom_npz`."""
    folder.mkdir()
    objects = np.array([Call(os.system, f"touch {canary}")], dtype=object)
    np.savez(folder / "objects.npz", Variable=objects, allow_pickle=True)
    np.save(folder / "objects.npy", objects, allow_pickle=True)
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    claims = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    call = b"__import__('os').system('touch CANARY')".replace(b"CANARY", bytes(canary)).ljust(117)[:117] + b"\n"
    contents = {
        "inflates.npz": raw_zip([Record("Variable.npy", zeros(4 * GIB), packed=4 * GIB)]),
        "shape_of_a_terabyte.npz": raw_zip([Record("Variable.npy", header + claims)]),
        "shape_of_a_terabyte.npy": header + claims,
        "header_with_code.npz": raw_zip([Record("Variable.npy", header + call)]),
        "deep_header.npz": raw_zip([Record("Variable.npy", header + b"(" * 117 + b"\n")]),
        "encrypted.npz": raw_zip([Record("Variable.npy", header + claims, flags=1)]),
        "unknown_method.npz": raw_zip([Record("Variable.npy", header + claims, method=99)]),
        "pickle.npz": pickle.dumps(Call(os.system, f"touch {canary}")),
    }
    files = [_write(folder / name, data) for name, data in contents.items()]
    files += [folder / "objects.npz", folder / "objects.npy", *_odd_files(folder, "lengstrom.npz")]
    return [Malformed("npz", path) for path in files]


def malformed_configurations(folder: Path) -> list[Malformed]:
    """Make TOML files."""
    folder.mkdir()
    contents = {
        "brackets": b"a = " + b"[" * 50_000,
        "tables_in_tables": b"train.steps = " + b"{a=" * 2000 + b"1" + b"}" * 2000,
        "key_of_100000_parts": b"a" + b".a" * 100_000 + b" = 1",
        "key_of_400_parts": b"train.steps" + b".a" * 400 + b" = 1",
        "integer_of_5000_digits": b"train.steps = " + b"9" * 5000,
        "hexadecimal_of_5000_digits": b"train.steps = 0x" + b"f" * 5000,
        "hexadecimal_preset": b"preset = 0x" + b"f" * 5000,
        "hexadecimal_in_a_list": b"loss.content_layers = [0x" + b"f" * 5000 + b"]",
        "infinite_epochs": b"train.epochs = 1e400",
        "huge_key": b'"' + b"k" * 900_000 + b'" = 1',
        "huge_section_key": b'[train]\n"' + b"k" * 900_000 + b'" = 1',
        "huge_preset": b'preset = "' + b"k" * 900_000 + b'"',
        "string_of_4_mb": b'preset = "' + b"k" * (4 << 20) + b'"',
        "null_character": b'style.image = "a\\u0000b"',
        "has_escape_codes": b'"\\u001b[2J\\u001b]0;owned\\u0007" = 1',
        "preset_path": b'preset = "../../../../etc/passwd"',
        "not_utf8": b'preset = "\xff\xfe"',
        "surrogate": b'preset = "\\ud800"',
        "layers_by_the_hundred_thousand": b"loss.style_layers = [" + b"'x'," * 100_000 + b"]",
        "binary": bytes(range(256)) * 16,
    }
    files = [_write(folder / f"{name}.toml", data) for name, data in contents.items()]
    return [Malformed("config", path) for path in (*files, *_odd_files(folder, "config.toml"))]


def malformed_checkpoints(folder: Path) -> list[Malformed]:
    """Run directories with one checkpoint each; where the manifest still has hashes, they are right."""
    folder.mkdir()
    runs = []
    configuration = to_toml(load_config(environment={}))
    for name, change in _checkpoint_changes():
        run = folder / name
        path = save_checkpoint(run, 1, tensors={"model.a": torch.zeros(2)}, state={"a": 1}, keep=1)
        assert path == run / FOLDER / "step_00000001"
        (run / CONFIG_NAME).write_text(configuration, "utf-8")
        change(path)
        # Valid files with the wrong tensors: loading a run from them fails later.
        wrong = name in ("tensors_type_of_integers", "tensors_same_name_twice", "tensors_nothing_in_it")
        runs.append(Malformed("checkpoint", run, harmless=wrong))
    return runs


def _checkpoint_changes() -> Iterator[tuple[str, Callable[[Path], object]]]:
    def manifest(**values: Any) -> Callable[[Path], object]:
        def change(path: Path) -> None:
            file = path / "manifest.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")

        return change

    def replaced(name: str, data: bytes, size: int | None = None) -> Callable[[Path], object]:
        """Replace a file and its entry in the manifest."""

        def change(path: Path) -> None:
            (path / name).write_bytes(data)
            if size is not None:
                os.truncate(path / name, size)
            file = path / "manifest.json"
            value = json.loads(file.read_text())
            value["files"][name] = {"size": size or len(data), "sha256": hashlib.sha256(data).hexdigest()}
            file.write_text(json.dumps(value, indent=2) + "\n")

        return change

    def link(name: str, target: str) -> Callable[[Path], object]:
        return lambda path: ((path / name).unlink(), (path / name).symlink_to(target))

    entry = {"size": 1, "sha256": "0" * 64}
    for name, elsewhere in {"above": "../../../x", "absolute": "/etc/passwd", "null": "a\0b"}.items():
        yield f"manifest_names_{name}", manifest(files={elsewhere: entry, "state.json": entry})
    yield "manifest_of_brackets", lambda path: (path / "manifest.json").write_text("[" * 60_000)
    yield "manifest_of_digits", lambda path: (path / "manifest.json").write_text('{"step": ' + "9" * 5000 + "}")
    yield "manifest_of_4_gib", lambda path: os.truncate(path / "manifest.json", 4 * GIB)
    yield "manifest_not_utf8", lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe{}")
    for name, size in {"huge": 10**400, "negative": -1, "text": "1"}.items():
        yield f"size_is_{name}", manifest(files={"state.json": entry, "state.safetensors": entry | {"size": size}})
    yield "step_is_true", manifest(step=True)
    yield "step_is_text", manifest(step="1")
    yield "files_is_a_list", manifest(files=["state.json"])
    yield "format_is_a_list", manifest(format=[1])
    yield "state_of_brackets", replaced("state.json", b"[" * 100_000)
    yield "state_of_digits", replaced("state.json", b'{"a": ' + b"9" * 5000 + b"}")
    yield "state_of_4_gib", replaced("state.json", b"{}", 4 * GIB)
    yield "tensors_of_4_gib", replaced("state.safetensors", b"", 4 * GIB)
    for name in ("state.json", "state.safetensors", "manifest.json"):
        yield f"{name}_is_dev_zero", link(name, "/dev/zero")
        yield f"{name}_is_passwd", link(name, "/etc/passwd")
        yield f"{name}_is_a_pipe", lambda path, name=name: ((path / name).unlink(), os.mkfifo(path / name))
    for name, data in malformed_safetensors(kind=None).items():
        yield f"tensors_{name}", replaced("state.safetensors", data)


def _odd_files(folder: Path, name: str) -> list[Path]:
    """Make a pipe without a writer, an endless device, a link to itself, a sparse file and a link to a text file."""
    pipe, device, loop = folder / f"pipe_{name}", folder / f"device_{name}", folder / f"loop_{name}"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    loop.symlink_to(loop.name)
    sparse, passwd = folder / f"sparse_{name}", folder / f"passwd_{name}"
    sparse.touch()
    os.truncate(sparse, 3 * GIB)
    passwd.symlink_to("/etc/passwd")
    return [pipe, device, loop, sparse, passwd]


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Pickles.


def _encoded_again_and_again(times: int) -> Any:
    """2^times bytes."""
    value: Any = b"x"
    for _ in range(times):
        value = Call(codecs.encode, value, "hex")
    return {"features.0.weight": value}


def _hash_bomb(depth: int) -> bytes:
    """A dictionary whose key is a tuple of two tuples of two tuples …, whose hash takes 2^depth steps."""
    return b"\x80\x02}K\x00\x85" + b"q\x00h\x00\x86" * depth + b"K\x01s."


def _persistent(payload: bytes) -> bytes:
    """The payload's result as the identity of a storage."""
    return payload.rstrip(b".") + b"Q."


def _hidden_methods() -> bytes:
    """An OrderedDict with the attributes `items`, `get` and `values`: a torch.Size class each."""
    size = b"ctorch\nSize\n"
    attributes = b"".join(b"X" + struct.pack("<I", len(name)) + name + size for name in (b"items", b"get", b"values"))
    return b"\x80\x02ccollections\nOrderedDict\n)R}(" + attributes + b"ub."


def _tensor(*, numel: int, shape: tuple[int, ...]) -> bytes:
    """{"features.0.weight": a tensor of `shape` in a storage of `numel` floats}"""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if item is storage else None

    storage = object()
    arguments = (storage, 0, shape, tuple(1 for _ in shape), False, OrderedDict())
    stream = io.BytesIO()
    Pickler(stream, 2).dump({"features.0.weight": Call(torch._utils._rebuild_tensor_v2, *arguments)})
    return stream.getvalue()


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _old_format(payload: bytes) -> bytes:
    """The format before the zip archive, which torchvision still serves."""
    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, stream, 2)
    return stream.getvalue() + payload + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)


def _tar(payload: bytes) -> bytes:
    """The format before that one."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    return stream.getvalue()


def zipped(payload: bytes, *, data: bytes = b"") -> bytes:
    """What torch.save would write around a pickle and one storage."""
    return raw_zip([Record("archive/data.pkl", payload), *_rest(data)])


def _rest(data: bytes = bytes(16)) -> list[Record]:
    return [Record("archive/version", b"3\n"), Record("archive/byteorder", b"little"), Record("archive/data/0", data)]


def _odd_zips() -> dict[str, bytes]:
    whole = Record("archive/data.pkl", _tensor(numel=4, shape=(4,)))
    saved = _saved({"features.0.weight": torch.ones(64, 3, 3, 3)})
    damaged = bytearray(saved)
    damaged[saved.index(b"\x00\x00\x80\x3f" * 8) + 4] ^= 1
    locator = saved.index(b"PK\6\7")
    lying = bytearray(saved)
    lying[locator - 56 + 24 : locator - 56 + 32] = struct.pack("<Q", 1)
    bomb = {"data": zeros(3 * GIB), "packed": 3 * GIB}
    return {
        "pickle_inflates.pth": raw_zip([Record("archive/data.pkl", **bomb), *_rest()]),
        "version_inflates.pth": raw_zip([whole, Record("archive/version", **bomb), *_rest()[1:]]),
        "storage_inflates.pth": raw_zip([whole, *_rest()[:2], Record("archive/data/0", **bomb)]),
        "many_records.pth": raw_zip([whole, *(Record(f"archive/data/{n}", b"") for n in range(60_000))]),
        "overlapping_records.pth": raw_zip(
            [whole, *_rest(), *(Record(f"archive/{n}", b"", offset=0) for n in range(9))]
        ),
        "record_outside.pth": raw_zip([whole, *_rest()[:2], Record("archive/data/0", bytes(16), offset=1 << 30)]),
        "traversal.pth": raw_zip([whole, *_rest(), Record("archive/../../../../tmp/x", b"x")]),
        "absolute.pth": raw_zip([whole, *_rest(), Record("/tmp/x", b"x")]),
        "two_pickles.pth": raw_zip([whole, Record("archive/DATA.PKL", b"."), *_rest()]),
        "encrypted.pth": raw_zip([Record("archive/data.pkl", whole.data, flags=1), *_rest()]),
        "wrong_checksum.pth": bytes(damaged),
        "contradicting_ends.pth": bytes(lying),
        "comment.pth": raw_zip([whole, *_rest()], comment=b"PK\5\6" + bytes(18)),
        "something_before.pth": raw_zip([whole, *_rest()], before=b"PK\3\4" + bytes(60)),
        "torchscript.pth": raw_zip([whole, *_rest(), Record("archive/constants.pkl", b"\x80\x02).")]),
    }
