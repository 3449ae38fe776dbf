"""Record launches of Triton kernels on a machine without a GPU, instead of running them.

Triton's own launcher specialises each on its arguments: their types, which are divisible by 16, which are 1. `compiled`
compiles recorded launches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.runtime import triton

_KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """The resources of a GPU, from CUDA's programming guide (technical specifications per capability).

    `shared_memory` is the most bytes for one program, `shared_memory_total` for all programs on a multiprocessor.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_memory: int
    shared_memory_total: int
    gpu: str
    target: str

    # Per multiprocessor, the same for all.
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    shared_memory_reserved: int = 1 * _KIB  # of each program, by the driver
    tensor_memory: int = 512  # columns, from sm_100 on


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_80", 80, 108, 163 * _KIB, 164 * _KIB, "A100", "sm_80"),
        Architecture("sm_90", 90, 132, 227 * _KIB, 228 * _KIB, "H100, H200", "sm_90a"),
        Architecture("sm_100", 100, 148, 227 * _KIB, 228 * _KIB, "B200", "sm_100a"),
    )
}


@dataclass(frozen=True)
class Operand:
    """A tensor argument. `bytes` are 0 if an earlier argument of the launch is the same memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last: bool
    bytes: int


@dataclass(frozen=True)
class Launch:
    """One launch. `configuration`: compile-time parameters and options; `specialization`: Triton's key."""

    architecture: str
    module: str
    kernel: str
    configuration: Mapping[str, Any]
    grid: tuple[int, ...]
    operands: tuple[Operand, ...]
    specialization: str = field(repr=False)

    @cached_property
    def identity(self) -> str:
        """Equal for launches that run the same machine code."""
        text = "\n".join((self.architecture, self.module, self.kernel, self.specialization))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def programs(self) -> int:
        return prod(self.grid)

    @property
    def bytes(self) -> int:
        """Bytes that the launch moves if it reads or writes each element of each operand once."""
        return sum(operand.bytes for operand in self.operands)


@contextmanager
def record(modules: Iterable[ModuleType], architecture: str) -> Iterator[list[Launch]]:
    """Record the launches of the modules' kernels for a GPU of `architecture`, instead of running them.

    Within, this library's ops take their Triton path on CPU tensors; their results are uninitialised, or zero.

    Args:
        modules: the modules that launch kernels: each module's attributes ending in `_kernel` are replaced.
        architecture: a key of `ARCHITECTURES`.

    Yields:
        The list that grows with each launch.

    Raises:
        ValueError: the architecture is unknown, there is no Triton, or the kernels were made for its interpreter.
    """
    if triton is None:
        raise ValueError("kernels are compiled by Triton, which is not installed")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is unknown: use one of {', '.join(ARCHITECTURES)}")
    if runtime.INTERPRETING:
        raise ValueError("kernels were made for Triton's interpreter, which compiles nothing: unset TRITON_INTERPRET")
    chip = ARCHITECTURES[architecture]
    launches: list[Launch] = []
    allocate = runtime.allocate

    def harmless_allocation(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        # Integers, such as the switches of pooling, may be checked for their range.
        return tensor if tensor.is_floating_point() else tensor.zero_()

    properties = runtime.Chip(chip.multiprocessors, divmod(chip.capability, 10))
    changes: list[tuple[Any, str, Any]] = [
        (runtime, "implementation", lambda _: "triton"),
        (runtime, "chip", lambda _: properties),
        (runtime, "allocate", harmless_allocation),
    ]
    for module in modules:
        for name in kernels_of(module):
            recorder = _Recorder(getattr(module, name), (module.__name__, name), architecture, launches)
            changes.append((module, name, recorder))
    with _changed(changes), compiling_for(chip):
        yield launches


def kernels_of(module: ModuleType) -> list[str]:
    """The names of a module's kernels."""
    return [name for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "arg_names")]


@contextmanager
def compiling_for(chip: Architecture) -> Iterator[None]:
    """Within, Triton compiles for `chip`."""
    drivers = triton.runtime.driver
    # Its public `active` would look for a GPU if no driver was in use before.
    previous = drivers._active
    drivers.set_active(_AbsentGpu(chip))
    try:
        yield
    finally:
        drivers.set_active(previous)


class _Recorder:
    """Replaces a kernel; records its launches."""

    def __init__(self, kernel: Any, names: tuple[str, str], architecture: str, launches: list[Launch]) -> None:
        self._kernel, self._names, self._architecture, self._launches = kernel, names, architecture, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            arguments = dict(zip(self._kernel.arg_names, args, strict=False)) | options
            specializations: list[str] = []

            def note(*, compile: Mapping[str, Any], **_: Any) -> bool:  # the parameter's name is Triton's
                specializations.append(compile["specialization_data"])
                return True  # tells Triton not to compile now

            with _changed([(triton.knobs.runtime, "jit_cache_hook", note)]):
                self._kernel.warmup(*args, grid=grid, **options)
            (specialization,) = specializations
            self._launches.append(
                Launch(
                    architecture=self._architecture,
                    module=self._names[0],
                    kernel=self._names[1],
                    configuration={name: value for name, value in options.items() if not isinstance(value, Tensor)},
                    grid=tuple(grid(arguments) if callable(grid) else grid),
                    operands=tuple(_operands(arguments)),
                    specialization=specialization,
                )
            )

        return launch


def _operands(arguments: Mapping[str, Any]) -> Iterator[Operand]:
    counted: set[int] = set()
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor):
            known = tensor.data_ptr() in counted
            counted.add(tensor.data_ptr())
            yield Operand(
                name=name,
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                channels_last=tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.shape[1] > 1,
                bytes=0 if known else tensor.numel() * tensor.element_size(),
            )


class _AbsentGpu:
    """The part of a Triton driver that specialising and compiling need."""

    def __init__(self, chip: Architecture) -> None:
        self._chip = chip

    def get_current_device(self) -> _AbsentGpu:
        # Kernels cache their binaries by device. A new device each time shares nothing with the machine's GPUs, and
        # every launch calls the hook, even if its kernel was compiled before.
        return self

    def get_current_stream(self, _: object) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self._chip.capability, 32)


@contextmanager
def _changed(changes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within, each owner's attribute has the given value; afterwards the one that it had."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
