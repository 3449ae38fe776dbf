"""The calls of the kernel report, at the networks' shapes and odd ones, and the rules for kernels.

The ops run on uninitialised CPU tensors while their launches are recorded. The tensors' pages are never touched, so
the largest shapes cost neither time nor memory.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, product
from types import ModuleType
from typing import Any

import torch
from op_calls import OPS

import fastnst_kernels as fk
from fastnst_kernels.inspection import CompiledKernel, Launch, cost, record
from fastnst_kernels.inspection.recording import kernels_of

Shape = tuple[int, int, int, int]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

NORM_SHAPES = ((32, 256, 256), (64, 128, 128), (128, 64, 64))
LAYER_SHAPES = ((64, 256, 256), (128, 128, 128), (256, 64, 64), (512, 32, 32), (512, 16, 16))
BATCHES = (4, 16, 32)
# Channels that are no multiple of 16, of 8, of 2; one channel.
ODD_SHAPES: tuple[Shape, ...] = ((3, 24, 13, 11), (2, 20, 9, 10), (4, 3, 33, 32), (2, 1, 5, 7))
LARGE_SHAPE: Shape = (1, 32, 1024, 1536)  # too large for one pass on any GPU
NARROW_SHAPE: Shape = (2, 8, 1, 2)  # smaller than what its padding mirrors

ADD: dict[str, Any] = {"residual": True, "relu": True}
UPSAMPLE: dict[str, Any] = {"relu": True, "upsample": 2, "padding": 1}
EPILOGUES: tuple[dict[str, Any], ...] = (
    {},
    {"relu": True},
    {"residual": True},
    ADD,
    {"relu": True, "padding": 1},
    UPSAMPLE,
)
TRAINING: dict[str, Any] = {"training": True}
INFERENCE: dict[str, Any] = {"training": False}
# The norms' kernels are long and differ in which parts are left out. So, unless it is thorough, the report has the full
# ones, and every dtype, layout and branch of the dispatch once: options, shape, dtype, layout.
NORM_CASES: dict[str, tuple[tuple[dict[str, Any], Shape, str, str], ...]] = {
    "instance_norm": (
        (ADD, (16, 32, 256, 256), "bf16", "channels_last"),
        (UPSAMPLE, (16, 64, 128, 128), "bf16", "channels_last"),
        (ADD, (4, 128, 64, 64), "bf16", "channels_last"),
        (ADD, (16, 128, 64, 64), "fp16", "channels_last"),
        (ADD, (16, 64, 128, 128), "fp32", "channels_last"),
        (UPSAMPLE, (16, 64, 128, 128), "bf16", "contiguous"),
        # Also launched by johnson's transform net.
        ({"relu": True, "padding": 1}, (16, 64, 128, 128), "bf16", "channels_last"),
        ({"residual": True, "padding": 1}, (16, 128, 64, 64), "bf16", "channels_last"),
        ({"relu": True}, (16, 32, 256, 256), "bf16", "channels_last"),
    ),
    "batch_norm": (
        (TRAINING | ADD, (16, 32, 256, 256), "bf16", "channels_last"),
        (TRAINING | UPSAMPLE, (4, 128, 64, 64), "bf16", "channels_last"),
        (TRAINING | ADD, (16, 128, 64, 64), "bf16", "contiguous"),
        (INFERENCE | ADD, (16, 64, 128, 128), "bf16", "channels_last"),
        (INFERENCE | UPSAMPLE, (16, 128, 64, 64), "fp16", "contiguous"),
    ),
}
LAYER_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "gram_matrix": ({},),
    "style_loss": ({},),
    "loss_relu_backward": ({"style": True}, {"content": True}),
    "max_pool2d_switches": ({},),
    "max_unpool2d_switches": ({},),
}
IMAGE_SHAPE = (3, 256, 256)
# With the padding of each transform net; uint8 batches and images between networks are channels_last.
IMAGE_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "uint8_to_input": ({}, {"padding": 4}, {"padding": 40}),
    "output_to_vgg_input": ({},),
    "output_to_vgg_input_backward": ({},),
}
# In 16-bit dtypes these run on tensor cores.
PRODUCTS = ("gram_matrix", "style_loss", "loss_relu_backward style")


@dataclass(frozen=True)
class Case:
    """An op with options on one kind of image; rules on speed apply if it is `hot`, used in training."""

    op: str
    options: dict[str, Any]
    shape: Shape
    dtype: str
    layout: str
    hot: bool
    tf32: bool = False

    @property
    def name(self) -> str:
        options = dict(self.options)
        words = ["inference"] if options.get("training") is False else []
        words += [name if value is True else f"{name}={value}" for name, value in options.items() if value]
        return " ".join([self.op, *words])


@dataclass(frozen=True)
class Call:
    """The launches of one direction of a case."""

    case: Case
    direction: str
    architecture: str
    launches: tuple[Launch, ...] = field(repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of all launches' operands: moved if no launch reads or writes anything twice."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def minimum_bytes(self) -> int:
        """The lower bound of any design (`inspection.cost`)."""
        counter = getattr(cost, self.case.op + ("_backward" if self.direction == "backward" else ""), None)
        if self.case.op == "max_pool2d_switches" and self.direction == "backward":
            counter = cost.max_unpool2d_switches
        least: int = counter(self.case.shape, DTYPES[self.case.dtype], **self.case.options).minimum_bytes
        return least


def cases(op: str, thorough: bool = False) -> Iterator[Case]:
    """The cases of one op: one per kernel, table entry, dtype and layout; `thorough`: every combination."""
    pairs = [(dtype, layout) for layout in LAYOUTS for dtype in DTYPES]
    odd_kinds = list(product(ODD_SHAPES, pairs) if thorough else zip(ODD_SHAPES, cycle(pairs[::3] + pairs[2:3])))
    if op in NORM_CASES:
        modes = ({},) if op == "instance_norm" else (TRAINING, INFERENCE)
        if thorough:
            kinds = product((mode | epilogue for mode in modes for epilogue in EPILOGUES), NORM_SHAPES, BATCHES, pairs)
            yield from (Case(op, options, (n, *shape), *pair, hot=True) for options, shape, n, pair in kinds)
        else:
            yield from (Case(op, *kind, hot=True) for kind in NORM_CASES[op])
        for mode in modes:
            yield from (Case(op, mode, shape, *pair, hot=False) for shape, pair in odd_kinds)
            for pair in pairs if thorough else pairs[:1]:
                yield Case(op, mode | ADD, LARGE_SHAPE, *pair, hot=False)
                yield Case(op, mode | UPSAMPLE, NARROW_SHAPE, *pair, hot=False)
        return
    if op in IMAGE_OPTIONS:
        for options, n, dtype in product(IMAGE_OPTIONS[op], BATCHES if thorough else BATCHES[1:2], DTYPES):
            yield Case(op, options, (n, *IMAGE_SHAPE), dtype, "channels_last", hot=True)
        yield from (Case(op, {}, (2, 3, 13, 11), dtype, "channels_last", hot=False) for dtype in DTYPES)
        return
    for options in LAYER_OPTIONS[op]:
        if thorough:
            layers = [((n, *shape), pair) for shape, n, pair in product(LAYER_SHAPES, BATCHES, pairs)]
        else:
            layers = [((16, *shape), pairs[0]) for shape in LAYER_SHAPES]
            layers += [((16, *shape), pair) for shape, pair in zip(cycle(LAYER_SHAPES[:3]), pairs[1:])]
            layers += [((4, *LAYER_SHAPES[-1]), pairs[0])]
        yield from (Case(op, options, shape, *pair, hot=True) for shape, pair in layers)
        pools = op.endswith("switches")
        fitting = [kind for kind in odd_kinds if not pools or min(kind[0][2:]) > 1]
        yield from (Case(op, options, shape, *pair, hot=False) for shape, pair in fitting)
        if pools:
            window = {"kernel_size": 3, "stride": 2}
            yield from (Case(op, window, (16, 64, 128, 128), *pair, hot=False) for pair in pairs[::2])
        elif "content" not in options:
            yield Case(op, options, (16, 128, 128, 128), *pairs[2], hot=False, tf32=True)


def record_calls(
    architecture: str,
    ops: Iterable[str] = OPS,
    dtypes: Iterable[str] = DTYPES,
    *,
    thorough: bool = False,
    only: Callable[[Case], bool] = lambda _: True,
) -> list[Call]:
    """The calls of every case of `ops` on `architecture`."""
    chosen = [case for op in ops for case in cases(op, thorough) if case.dtype in dtypes and only(case)]
    calls = []
    products = torch.backends.cuda.matmul
    precision = products.fp32_precision
    with record(package_modules(), architecture) as launches:
        for case in chosen:
            products.fp32_precision = "tf32" if case.tf32 else "ieee"
            start = len(launches)
            layout = LAYOUTS[case.layout]
            x = torch.empty(case.shape, dtype=DTYPES[case.dtype], memory_format=layout, requires_grad=True)
            y, leaves = OPS[case.op](x, **case.options)
            middle = len(launches)
            calls.append(Call(case, "forward", architecture, tuple(launches[start:middle])))
            if leaves:
                torch.autograd.grad(y, leaves, torch.empty_like(y))
                calls.append(Call(case, "backward", architecture, tuple(launches[middle:])))
    products.fp32_precision = precision
    return calls


def package_modules() -> list[ModuleType]:
    """All modules of the kernel library."""
    return [importlib.import_module(found.name) for found in pkgutil.walk_packages(fk.__path__, f"{fk.__name__}.")]


def unreached_kernels(calls: Sequence[Call]) -> list[str]:
    """Kernels of the library that no call launched."""
    reached = {launch.kernel for call in calls for launch in call.launches}
    return sorted({name for module in package_modules() for name in kernels_of(module)} - reached)


def broken_rules(kernels: Sequence[CompiledKernel], calls: Sequence[Call]) -> list[str]:
    """The rules of `kernels/README.md` that kernels break, one line each."""
    hot = {launch.identity for call in calls if call.case.hot for launch in call.launches}
    found = []
    for kernel in kernels:
        faults = kernel.faults()
        if kernel.launches[0].identity in hot:
            faults += _narrow_accesses(kernel)
            if kernel.untouched:
                faults.append(f"neither reads nor writes {', '.join(sorted(kernel.untouched))}: pass None")
        name = f"{kernel.architecture.name} {kernel.kernel} {describe(kernel.configuration)}"
        found += [f"{name}: {fault}" for fault in faults]
    return found + slow_products(kernels, calls)


def describe(configuration: Any) -> str:
    """Compile-time parameters and options as one line."""
    return " ".join(f"{name}={value}" for name, value in configuration.items())


def _narrow_accesses(kernel: CompiledKernel) -> list[str]:
    """16-bit channels_last images with C a multiple of 8 that are not accessed in 16 bytes."""
    images = [
        operand
        for launch in kernel.launches
        for operand in launch.operands
        if operand.channels_last and operand.dtype.itemsize == 2 and operand.shape[1] % 8 == 0
    ]
    names = {operand.name for operand in images}
    read, written = sorted(names & kernel.reads), sorted(names & kernel.writes)
    found = []
    if read and kernel.widest_load < 128:
        found.append(f"reads {', '.join(read)} in pieces of at most {kernel.widest_load} bits")
    if written and kernel.widest_store < 128:
        found.append(f"writes {', '.join(written)} in pieces of at most {kernel.widest_store} bits")
    return found


def slow_products(kernels: Sequence[CompiledKernel], calls: Sequence[Call]) -> list[str]:
    """Products of 16-bit features that do not run on tensor cores (on Hopper: of a warp group)."""
    matrix = {kernel.launches[0].identity: kernel.matrix for kernel in kernels}
    seen = set()
    for call in calls:
        if not call.case.hot or call.case.name not in PRODUCTS or DTYPES[call.case.dtype].itemsize != 2:
            continue
        mnemonics = {name for launch in call.launches for name in matrix[launch.identity]}
        if "HGMMA" not in mnemonics if call.architecture == "sm_90" else not mnemonics:
            line = f"{call.architecture} {call.case.name} {call.direction} {call.case.dtype} {call.case.layout}"
            seen.add(
                f"{line} multiplies without tensor cores ({', '.join(sorted(mnemonics)) or 'not one'} in its code)"
            )
    return sorted(seen)


@contextmanager
def watched_tables() -> Iterator[list[str]]:
    """Yield a list that afterwards contains the unread entries of the configuration tables."""
    unread: list[str] = []
    tables = [
        (module, name, table)
        for module in package_modules()
        if kernels_of(module)
        for name, table in vars(module).items()
        if name.isupper() and isinstance(table, dict)
    ]
    watches = {id(table): _Watched(table) for _, _, table in tables}  # a table may have a name in several modules
    for module, name, table in tables:
        setattr(module, name, watches[id(table)])
    try:
        yield unread
    finally:
        for module, name, table in tables:
            setattr(module, name, table)
            unread += [f"{module.__name__}.{name}[{key!r}]" for key in table if key not in watches[id(table)].read]


class _Watched(dict[Any, Any]):
    def __init__(self, table: dict[Any, Any]) -> None:
        super().__init__(table)
        self.read: set[Any] = set()

    def __iter__(self) -> Iterator[Any]:  # without it, `**table` would bypass `__getitem__`
        return super().__iter__()

    def __getitem__(self, key: Any) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)
