"""Check untrusted weights files before `torch.load` or safetensors reads them.

`torch.load(weights_only=True)` runs no code of the file, yet a file of a few hundred bytes may take all memory (a
compressed record, `bytearray(1 << 40)`) or all time (hashing nested tuples), and no checksum is verified. safetensors
accepts a header of 100 MB. Weights need none of that, so it is refused here.
"""

import io
import os
import pickletools
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_FILE_BYTES = 2 << 30
"""VGG19 in double precision has 1.15 GB."""
_MAX_HEADER_BYTES = 1 << 20
"""Limit of a safetensors header and of a pickle; VGG19's have some thousand bytes."""
_MAX_RECORDS = 10_000
_MAX_SHARED_TUPLES = 16
"""Limit of a pickle's references to earlier tuples: each may double the time to hash. Weights have none."""

# The names in a dictionary of tensors or parameters, or in a training checkpoint around one.
_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (Size|device)"
    r"|torch (float16|float32|float64|bfloat16|int8|uint8|int16|int32|int64|bool)"
    r"|torch (Float|Double|Half|BFloat16|Char|Byte|Short|Int|Long|Bool)Storage"
)
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_ZIP_START, _ZIP_ENTRY, _ZIP_END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
_ZIP64_END, _ZIP64_LOCATOR = b"PK\6\6", b"PK\6\7"


class UnsafeFileError(Exception):
    """Why a file is refused; without the file's name, which the caller knows."""


def check_regular_file(path: Path) -> None:
    """Raise UnsafeFileError for a pipe, which would block, a device, or more than 2 GiB; OSError for no file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFileError("it is not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise UnsafeFileError(f"its {status.st_size / 2**30:.1f} GiB are above {MAX_FILE_BYTES >> 30} GiB")


def check_safetensors_file(path: Path) -> None:
    """Raise UnsafeFileError for a header larger than any model's, and as `check_regular_file` does."""
    check_regular_file(path)
    with path.open("rb") as file:
        check_safetensors_start(file.read(8), path.stat().st_size)


