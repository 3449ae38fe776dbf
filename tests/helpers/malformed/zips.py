"""Zip archives with records that contradict the directory."""

import functools
import struct
import zlib
from dataclasses import dataclass


@dataclass
class Record:
    """One record of a zip archive, and its entry in the directory."""

    name: str
    data: bytes
    packed: int | None = None
    """Uncompressed length, if it is compressed."""
    flags: int = 0
    method: int | None = None
    checksum: int | None = None
    offset: int | None = None


def raw_zip(records: list[Record], *, comment: bytes = b"", before: bytes = b"") -> bytes:
    """Return an archive of the records, consistent or not."""
    body, directory = bytearray(before), bytearray()
    for record in records:
        method = record.method if record.method is not None else 0 if record.packed is None else 8
        checksum = zlib.crc32(record.data) if record.checksum is None else record.checksum
        length = min(len(record.data) if record.packed is None else record.packed, 0xFFFFFFFE)
        fields = (20, record.flags, method, 0, 0, checksum, len(record.data), length, len(record.name.encode()), 0)
        offset = len(body) - len(before) if record.offset is None else record.offset
        body += b"PK\3\4" + struct.pack("<5H3L2H", *fields) + record.name.encode() + record.data
        directory += b"PK\1\2" + struct.pack("<6H3L5H2L", 20, *fields, 0, 0, 0, 0, offset) + record.name.encode()
    count = min(len(records), 0xFFFF)
    start = len(body) - len(before)
    end = struct.pack("<4H2LH", 0, 0, count, count, len(directory), start, len(comment))
    return bytes(body + directory) + b"PK\5\6" + end + comment


@functools.cache
def zeros(size: int) -> bytes:
    """Return a raw deflate stream of `size` zeros, a multiple of 16 MiB, without compressing them all."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (size >> 24) + packer.flush()
