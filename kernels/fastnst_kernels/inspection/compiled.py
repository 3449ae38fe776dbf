"""What Triton kernels compile to, found out on a machine without a GPU.

    with record([my_module], "sm_90") as launches:
        my_op(torch.empty(16, 64, 128, 128, dtype=torch.bfloat16))  # on the CPU; nothing is computed
    for kernel in compile_launches(launches):
        print(kernel.kernel, kernel.registers, kernel.programs_per_multiprocessor, kernel.faults())

Triton's own `preload` compiles, in as many processes as wanted, into the cache that launches on a GPU use, too. So what
is inspected is what a launch would run, for any kernel that is launched as `module.some_kernel[grid](…)`.
"""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fastnst_kernels.inspection import disassembly
from fastnst_kernels.inspection.recording import ARCHITECTURES, Architecture, Launch, Operand, compiling_for, record
from fastnst_kernels.runtime import ceil_div

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CompiledKernel",
    "Launch",
    "Operand",
    "compile_launches",
    "record",
    "touched_arguments",
]


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel's machine code in figures, and the launches that run it.

    Registers, stack and local memory are of a thread, shared and tensor memory of a program; memory is in bytes, tensor
    memory in columns. `loads` and `stores` map the bits that a thread moves at once to the number of global accesses of
    that width, `matrix` the mnemonics of matrix instructions to their number (see `disassembly.Instructions`);
    `multiplies_matrices` tells whether the source has a `tl.dot`; `reads` and `writes` name the tensors that are loaded
    from and stored to.
    """

    launches: tuple[Launch, ...]
    registers: int
    stack: int
    local: int
    shared_memory: int
    tensor_memory: int
    num_warps: int
    num_stages: int
    instructions: int
    code_size: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    matrix: Mapping[str, int]
    multiplies_matrices: bool
    reads: frozenset[str]
    writes: frozenset[str]

    @property
    def kernel(self) -> str:
        return self.launches[0].kernel

    @property
    def module(self) -> str:
        return self.launches[0].module

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.launches[0].architecture]

    @property
    def configuration(self) -> Mapping[str, Any]:
        return self.launches[0].configuration

    @property
    def widest_load(self) -> int:
        return max(self.loads, default=0)

    @property
    def widest_store(self) -> int:
        return max(self.stores, default=0)

    @property
    def untouched(self) -> frozenset[str]:
        """Tensors of more than 1% of a launch's bytes that are passed for nothing; `Launch.bytes` counts them."""
        return frozenset(
            operand.name
            for launch in self.launches
            for operand in launch.operands
            if operand.name not in self.reads | self.writes and operand.bytes > 0.01 * launch.bytes
        )

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many programs fit on one multiprocessor at a time."""
        chip = self.architecture
        # Warps get registers in units of 256, and live in one of a multiprocessor's quarters, each with its own.
        per_warp = ceil_div(max(self.registers, 1) * 32, 256) * 256
        warps = min(chip.warps, chip.registers // 4 // per_warp * 4)
        shared = ceil_div(self.shared_memory, 128) * 128 + chip.shared_memory_reserved
        limits = [chip.programs, warps // self.num_warps, chip.shared_memory_total // shared]
        if self.tensor_memory:
            limits.append(chip.tensor_memory // self.tensor_memory)
        return min(limits)

    def faults(self) -> list[str]:
        """What is wrong whatever the kernel is for: spills, too much of a limited resource, a barrier without room."""
        chip = self.architecture
        found = []
        if self.stack or self.local:
            found.append(f"spills registers: {self.stack} bytes of stack, {self.local} of local memory per thread")
        if self.shared_memory > chip.shared_memory:
            found.append(f"needs {self.shared_memory} bytes of shared memory; {chip.name} has {chip.shared_memory}")
        if self.tensor_memory > chip.tensor_memory:
            found.append(f"needs {self.tensor_memory} columns of tensor memory; {chip.name} has {chip.tensor_memory}")
        room = self.programs_per_multiprocessor * chip.multiprocessors
        programs = max(launch.programs for launch in self.launches)
        if self.configuration.get("launch_cooperative_grid") and programs > room:
            found.append(f"waits for all of its {programs} programs at a barrier; {room} fit on {chip.name} at a time")
        return found


@dataclass(frozen=True)
class _Code:
    """What a process hands back of a kernel that it compiled."""

    code: bytes
    resources: disassembly.Resources
    shared_memory: int
    tensor_memory: int
    num_warps: int
    num_stages: int
    multiplies_matrices: bool
    reads: frozenset[str]
    writes: frozenset[str]


def compile_launches(launches: Sequence[Launch], jobs: int = 1) -> list[CompiledKernel]:
    """Compiles each distinct kernel among `launches`, in `jobs` processes; quick for what Triton's cache holds.

    Raises:
        RuntimeError: a kernel does not compile; the message names it and its configuration.
    """
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.identity, []).append(launch)
    firsts = [group[0] for group in groups.values()]
    if jobs > 1 and firsts:
        # Spawned, because a fork of a process with threads, such as PyTorch's, may hang.
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            compiled = list(pool.map(_compile, firsts, chunksize=4))
    else:
        compiled = [_compile(launch) for launch in firsts]
    counts: dict[str, disassembly.Instructions] = {}
    for chip in ARCHITECTURES.values():
        own = [i for i, launch in enumerate(firsts) if launch.architecture == chip.name]
        counted = disassembly.count_instructions([compiled[i].code for i in own], chip.target)
        counts |= {firsts[i].identity: count for i, count in zip(own, counted, strict=True)}
    return [
        _figures(tuple(group), code, counts[identity])
        for (identity, group), code in zip(groups.items(), compiled, strict=True)
    ]


def _compile(launch: Launch) -> _Code:
    kernel = getattr(import_module(launch.module), launch.kernel)
    with compiling_for(ARCHITECTURES[launch.architecture]):
        try:
            compiled = kernel.preload(launch.specialization)
        except Exception as error:  # Triton's, LLVM's or the assembler's, which have no ancestor of their own
            case = f"{launch.module}.{launch.kernel} {dict(launch.configuration)} for {launch.architecture}"
            raise RuntimeError(f"{case} does not compile: {error}") from error
    cubin, metadata, source = compiled.asm["cubin"], compiled.metadata, compiled.asm["ttir"]
    signature = json.loads(launch.specialization)["signature"]
    reads, writes = touched_arguments(source, [name for name, kind in signature.items() if kind != "constexpr"])
    return _Code(
        code=disassembly.machine_code(cubin),
        resources=disassembly.resources(cubin),
        shared_memory=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        multiplies_matrices="tt.dot" in source,
        reads=reads,
        writes=writes,
    )


def _figures(launches: tuple[Launch, ...], code: _Code, counts: disassembly.Instructions) -> CompiledKernel:
    return CompiledKernel(
        launches=launches,
        registers=code.resources.registers,
        stack=code.resources.stack,
        local=code.resources.local,
        shared_memory=code.shared_memory,
        tensor_memory=code.tensor_memory,
        num_warps=code.num_warps,
        num_stages=code.num_stages,
        instructions=counts.total,
        code_size=len(code.code),
        loads=dict(sorted(counts.loads.items())),
        stores=dict(sorted(counts.stores.items())),
        matrix=dict(sorted(counts.matrix.items())),
        multiplies_matrices=code.multiplies_matrices,
        reads=code.reads,
        writes=code.writes,
    )


def touched_arguments(source: str, names: Sequence[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Which pointer arguments a kernel loads from, and which it stores to.

    Args:
        source: its Triton IR, after inlining.
        names: its run-time arguments in order.
    """
    head, _, body = source[source.index("tt.func public") :].partition("\n")
    # What each value of the IR points into: arguments themselves, then whatever is computed from pointers.
    origins = {value: {name} for value, name in zip(re.findall(r"(%[\w.]+): ", head), names, strict=True)}
    reads: set[str] = set()
    writes: set[str] = set()
    for line in body.splitlines():
        result, operation = line.split(" = ", 1) if line.lstrip().startswith("%") else ("", line)
        for inner, outer in re.findall(r"(%[\w.]+) = (%[\w.]+)", operation):  # what a loop carries
            origins[inner] = set(origins.get(outer, ()))
        operands = [origins.get(value, set()) for value in re.findall(r"%[\w.]+", operation)]
        word = operation.split(maxsplit=1)[0] if operation.strip() else ""
        if word in ("tt.load", "tt.atomic_rmw", "tt.atomic_cas"):
            reads |= operands[0]
        if word in ("tt.store", "tt.atomic_rmw", "tt.atomic_cas"):
            writes |= operands[0]
        if "!tt.ptr" in operation and word not in ("tt.load", "tt.atomic_rmw", "tt.atomic_cas"):
            for value in re.findall(r"%[\w.]+", result):
                origins[value] = set().union(*operands)
    return frozenset(reads), frozenset(writes)
