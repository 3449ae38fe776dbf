"""Count the instructions of compiled kernels: widths of memory accesses, matrix instructions.

Reads cubins with two tools that come with Triton, `cuobjdump` and `nvdisasm`; needs no GPU. Starting the disassembler
takes longer than reading a kernel, so it reads the code of many kernels at once.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from fastnst_kernels.runtime import triton

# A line of nvdisasm: the address, a predicate perhaps, then the instruction with its modifiers.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_LOADS = {"LDG", "LDGSTS"}  # LDGSTS copies from global to shared memory: used by pipelined loops
_STORES = {"STG"}
# The copy engine's instructions; one of them moves a whole tile, so it counts as wider than any register access.
_BULK_LOADS = {"UBLKCP", "UTMALDG"}
_BULK_STORES = {"UTMASTG"}
BULK = 1024
_MATRIX = re.compile(r"(HGMMA|IGMMA|QGMMA|HMMA|IMMA|QMMA|UTC\w*MMA)$")


@dataclass(frozen=True)
class Resources:
    """Registers and bytes of stack and local memory per thread of a kernel."""

    registers: int
    stack: int
    local: int


@dataclass
class Instructions:
    """Static counts of a kernel's instructions.

    `loads` and `stores` map the bits that a thread moves at once to the number of instructions on global memory (`BULK`
    for the copy engine's); `matrix` maps the mnemonics of matrix instructions to their number.
    """

    total: int = 0
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    matrix: Counter[str] = field(default_factory=Counter)

    def add(self, instruction: str) -> None:
        """Count one instruction, as the disassembler prints it: `LDG.E.128`."""
        name, *modifiers = instruction.split(".")
        self.total += name != "NOP"  # the padding at the end
        width = next((_WIDTHS[modifier] for modifier in modifiers if modifier in _WIDTHS), 32)
        if name in _LOADS:
            self.loads[width] += 1
        elif name in _STORES:
            self.stores[width] += 1
        elif name in _BULK_LOADS:
            self.loads[BULK] += 1
        elif name in _BULK_STORES:
            self.stores[BULK] += 1
        elif _MATRIX.match(name):
            self.matrix[name] += 1


def resources(cubin: bytes) -> Resources:
    """The resources of `cubin`, which holds one kernel."""
    with tempfile.TemporaryDirectory(prefix="fastnst-") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"])


def machine_code(cubin: bytes) -> bytes:
    """The instructions in `cubin`, without the ELF file around them.

    Raises:
        ValueError: it does not hold exactly one kernel.
    """
    sections = [code for name, code in _sections(cubin) if name.startswith(".text.")]
    if len(sections) != 1:
        raise ValueError(f"the cubin holds {len(sections)} kernels, expected 1")
    return sections[0]


def count_instructions(codes: Sequence[bytes], architecture: str) -> list[Instructions]:
    """The instructions of each kernel's machine code, all of one `architecture`, for example `sm_90a`."""
    counted = [Instructions() for _ in codes]
    ends = list(accumulate(len(code) for code in codes))
    with tempfile.TemporaryDirectory(prefix="fastnst-") as folder:
        file = Path(folder) / "code.bin"
        file.write_bytes(b"".join(codes))
        target = architecture.replace("sm_", "SM")
        text = _run(triton.knobs.nvidia.nvdisasm.path, "--binary", target, file) if codes else ""
    for address, instruction in _INSTRUCTION.findall(text):
        counted[bisect_right(ends, int(address, 16))].add(instruction)
    return counted


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each section of a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, entries, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_size) for i in range(entries)]
    names = headers[names_index][4]
    for name, _, _, _, offset, size in headers:
        start = names + name
        yield elf[start : elf.index(b"\0", start)].decode(), elf[offset : offset + size]


def _run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} failed with code {done.returncode}: {done.stderr.strip()}")
    return done.stdout
