"""The kernel report tells good machine code from bad: toy kernels with known faults."""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

triton = pytest.importorskip("triton")

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import kernel_calls  # noqa: E402
import kernel_report  # noqa: E402

from fastnst_kernels import runtime  # noqa: E402
from fastnst_kernels.inspection import ARCHITECTURES, CompiledKernel, compile_launches, record, recording  # noqa: E402
from fastnst_kernels.inspection.disassembly import Instructions  # noqa: E402
from fastnst_kernels.runtime import jit, tl  # noqa: E402

THIS = sys.modules[__name__]


@jit
def copy_kernel(x, y, shift, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o + shift, mask=o < n), mask=o < n)


@jit
def crowded_kernel(x, y, rows, BLOCK: tl.constexpr):
    """Hold eight blocks until all are loaded."""
    o = tl.arange(0, BLOCK)
    held = ()
    for i in tl.static_range(8):
        held = held + (tl.load(x + i * rows + o),)  # noqa: RUF005 (Triton knows no starred tuples)
    for i in tl.static_range(8):
        tl.store(y + i * rows + o, held[7 - i] * held[i])


@jit
def product_kernel(a, b, c, k, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    o, o_k = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    b_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, k, DEPTH):
        b_a = tl.load(a + o[:, None] * k + i + o_k[None, :])
        b_b = tl.load(b + (i + o_k)[:, None] * BLOCK + o[None, :])
        b_sum = tl.dot(b_a, b_b, acc=b_sum, input_precision=PRECISION)
    tl.store(c + o[:, None] * BLOCK + o[None, :], b_sum)


@jit
def walking_kernel(x, y, idle, n, BLOCK: tl.constexpr):  # noqa: ARG001
    """Pointers move; the address of a store depends on a load."""
    p_x = x + tl.arange(0, BLOCK)
    for _ in range(n):
        if n > 3:
            tl.store(y + tl.load(p_x), 1)
        p_x += BLOCK
    tl.atomic_add(y, 1)


@jit
def wrong_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.arange(0, BLOCK + 1))


