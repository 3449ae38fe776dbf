"""The one-pass norms: all programs at once in the interpreter, bytes moved, and the dispatch."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnst_kernels import instance_norm, runtime
from fastnst_kernels.norm import dispatch
from fastnst_kernels.norm.upsample_pad import UpsamplePad
from helpers.kernels.byte_counter import count_bytes
from helpers.kernels.kernel_cases import LAYOUTS, in_interpreter, parameters, randn, same_bits
from helpers.kernels.norm_cases import check, op, residual_for, run
from helpers.kernels.resident_programs import programs_at_once

H200 = runtime.Chip(multiprocessors=132, capability=(9, 0), l2_bytes=50 * 2**20)
BF16, FP32 = torch.bfloat16, torch.float32
FORWARD, BACKWARD, GATHER_BACKWARD = (f"one_pass_{name}_kernel" for name in ("forward", "backward", "gather_backward"))


@dataclass(frozen=True)
class Case:
    """A tiny image on a tiny GPU, and its expected plan: members, teams, units, rows of the last chunk."""

    norm: str
    layout: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    members: int
    teams: int
    units: int
    last: int
    part_bytes: int = 256
    shared: bool = False
    multiprocessors: int = 3

    def tensor(self, offset: float = 0.0) -> torch.Tensor:
        return LAYOUTS[self.layout](randn(self.shape, self.dtype) + offset)

    def on_chip(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chip = runtime.Chip(self.multiprocessors, (9, 0))
        monkeypatch.setattr(runtime, "chip", lambda _: chip)
        monkeypatch.setattr(dispatch, "_PART_BYTES", self.part_bytes)
        monkeypatch.setattr(dispatch, "_PARTS", (1, 2))
        monkeypatch.setattr(dispatch, "_PLANE_PARTS", (1, 2))
        monkeypatch.setattr(dispatch, "_STATISTICS_SHARE", 1.0)
        if self.shared:
            monkeypatch.setattr(dispatch, "_MERGE_BYTES", 0)

    def check_plan(self, x: torch.Tensor, dy: torch.Tensor | None) -> None:
        plan = dispatch.plan_one_pass(x, dy, per_sample=self.norm == "instance")
        assert plan is not None
        _, r, _ = runtime.as_prq(x)
        last = r - (plan.chunks - 1) * plan.parts * plan.sub
        assert (plan.members, plan.teams, plan.units, last) == (self.members, self.teams, self.units, self.last)
        assert plan.shared == self.shared


CASES = {
    # Two teams of three programs, three planes to do; three chunks of 16 rows, the last of 3.
    "teams": Case("instance", "channels_last", FP32, (3, 8, 5, 7), 3, 2, 3, 3),
    "bf16": Case("instance", "channels_last", BF16, (3, 24, 3, 6), 3, 2, 3, 2),
    "planes": Case("instance", "contiguous", BF16, (1, 3, 5, 8), 2, 3, 3, 8, part_bytes=32),
    "fp32 planes": Case("instance", "contiguous", FP32, (1, 5, 4, 11), 3, 2, 5, 12, part_bytes=32),
    "batch": Case("batch", "channels_last", FP32, (2, 8, 5, 7), 6, 1, 1, 3),
    "batch planes": Case("batch", "contiguous", BF16, (3, 2, 5, 8), 6, 1, 2, 8, part_bytes=32),
    # All members wait twice, and each merges some of the columns: 8 of 24; all 8 by the first of four members.
    "shared": Case("instance", "channels_last", BF16, (2, 24, 3, 6), 3, 2, 2, 2, shared=True),
    "shared batch": Case("batch", "channels_last", FP32, (2, 8, 3, 5), 4, 1, 1, 7, shared=True, multiprocessors=2),
    # The whole of a plane in one program: no one to wait for, so programs may run one after another.
    "alone": Case("instance", "channels_last", FP32, (3, 4, 2, 4), 1, 3, 3, 8),
}
# A residual's border (None: no residual), and the options of the op.
PLAIN: tuple[int | None, dict[str, Any]] = (None, {})
RELU: tuple[int | None, dict[str, Any]] = (None, {"relu": True})
UPSAMPLED: tuple[int | None, dict[str, Any]] = (None, {"upsample": 2, "padding": (1, 2, 0, 1)})
RESIDUAL: tuple[int | None, dict[str, Any]] = (1, {"padding": 1, "padding_mode": "symmetric", "relu": True})
ZEROS: tuple[int | None, dict[str, Any]] = (0, {"padding": 1, "padding_mode": "zeros"})
PADDED = [
    ("shared", ZEROS), ("batch", ZEROS), ("shared batch", RESIDUAL), ("alone", RESIDUAL),
    *(pytest.param(name, RESIDUAL, marks=pytest.mark.campaign) for name in ("bf16", "batch planes")),
    pytest.param("planes", UPSAMPLED, marks=pytest.mark.campaign),
]  # fmt: skip


@in_interpreter
@pytest.mark.parametrize(("name", "options"), [*((name, RELU) for name in CASES), ("teams", PLAIN), *PADDED])
def test_one_pass_agrees_with_torch(name, options, monkeypatch):
    """Forward and backward by the rule; for some the same bits twice, and nearly those of two passes."""
    case, (border, options) = CASES[name], options
    x = case.tensor(offset=3.0)
    whole = "padding" not in options
    twice = name in ("teams", "batch planes", "shared") and (whole or name == "shared")
    two_passes = run(op(case.norm), x, residual_for(x, border), **options)[0] if twice else []
    case.on_chip(monkeypatch)
    for dy in [None, torch.empty_like(x)] if whole else [None]:
        case.check_plan(x, dy)
    with programs_at_once() as launched:
        results = check(case.norm, x, border, **options)
        assert launched == [FORWARD, BACKWARD if whole else GATHER_BACKWARD]
        if twice:
            assert same_bits(results, run(op(case.norm), x, residual_for(x, border), **options)[0])
    tolerance = 2.0**-19 if x.dtype == torch.float32 else 2.0**-7
    for one, two in zip(results, two_passes, strict=False):
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance * two.abs().max().item())


@in_interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("name", ["teams", "batch planes"])
def test_one_pass_with_a_variance_beyond_fp32_is_the_bias(name, monkeypatch):
    """Some 10³⁰ with a mean of 10³¹, whose rounding has a square beyond fp32, too."""
    case = CASES[name]
    x = (case.tensor(offset=10.0).float() * 1e30).to(case.dtype)
    case.on_chip(monkeypatch)
    with programs_at_once():
        (y, dx, d_weight, _), running = run(op(case.norm), x)
    _, bias = parameters(x.shape[1])
    assert torch.equal(y, bias.view(-1, 1, 1).expand_as(y).to(y.dtype))
    assert not dx.any()
    assert not d_weight.any()
    assert case.norm == "instance" or running[1].isinf().all()


@in_interpreter
@pytest.mark.parametrize("name", ["teams", "batch planes"])
def test_one_pass_with_a_large_mean(name, monkeypatch):
    """E[x²] − E[x]² would lose every digit here; in bfloat16 the deviation is a few steps of the format."""
    case = CASES[name]
    case.on_chip(monkeypatch)
    with programs_at_once():
        check(case.norm, case.tensor(offset=1e4 if case.dtype == FP32 else 64.0))


@in_interpreter
def test_one_pass_of_a_constant_is_its_bias(monkeypatch):
    case = CASES["teams"]
    case.on_chip(monkeypatch)
    weight, bias = parameters(8)
    with programs_at_once() as launched:
        y = instance_norm(torch.full_like(case.tensor(), 1234.5), weight, bias)
    assert launched == [FORWARD]
    assert torch.equal(y, bias.view(1, 8, 1, 1).expand_as(y))


@in_interpreter
@pytest.mark.parametrize("residual", [None, 0, 1])
def test_one_pass_with_one_program_per_group(residual, monkeypatch):
    """Groups of one member run in the plain interpreter, one after another, to the same bits."""
    case = CASES["alone"]
    case.on_chip(monkeypatch)
    x = case.tensor()
    results = check(case.norm, x, residual, relu=True)
    with programs_at_once() as launched:
        at_once, _ = run(op(case.norm), x, residual_for(x, residual), relu=True)
    assert launched == [FORWARD, BACKWARD if residual is None else GATHER_BACKWARD]
    assert same_bits(results, at_once)


@in_interpreter
def test_programs_at_once_reports_a_deadlock(monkeypatch):
    """A counter that starts too low never reaches the number of members."""
    case = CASES["shared batch"]
    case.on_chip(monkeypatch)
    full = torch.full
    monkeypatch.setattr(torch, "zeros", lambda size, **options: full((size,), -1, **options))
    with programs_at_once(timeout=1.5), pytest.raises(AssertionError, match="4 of 4 programs still waited"):
        op(case.norm)(case.tensor(), *parameters(8))


def _moved(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """The traffic of one forward, and the bytes of partial results that programs read from each other."""
    scratch: list[torch.Tensor] = []
    allocate = runtime.allocate

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        scratch.append(allocate(*args, **kwargs))
        return scratch[-1]

    monkeypatch.setattr(runtime, "allocate", noted)
    with count_bytes() as traffic, programs_at_once(traffic):
        instance_norm(x, *parameters(x.shape[1]))
    partial = [t for t in scratch if t.dim() == 4 and t.shape[1] == 2 and t.dtype == torch.float32]
    return traffic, sum(traffic.loaded_within(t) for t in partial)


@in_interpreter
@pytest.mark.parametrize("members", [1, 3])
def test_one_pass_forward_moves_each_byte_once(members, monkeypatch):
    """Chunks of the real size: at most 5% above one read and one write, statistics included.

    Left out of the 5% are partial results that programs read back: just written, they come from L2. They are few, too.
    """
    monkeypatch.setattr(runtime, "chip", lambda _: runtime.Chip(2, (9, 0)))
    if members == 1:
        monkeypatch.setattr(dispatch, "_PARTS", (8,))
    x = LAYOUTS["channels_last"](randn((1, 16, 32 if members == 1 else 40, 32), torch.bfloat16))
    plan = dispatch.plan_one_pass(x, per_sample=True)
    assert plan is not None
    assert (plan.members, plan.sub) == (members, 128)
    traffic, read_back = _moved(x, monkeypatch)
    minimum = 2 * x.numel() * x.element_size()
    assert traffic.launches == 1
    assert minimum < traffic.total - read_back <= 1.05 * minimum
    assert 0 < read_back <= 0.02 * members * minimum


@in_interpreter
def test_one_pass_backward_rereads_x_from_l2(monkeypatch):
    """dy and dx move once; x is read twice, the second time by the program that has just read it."""
    x = LAYOUTS["channels_last"](randn((1, 16, 64, 32), torch.bfloat16)).requires_grad_()
    y = instance_norm(x, *parameters(16), relu=True)
    monkeypatch.setattr(runtime, "chip", lambda _: runtime.Chip(1, (9, 0)))
    dy = LAYOUTS["channels_last"](randn(x.shape, x.dtype, seed=1))
    size = x.numel() * x.element_size()
    with count_bytes() as traffic, programs_at_once(traffic) as launched:
        y.backward(dy)
    assert launched == [BACKWARD]
    assert 3 * size < traffic.unique_loaded + traffic.unique_stored <= 1.05 * 3 * size
    assert 4 * size < traffic.total <= 1.05 * 4 * size


@in_interpreter
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_two_passes_read_twice(layout, monkeypatch):
    """3E forward, 5E backward, for E bytes of x: two of them the second look at what was read."""
    monkeypatch.setattr(runtime, "TARGET_PROGRAMS", 4)
    x = LAYOUTS[layout](randn((1, 32, 16, 32), torch.bfloat16)).requires_grad_()
    size = x.numel() * x.element_size()
    with count_bytes() as forward:
        y = instance_norm(x, *parameters(32), relu=True)
    assert forward.launches == 2
    assert 3 * size <= forward.total <= 1.1 * 3 * size
    assert 2 * size <= forward.unique_loaded + forward.unique_stored <= 1.1 * 2 * size
    dy = LAYOUTS[layout](randn(x.shape, x.dtype, seed=1))
    with count_bytes() as backward:
        y.backward(dy)
    assert backward.launches == 3  # the last one adds up the parameters' gradients
    assert 5 * size <= backward.total <= 1.1 * 5 * size


def _meta(shape: tuple[int, ...], dtype: torch.dtype = BF16, layout: str = "channels_last") -> torch.Tensor:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=form)


def _check_consistent(plan: dispatch.OnePass, x: torch.Tensor, per_sample: bool, chip: runtime.Chip) -> None:
    """The plan's chunks are all of x, once each, and all its programs are resident."""
    p, r, q = runtime.as_prq(x)
    samples = 1 if per_sample else x.shape[0]
    rows = plan.parts * plan.sub
    assert (plan.chunks - 1) * rows < r <= plan.chunks * rows
    assert plan.members == samples * plan.chunks
    assert plan.units * samples == p
    assert plan.plane_step == (0 if per_sample else plan.units)
    assert 1 <= plan.teams <= plan.units
    assert plan.teams * plan.members <= 2 * chip.multiprocessors
    assert plan.block_q >= q
    assert plan.sub * plan.block_q * x.element_size() <= 4096
    assert not plan.shared or plan.merge_q * plan.members >= q
    assert plan.plane_words * 4 == r * q * x.element_size()
    assert plan.constants()["BLOCK_S"] >= 1
    for power in (plan.sub, plan.block_q, plan.merge_q, plan.constants()["BLOCK_S"]):
        assert power & (power - 1) == 0


