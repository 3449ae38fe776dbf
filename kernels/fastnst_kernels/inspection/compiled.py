"""Compile recorded launches of Triton kernels without a GPU, and measure the machine code.

    with record([my_module], "sm_90") as launches:
        my_op(torch.empty(16, 64, 128, 128, dtype=torch.bfloat16))  # on the CPU; nothing is computed
    for kernel in compile_launches(launches):
        print(kernel.kernel, kernel.registers, kernel.programs_per_multiprocessor, kernel.faults())

Triton's own `preload` compiles, in several processes, into the cache that launches on a GPU use, too. So this is the
code that a launch would run, for any kernel that is launched as `module.some_kernel[grid](…)`.
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
from fastnst_kernels.inspection.recording import ARCHITECTURES, Architecture, Launch, compiling_for
from fastnst_kernels.runtime import ceil_div


@dataclass(frozen=True)
class CompiledKernel:
    """Figures of a kernel's machine code, and the launches that run it.

    Registers, stack and local memory are per thread, shared and tensor memory per program; memory is in bytes, tensor
    memory in columns. For `loads`, `stores` and `matrix` see `disassembly.Instructions`; `multiplies_matrices` tells
    whether the source has a `tl.dot`; `reads` and `writes` name the tensors that are loaded from and stored to.
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
        """Tensors of more than 1% of a launch's bytes that the kernel does not use."""
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
        """Faults of any kernel: spills, exceeded limits, a barrier between non-resident programs."""
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


def compile_launches(launches: Sequence[Launch], jobs: int = 1) -> list[CompiledKernel]:
    """Compile each distinct kernel among `launches`, in `jobs` processes, unless Triton's cache holds it.

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
        counted = disassembly.count_instructions([compiled[i][0] for i in own], chip.target)
        counts |= {firsts[i].identity: count for i, count in zip(own, counted, strict=True)}
    return [
        CompiledKernel(launches=tuple(group), **figures, **_counted(counts[identity]))
        for (identity, group), (_, figures) in zip(groups.items(), compiled, strict=True)
    ]


def _compile(launch: Launch) -> tuple[bytes, dict[str, Any]]:
    """The machine code, and the fields of `CompiledKernel` that do not need a disassembler."""
    kernel = getattr(import_module(launch.module), launch.kernel)
    with compiling_for(ARCHITECTURES[launch.architecture]):
        try:
            compiled = kernel.preload(launch.specialization)
        except Exception as error:  # Triton's, LLVM's or the assembler's, which have no common base class
            case = f"{launch.module}.{launch.kernel} {dict(launch.configuration)} for {launch.architecture}"
            raise RuntimeError(f"{case} does not compile: {error}") from error
    cubin, metadata, source = compiled.asm["cubin"], compiled.metadata, compiled.asm["ttir"]
    signature = json.loads(launch.specialization)["signature"]
    reads, writes = touched_arguments(source, [name for name, kind in signature.items() if kind != "constexpr"])
    code, resources = disassembly.machine_code(cubin), disassembly.resources(cubin)
    return code, {
        "registers": resources.registers,
        "stack": resources.stack,
        "local": resources.local,
        "shared_memory": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "code_size": len(code),
        "multiplies_matrices": "tt.dot" in source,
        "reads": reads,
        "writes": writes,
    }


def _counted(counts: disassembly.Instructions) -> dict[str, Any]:
    """The other fields of `CompiledKernel`."""
    widths = {name: dict(sorted(getattr(counts, name).items())) for name in ("loads", "stores", "matrix")}
    return {"instructions": counts.total, **widths}


def touched_arguments(source: str, names: Sequence[str]) -> tuple[frozenset[str], frozenset[str]]:
    """The pointer arguments that a kernel loads from, and those that it stores to.

    Args:
        source: its Triton IR, after inlining.
        names: its run-time arguments in order.
    """
    head, _, body = source[source.index("tt.func public") :].partition("\n")
    # The arguments that each value of the IR points into.
    origins = {value: {name} for value, name in zip(re.findall(r"(%[\w.]+): ", head), names, strict=True)}
    reads: set[str] = set()
    writes: set[str] = set()
    for line in body.splitlines():
        result, operation = line.split(" = ", 1) if line.lstrip().startswith("%") else ("", line)
        for inner, outer in re.findall(r"(%[\w.]+) = (%[\w.]+)", operation):  # loop-carried values
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