def image(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(2, 16, 32, 32, dtype=dtype, memory_format=torch.channels_last)


@functools.cache
def copied(architecture: str = "sm_90", shift: int = 16, **options: object) -> CompiledKernel:
    x = image()
    with record([THIS], architecture) as launches:
        copy_kernel[(32,)](x, runtime.allocate_like(x), shift, x.numel(), BLOCK=1024, num_warps=4, **options)
    (kernel,) = compile_launches(launches)
    return kernel


@functools.cache
def multiplied(architecture: str, dtype: torch.dtype, side: int = 128, stages: int = 2) -> CompiledKernel:
    a, b, c = (torch.empty(side, 1024, dtype=dtype) for _ in range(3))
    with record([THIS], architecture) as launches:
        product_kernel[(1,)](a, b, c, 1024, PRECISION="ieee", BLOCK=side, DEPTH=side, num_warps=8, num_stages=stages)
    (kernel,) = compile_launches(launches)
    return kernel


def call_of(kernel: CompiledKernel, op: str, dtype: str, hot: bool = True) -> kernel_calls.Call:
    case = kernel_calls.Case(op, {}, (2, 16, 32, 32), dtype, "channels_last", hot)
    return kernel_calls.Call(case, "forward", kernel.architecture.name, kernel.launches)


# Recording.


def test_record_notes_a_launch_with_its_operands() -> None:
    x = image()
    with record([THIS], "sm_90") as launches:
        y = runtime.allocate_like(x)
        for _ in range(2):
            copy_kernel[lambda arguments: (arguments["n"] // 1024,)](x, y, 16, x.numel(), BLOCK=1024, num_warps=4)
        copy_kernel[(32,)](x, x, 16, x.numel(), BLOCK=1024, num_warps=4)
    first, second, in_place = launches
    assert (first.kernel, first.grid, first.programs) == ("copy_kernel", (32,), 32)
    assert dict(first.configuration) == {"BLOCK": 1024, "num_warps": 4}
    assert [(one.name, one.dtype, one.shape, one.channels_last) for one in first.operands] == [
        ("x", x.dtype, x.shape, True),
        ("y", x.dtype, x.shape, True),
    ]
    assert first.identity == second.identity
    assert (first.bytes, in_place.bytes) == (2 * x.nbytes, x.nbytes)


def test_launch_identity_is_that_of_the_machine_code() -> None:
    x = image()
    with record([THIS], "sm_90") as launches:
        for shift, block, warps in ((16, 1024, 4), (3, 1024, 4), (16, 512, 4), (16, 1024, 8), (32, 1024, 4)):
            copy_kernel[(32,)](x, x, shift, 4096, BLOCK=block, num_warps=warps)
    first, *others, same = (launch.identity for launch in launches)
    assert len({first, *others}) == 4
    assert same == first


def test_record_restores_everything() -> None:
    before = copy_kernel, runtime.implementation, runtime.chip, runtime.allocate
    try:
        with record([THIS], "sm_80"):
            assert runtime.implementation(torch.empty(1)) == "triton"
            assert runtime.chip(torch.empty(1)) == runtime.Chip(108, (8, 0))
            raise KeyError
    except KeyError:
        pass
    assert before == (THIS.copy_kernel, runtime.implementation, runtime.chip, runtime.allocate)
    assert runtime.implementation(torch.empty(1)) == "reference"


def test_record_refuses_what_it_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'sm_70' is unknown: use one of sm_80, sm_90, sm_100"), record([], "sm_70"):
        pass
    monkeypatch.setattr(runtime, "INTERPRETING", True)
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"), record([], "sm_90"):
        pass
    monkeypatch.setattr(recording, "triton", None)
    with pytest.raises(ValueError, match="Triton, which is not installed"), record([], "sm_90"):
        pass


# Compiling.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compile_launches_finds_no_faults_in_a_copy(architecture: str) -> None:
    kernel = copied(architecture)
    assert (kernel.widest_load, kernel.widest_store) == (128, 128)
    assert (kernel.stack, kernel.local, kernel.shared_memory, kernel.matrix) == (0, 0, 0, {})
    assert 0 < kernel.registers < 64
    assert 0 < kernel.instructions * 16 <= kernel.code_size
    assert kernel.faults() == []
    assert kernel_calls.broken_rules([kernel], [call_of(kernel, "instance_norm", "bf16")]) == []


def test_compiled_kernel_knows_reads_and_writes() -> None:
    kernel = copied()
    assert (kernel.reads, kernel.writes) == ({"x"}, {"y"})
    x = torch.zeros(1024, dtype=torch.int32)
    with record([THIS], "sm_90") as launches:
        for idle in (x.clone(), x[:4].clone(), x):
            walking_kernel[(1,)](x, x, idle, 8, BLOCK=128, num_warps=4)
    (kernel,) = compile_launches(launches)
    assert (kernel.reads, kernel.writes) == ({"x", "y"}, {"y"})
    large, small, same = (replace(kernel, launches=(launch,)) for launch in launches)
    assert (large.untouched, small.untouched, same.untouched) == ({"idle"}, frozenset(), frozenset())
    (line,) = kernel_calls.broken_rules([large], [call_of(large, "instance_norm", "fp32")])
    assert line.endswith("neither reads nor writes idle: pass None")
    assert kernel_calls.broken_rules([large], [call_of(large, "instance_norm", "fp32", hot=False)]) == []


def test_broken_rules_names_narrow_loads_of_hot_calls() -> None:
    kernel = copied(shift=3)  # an odd shift: nobody can know that 16 bytes lie together
    assert (kernel.widest_load, kernel.widest_store) == (16, 128)
    hot, odd = (call_of(kernel, "instance_norm", "bf16", hot) for hot in (True, False))
    (line,) = kernel_calls.broken_rules([kernel], [hot])
    assert line.endswith("reads x in pieces of at most 16 bits")
    assert line.startswith("sm_90 copy_kernel BLOCK=1024")
    assert kernel_calls.broken_rules([kernel], [odd]) == []


def test_broken_rules_names_narrow_stores() -> None:
    kernel = replace(copied(), stores={32: 4, 64: 1})
    (line,) = kernel_calls.broken_rules([kernel], [call_of(kernel, "instance_norm", "bf16")])
    assert line.endswith("writes y in pieces of at most 64 bits")


def test_faults_names_spills() -> None:
    x = torch.empty(8 * 8192)
    with record([THIS], "sm_90") as launches:
        crowded_kernel[(1,)](x, x, 8192, BLOCK=8192, num_warps=4, maxnreg=64)
    (kernel,) = compile_launches(launches)
    assert kernel.stack > 0
    assert [fault for fault in kernel.faults() if "spills registers" in fault]
    (line,) = kernel_calls.broken_rules([kernel], [call_of(kernel, "instance_norm", "fp32", hot=False)])
    assert "spills registers" in line


def test_faults_names_too_much_shared_memory() -> None:
    kernel = multiplied("sm_80", torch.bfloat16, stages=5)
    assert kernel.shared_memory > 163 * 1024
    assert kernel.faults() == [f"needs {kernel.shared_memory} bytes of shared memory; sm_80 has {163 * 1024}"]
    assert kernel.programs_per_multiprocessor == 0


def test_faults_names_a_barrier_without_room() -> None:
    kernel = copied(launch_cooperative_grid=True)
    assert kernel.faults() == []
    launch = kernel.launches[0]
    room = 132 * kernel.programs_per_multiprocessor
    assert replace(kernel, launches=(replace(launch, grid=(room,)),)).faults() == []
    (fault,) = replace(kernel, launches=(launch, replace(launch, grid=(room, 2)))).faults()
    assert fault == f"waits for all of its {2 * room} programs at a barrier; {room} fit on sm_90 at a time"


@pytest.mark.parametrize(("architecture", "mnemonic"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
def test_compiled_kernel_counts_matrix_instructions(architecture: str, mnemonic: str) -> None:
    kernel = multiplied(architecture, torch.bfloat16)
    assert set(kernel.matrix) == {mnemonic}
    assert kernel.multiplies_matrices
    assert kernel_calls.slow_products([kernel], [call_of(kernel, "gram_matrix", "bf16")]) == []


def test_slow_products_names_products_without_tensor_cores() -> None:
    kernel = multiplied("sm_90", torch.float32, side=32)
    assert (kernel.matrix, kernel.multiplies_matrices) == ({}, True)
    assert kernel_calls.slow_products([kernel], [call_of(kernel, "gram_matrix", "fp32")]) == []
    (line,) = kernel_calls.broken_rules([kernel], [call_of(kernel, "gram_matrix", "bf16")])
    assert line.startswith("sm_90 gram_matrix forward bf16 channels_last multiplies without tensor cores")
    older = replace(kernel, matrix={"HMMA": 8})  # the instructions of the architecture before
    assert len(kernel_calls.slow_products([older], [call_of(older, "gram_matrix", "bf16")])) == 1


def test_compile_launches_names_what_does_not_compile() -> None:
    with record([THIS], "sm_90") as launches:
        wrong_kernel[(1,)](torch.empty(8), BLOCK=8, num_warps=1)
    with pytest.raises(RuntimeError, match=r"wrong_kernel {'BLOCK': 8, 'num_warps': 1} for sm_90 does not compile"):
        compile_launches(launches)


def test_compile_launches_in_processes_gives_the_same() -> None:
    with record([recording, THIS], "sm_90") as launches:
        copy_kernel[(32,)](image(), image(), 16, 4096, BLOCK=1024, num_warps=4)
    assert compile_launches(launches, jobs=2) == compile_launches(launches)
    assert compile_launches([]) == compile_launches([], jobs=2) == []


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "tensor_memory", "programs"),
    [
        (16, 1, 0, 0, 32),  # no more than 32 programs
        (32, 4, 0, 0, 16),  # no more than 64 warps
        (33, 4, 0, 0, 12),  # 40 registers are handed out: 48 warps
        (64, 8, 0, 0, 4),  # 65,536 / (64 · 256)
        (255, 8, 0, 0, 1),
        (32, 4, 100 * 1024, 0, 2),  # 228 KiB / (100 + 1)
        (32, 4, 227 * 1024, 0, 1),
        (32, 4, 0, 256, 2),  # 512 columns
    ],
)
def test_programs_per_multiprocessor(registers, warps, shared, tensor_memory, programs) -> None:
    kernel = replace(copied(), registers=registers, num_warps=warps, shared_memory=shared, tensor_memory=tensor_memory)
    assert kernel.programs_per_multiprocessor == programs


def test_instructions_add_counts_by_width() -> None:
    counts = Instructions()
    for line in (
        "LDG.E.128.CONSTANT",
        "LDG.E.LTC128B.64",
        "LDG.E",
        "LDGSTS.E.BYPASS.128",
        "LDG.E.U16",
        "STG.E.ENL2.256",
        "UBLKCP.S.G",
        "HGMMA.64x64x16.F32.BF16",
        "UTCHMMA",
        "LDGDEPBAR",
        "IMAD.WIDE.U32",
        "NOP",
    ):
        counts.add(line)
    assert counts.loads == {128: 2, 64: 1, 32: 1, 16: 1, 1024: 1}
    assert counts.stores == {256: 1}
    assert counts.matrix == {"HGMMA": 1, "UTCHMMA": 1}
    assert counts.total == 11


# The command.


def test_kernel_report_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--architecture sm_90 --dtype bf16 --op max_pool2d_switches --jobs 1".split()  # noqa: SIM905
    files = ["--json", str(tmp_path / "report.json"), "--markdown", str(tmp_path / "report.md")]
    done = CliRunner().invoke(kernel_report.main, arguments + files)
    assert done.exit_code == 0, done.output
    assert "0 rules broken" in done.output
    data = json.loads((tmp_path / "report.json").read_text("utf-8"))
    identities = {kernel["identity"] for kernel in data["kernels"]}
    assert identities == {launch["identity"] for call in data["calls"] for launch in call["launches"]}
    assert {kernel["architecture"] for kernel in data["kernels"]} == {"sm_90"}
    assert all(kernel["stack"] == kernel["local"] == 0 < kernel["registers"] for kernel in data["kernels"])
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "## `pool.kernels_2x2._pool_columns_kernel`" in text
    assert "| type, layout | configuration | sm_90 |" in text
    assert "None." in text
    monkeypatch.setattr(kernel_report, "broken_rules", lambda *_: ["sm_90 some_kernel: [slow]"])
    done = CliRunner().invoke(kernel_report.main, arguments)
    assert done.exit_code == 1
    assert "broken: sm_90 some_kernel: [slow]" in done.output


def test_traffic_rows_compare_with_the_minimum() -> None:
    calls = kernel_calls.record_calls("sm_90", ["max_unpool2d_switches"], ["bf16"])
    rows = kernel_report.traffic_rows(calls, kernel_calls.LAYER_SHAPES)
    assert [(row["op"], row[""]) for row in rows] == [
        ("`max_unpool2d_switches`", "forward"),
        ("`max_unpool2d_switches`", "backward"),
    ]
    for row in rows:
        assert [row["×".join(map(str, shape))] for shape in kernel_calls.LAYER_SHAPES] == ["1.000 (1)"] * 5
    (call, *_) = calls
    twice = replace(call, launches=call.launches * 2)
    assert twice.bytes == 2 * call.bytes == 2 * call.minimum_bytes


def test_kernel_report_refuses_unknown_choices() -> None:
    done = CliRunner().invoke(kernel_report.main, ["--architecture", "sm_90,sm_75"])
    assert done.exit_code == 2
    assert "'sm_75' is not one of sm_80, sm_90, sm_100" in done.output


def test_unreached_kernels_and_watched_tables_name_what_is_unused() -> None:
    calls = kernel_calls.record_calls("sm_90", ["gram_matrix"], ["bf16"])
    assert "copy_kernel" not in kernel_calls.unreached_kernels(calls)
    assert kernel_calls.unreached_kernels(calls)
    with kernel_calls.watched_tables() as unread:
        kernel_calls.record_calls("sm_90", ["gram_matrix"], ["bf16"])
    assert any("ieee" in entry for entry in unread)
    assert not any("64 shared" in entry for entry in unread)