@pytest.mark.parametrize("n", [4, 16, 32])
@pytest.mark.parametrize("size", [(32, 256, 256), (64, 128, 128), (128, 64, 64)])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_plan_one_pass_for_the_networks_shapes(n, size, layout, monkeypatch):
    monkeypatch.setattr(runtime, "chip", lambda _: H200)
    x = _meta((n, *size), layout=layout)
    for dy, held in [(None, True), (x, True), (_meta((n, size[0], size[1] + 2, size[2] + 2)), False)]:
        plan = dispatch.plan_one_pass(x, dy, per_sample=True, held=held)
        assert plan is not None
        _check_consistent(plan, x, True, H200)


def test_plan_one_pass_is_none_where_it_cannot_run(monkeypatch):
    def plan(x: torch.Tensor, dy: torch.Tensor | None = None, **options: Any) -> dispatch.OnePass | None:
        return dispatch.plan_one_pass(x, dy, **{"per_sample": True, **options})

    x = _meta((4, 32, 64, 64))
    assert plan(x) is None  # the CPU
    monkeypatch.setattr(runtime, "chip", lambda _: H200)
    assert plan(x) is not None
    with mock.patch.dict("os.environ", FASTNST_COOPERATIVE="0"):
        assert plan(x) is None
    assert plan(_meta((4, 3, 64, 64))) is None  # rows of 6 bytes
    assert plan(_meta((4, 3, 64, 64), layout="contiguous")) is not None
    assert plan(_meta((4, 3, 9, 7), layout="contiguous")) is None
    assert plan(_meta((1, 1024, 8, 8))) is None  # a row that no part holds
    assert plan(_meta((1, 32, 512, 512))) is None  # 16 MiB on a chip that holds 10
    assert plan(_meta((32, 64, 128, 128)), per_sample=False) is None
    assert plan(_meta((1, 32, 512, 512)), _meta((1, 32, 514, 514)), held=False) is None  # more than half of L2, twice
    memory = torch.empty(2 * 32 * 8 * 8 + 1, dtype=BF16)
    aligned, odd = (memory[i:][: 2 * 32 * 64].view(2, 8, 8, 32).permute(0, 3, 1, 2) for i in range(2))
    assert plan(aligned) is not None
    assert plan(odd) is None
    assert plan(aligned, odd) is None


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(
        st.integers(1, 70), st.sampled_from([1, 2, 3, 8, 16, 24, 31, 32, 64, 128, 200, 256, 512]),
        st.sampled_from([1, 2, 7, 8, 16, 31, 64, 96, 128, 256, 300]), st.sampled_from([1, 4, 8, 13, 64, 128, 256]),
    ),
    dtype=st.sampled_from([FP32, torch.float16, BF16]), layout=st.sampled_from(["channels_last", "contiguous"]),
    per_sample=st.booleans(), backward=st.booleans(), held=st.booleans(),
    multiprocessors=st.sampled_from([1, 3, 108, 132, 148]),
)  # fmt: skip
def test_plan_one_pass_is_consistent(shape, dtype, layout, per_sample, backward, held, multiprocessors):
    chip = runtime.Chip(multiprocessors, (9, 0))
    x = _meta(shape, dtype, layout)
    dy = x if backward else None
    with mock.patch.object(runtime, "chip", return_value=chip):
        plan = dispatch.plan_one_pass(x, dy, per_sample=per_sample, held=held or not backward)
    if plan is not None:
        _check_consistent(plan, x, per_sample, chip)


def test_plan_one_pass_on_any_large_gpu():
    """The property above does not say that there are plans at all."""
    for multiprocessors in (108, 132, 148):
        chip = runtime.Chip(multiprocessors, (9, 0))
        with mock.patch.object(runtime, "chip", return_value=chip):
            assert dispatch.plan_one_pass(_meta((1, 128, 64, 64)), per_sample=False) is not None


@pytest.mark.parametrize(("capability", "holds"), [((8, 0), True), ((9, 0), True), ((10, 0), False), ((12, 0), False)])
def test_held_by_backward_depends_on_the_architecture(capability, holds, monkeypatch):
    """From 10.0 on never: there that kernel would spill. Nor with padding or a third tensor."""
    monkeypatch.setattr(runtime, "chip", lambda _: runtime.Chip(148, capability))
    x = LAYOUTS["channels_last"](randn((2, 32, 8, 8), BF16))
    assert dispatch._held_by_backward(x, x, UpsamplePad(), None) == holds
    assert not dispatch._held_by_backward(x, x, UpsamplePad(padding=(1, 1, 1, 1)), None)
    assert not dispatch._held_by_backward(x, x, UpsamplePad(), x)
    assert not dispatch._held_by_backward(x, x.float(), UpsamplePad(), None)