def check_safetensors_start(start: bytes, size: int) -> None:
    """Check the first 8 bytes, the header's length, of a safetensors file of `size` bytes, in the same way."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > size - 8:
        raise UnsafeFileError(f"its {size:,} bytes are fewer than its header announces")
    if length > _MAX_HEADER_BYTES:
        raise UnsafeFileError(f"its header of {length:,} bytes is longer than the {_MAX_HEADER_BYTES:,} of any model")


def check_torch_file(path: Path) -> None:
    """Refuse a file, zip archive or older format, that could harm `torch.load`.

    An archive must be as `torch.save` writes it: one end record, uncompressed records that do not overlap, right
    checksums, a short pickle. The pickle, in both formats, may only name the classes of tensors.

    Raises:
        UnsafeFileError: with the reason.
        OSError: the file cannot be read.
    """
    check_regular_file(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) == _ZIP_START:  # as torch.load tells the formats apart
            for name, start, length, checksum in _zip_records(file, size):
                if name.lower().endswith(".pkl"):
                    if length > _MAX_HEADER_BYTES:
                        raise UnsafeFileError(f"its {name[:80]!r} of {length:,} bytes is longer than weights need")
                    file.seek(start)
                    _check_pickle(io.BytesIO(file.read(length)))
                _check_record(file, name, start, length, checksum)
        else:
            file.seek(0)
            beginning = io.BytesIO(file.read(_MAX_HEADER_BYTES))
            # Magic number, version, machine, the weights, and the keys of the storages that follow as bytes.
            for _ in range(5):
                _check_pickle(beginning)


def excerpt(text: str, length: int = 80) -> str:
    """Text from a file for a message: shortened, and without control characters."""
    short = text if len(text) <= length else text[: length - 1] + "…"
    return short if short.isprintable() else repr(short)


def _check_pickle(stream: io.BytesIO) -> None:
    """Check the operations of one pickle without executing them."""
    tuples: set[int] = set()  # memo keys
    last, shared, written = "", 0, 0
    try:
        for operation, argument, _ in pickletools.genops(stream):
            name = operation.name
            if name == "GLOBAL" and not _NAMES.fullmatch(str(argument)):
                raise UnsafeFileError(f"it names {str(argument).replace(' ', '.')[:80]}, which weights do not need")
            if name in ("STACK_GLOBAL", "INST", "OBJ") or name.startswith("EXT"):
                raise UnsafeFileError(f"its pickle does more ({name}) than weights need")
            if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                key = written if name == "MEMOIZE" else int(str(argument))
                written += 1
                (tuples.add if last in _TUPLES else tuples.discard)(key)
            elif name == "DUP" or (name in ("GET", "BINGET", "LONG_BINGET") and int(str(argument)) in tuples):
                shared += 1
                if shared > _MAX_SHARED_TUPLES:
                    raise UnsafeFileError("its pickle nests tuples in a way that weights do not")
            last = name
    except ValueError as error:
        raise UnsafeFileError(f"its pickle is damaged or cut short ({str(error)[:80]})") from error


def _zip_records(file: BinaryIO, size: int) -> list[tuple[str, int, int, int]]:
    """Name, start, length and CRC-32 of each record; UnsafeFileError for an ambiguous archive."""
    directory_start, directory_size, count = _zip_end(file, size)
    if count > _MAX_RECORDS or directory_size > _MAX_HEADER_BYTES:
        raise UnsafeFileError(f"its {count:,} records are more than weights have")
    file.seek(directory_start)
    records = sorted(_zip_entries(file.read(directory_size), count))
    found = []
    end_of_last = 0
    for offset, name, length, checksum in records:
        file.seek(offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(_ZIP_START):
            raise UnsafeFileError(f"its record {name[:80]!r} is not where it should be")
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        start = offset + 30 + name_length + extra_length
        if offset < end_of_last or start + length > directory_start:
            raise UnsafeFileError(f"its record {name[:80]!r} overlaps another one")
        end_of_last = start + length
        found.append((name, start, length, checksum))
    names = [name.lower() for name, *_ in found]
    folders = {name.partition("/")[0] for name in names}
    if len(set(names)) < len(names) or len(folders) != 1 or any(".." in name.split("/") for name in names):
        raise UnsafeFileError("its records do not lie in one folder, each under a name of its own")
    return found


def _zip_end(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Offset, size and number of entries of the central directory."""
    file.seek(max(0, size - 42))
    tail = file.read(42).rjust(42, b"\0")
    disk, first_disk, count_here, count, directory_size, offset, comment = struct.unpack("<4H2LH", tail[24:])
    if not tail[20:].startswith(_ZIP_END) or disk or first_disk or count_here != count or comment:
        raise UnsafeFileError("it is cut short, or no archive that torch.save wrote")
    end = size - 22
    if tail.startswith(_ZIP64_LOCATOR):
        (end,) = struct.unpack_from("<Q", tail, 8)
        file.seek(min(end, size))
        longer = file.read(56).ljust(56, b"\0")
        same = struct.unpack_from("<4Q", longer, 24) == (count, count, directory_size, offset)
        if not longer.startswith(_ZIP64_END) or not same or end + 56 != size - 42:
            raise UnsafeFileError("its two end records contradict each other")
    if offset + directory_size != end:
        raise UnsafeFileError("its directory is not where it should be")
    return offset, directory_size, count


def _zip_entries(directory: bytes, count: int) -> Iterator[tuple[int, str, int, int]]:
    """Offset, name, length and CRC-32 of each entry."""
    at = 0
    for _ in range(count):
        if len(directory) < at + 46 or directory[at : at + 4] != _ZIP_ENTRY:
            raise UnsafeFileError("its directory is damaged")
        flags, method = struct.unpack_from("<HH", directory, at + 8)
        checksum, packed, length, name_length, extra, comment = struct.unpack_from("<3L3H", directory, at + 16)
        (offset,) = struct.unpack_from("<L", directory, at + 42)
        name = directory[at + 46 : at + 46 + name_length].decode("utf-8", "replace")
        if method or packed != length:
            raise UnsafeFileError(f"its record {name[:80]!r} is compressed, which torch.save never does; save it again")
        if flags & 1:
            raise UnsafeFileError(f"its record {name[:80]!r} is encrypted; save it again without a password")
        yield offset, name, length, checksum
        at += 46 + name_length + extra + comment
    if at != len(directory):
        raise UnsafeFileError("its directory is damaged")


def _check_record(file: BinaryIO, name: str, start: int, length: int, checksum: int) -> None:
    file.seek(start)
    found, left = 0, length
    while left and (block := file.read(min(left, 1 << 20))):
        found = zlib.crc32(block, found)
        left -= len(block)
    if found != checksum:
        raise UnsafeFileError(f"the checksum of its record {name[:80]!r} does not fit; fetch it again")
