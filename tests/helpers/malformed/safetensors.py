"""safetensors files with wrong headers."""

import functools
import json
import struct
from collections.abc import Mapping
from typing import Any

Entry = tuple[str, list[int], list[int]]
"""dtype, shape, [begin, end] in the data."""


def safetensors_bytes(entries: Mapping[str, Entry], *, data: bytes, metadata: Mapping[str, Any] | None = None) -> bytes:
    """Return a file with the given header entries, right or wrong."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    for name, (kind, shape, offsets) in entries.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return length (default: the true one), header and data."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@functools.cache
def malformed_safetensors(*, kind: str | None) -> dict[str, bytes]:
    """Return contents by name; `kind` is the metadata's kind of file, so that it is not refused for that."""
    metadata = None if kind is None else {"kind": kind, "format_version": "1", "architecture": "johnson"}
    start = b"{" if metadata is None else b'{"__metadata__":' + json.dumps(metadata).encode() + b","
    name, other = "features.0.weight", "features.0.bias"

    def one(kind: str, shape: list[int], offsets: list[int]) -> bytes:
        return safetensors_bytes({name: (kind, shape, offsets)}, data=bytes(16), metadata=metadata)

    def two(first: list[int], second: list[int]) -> bytes:
        entries = {name: ("F32", [2], first), other: ("F32", [2], second)}
        return safetensors_bytes(entries, data=bytes(16), metadata=metadata)

    tensor = b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    notes = json.dumps({**(metadata or {}), **{f"{n:x}": "" for n in range(300_000)}}).encode()
    return {
        "header_of_2_to_63": with_header(b"{}", length=1 << 63),
        "header_of_all_ones": with_header(b"{}", length=(1 << 64) - 1),
        "header_longer_than_file": with_header(start + tensor + b"}", bytes(16), length=10_000),
        "header_missing": with_header(b"", length=0),
        "only_a_length": struct.pack("<Q", 2),
        "half_a_length": b"\x02\x00",
        "overlapping": two([0, 8], [4, 12]),
        "same_place": two([0, 8], [0, 8]),
        "hole": two([0, 8], [10, 18]),
        "out_of_range": one("F32", [4], [0, 1 << 40]),
        "outside": one("F32", [4], [1 << 40, (1 << 40) + 16]),
        "negative": one("F32", [4], [-16, 0]),
        "backwards": one("F32", [4], [16, 0]),
        "offsets_of_400_digits": one("F32", [4], [0, 10**400]),
        "shape_too_small": one("F32", [2], [0, 16]),
        "shape_that_overflows": one("F32", [1 << 62, 1 << 62, 16], [0, 16]),
        "shape_negative": one("F32", [-4], [0, 16]),
        "type_too_large": one("F64", [4], [0, 16]),
        "type_unknown": one("F33", [4], [0, 16]),
        "type_of_integers": one("I32", [4], [0, 16]),
        "data_left_over": safetensors_bytes({name: ("F32", [1], [0, 4])}, data=bytes(16), metadata=metadata),
        "same_name_twice": with_header(start + tensor + b"," + tensor + b"}", bytes(16)),
        "brackets": with_header(start + b'"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "objects": with_header(start + b'"a":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001),
        "metadata_bomb": with_header(b'{"__metadata__":' + notes + b"," + tensor + b"}", bytes(16)),
        "metadata_not_text": with_header(b'{"__metadata__":{"kind":1},' + tensor + b"}", bytes(16)),
        "not_utf8": with_header(start + b'"\xff\xfe":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(16)),
        "not_json": with_header(b"\x80\x04."),
        "a_list": with_header(b"[]"),
        "nothing_in_it": with_header(b"{}"),
    }
