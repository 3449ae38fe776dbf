"""The norms on a GPU: in one pass if a group fits on chip, else in two.

The kernels are in `one_pass.py` and `two_pass.py`, the formulas in `instance_norm.py` and `batch_norm.py`.
`plan_one_pass` chooses.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.norm.one_pass import (
    one_pass_backward_kernel,
    one_pass_forward_kernel,
    one_pass_gather_backward_kernel,
)
from fastnst_kernels.norm.two_pass import (
    apply_kernel,
    gradient_kernel,
    merge_moments_kernel,
    merge_sums_kernel,
    parameter_gradients_kernel,
    partial_moments_kernel,
)
from fastnst_kernels.norm.upsample_pad import UpsamplePad, center_crop, margin, upsample_pad, upsample_pad_adjoint
from fastnst_kernels.runtime import ceil_div, power_of_two

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""dx, d_weight, d_bias, d_residual"""


@dataclass(frozen=True)
class Arguments:
    """A norm's arguments beside x: weight and bias `[C]`, the residual, ReLU, upsampling and padding.

    The residual is dense in x's format and larger than x by the same margin at each side.
    """

    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    relu: bool
    pad: UpsamplePad


# One pass: two programs of 128 threads are resident per multiprocessor, each with 255 registers a thread. Up to 64 of
# these hold its chunk, in parts of 4 KiB; the backward that holds nothing reads tiles of that size.
_RESIDENT = 2
_PART_BYTES = 4096
_PARTS = (1, 2, 4, 6, 8)
_PLANE_PARTS = (1, 2, 4)  # contiguous format
_ONE_PASS_OPTIONS = {"num_warps": 4, "maxnreg": 255, "launch_cooperative_grid": True}
# The most that partial results, written once and read once by all, may add to the bytes of the forward.
_STATISTICS_SHARE = 0.05
# The share of L2 that the groups in flight may take if they are read twice.
_L2_SHARE = 0.5
# Beyond this many bytes, a program reads its share of the partial results instead of all of them.
_MERGE_BYTES = 32768
# Two passes.
_TILE_ELEMENTS = 4096
_GRADIENT_TILE_ELEMENTS = 2048
_MERGE_ELEMENTS = 512
_MERGE_ROWS = 64


@dataclass(frozen=True)
class OnePass:
    """A one-pass launch: `members` programs share a group, `teams` groups are in flight at once."""

    parts: int
    sub: int
    block_q: int
    chunks: int
    members: int
    units: int
    plane_words: int
    plane_step: int
    teams: int
    shared: bool
    merge_q: int

    def constants(self) -> dict[str, int]:
        columns = self.merge_q if self.shared else self.block_q
        return {
            "SHARED": self.shared,
            "PARTS": self.parts,
            "SUB": self.sub,
            "BLOCK_Q": self.block_q,
            "BLOCK_S": min(power_of_two(self.members), max(1, _MERGE_ELEMENTS // columns)),
            "MERGE_Q": self.merge_q,
        }


def plan_one_pass(x: Tensor, dy: Tensor | None = None, *, per_sample: bool, held: bool = True) -> OnePass | None:
    """The plan for one pass over dense `x` (and `dy`), or None if two passes are needed.

    One pass needs a GPU that may launch cooperatively (`FASTNST_COOPERATIVE=0` forbids it), rows and memory aligned for
    16-byte accesses, and groups no larger than what all multiprocessors hold (`held`) or than L2's share. Chunks are as
    small as their partial results allow if all groups are in flight at once, else as large as possible.
    """
    chip = runtime.chip(x)
    if chip is None or os.environ.get("FASTNST_COOPERATIVE", "1") == "0":
        return None
    p, r, q = runtime.as_prq(x)
    vector = 16 // x.element_size()
    aligned = all(t.data_ptr() % 16 == 0 for t in (x, dy) if t is not None)
    if (r if q == 1 else q) % vector or not aligned or q > _PART_BYTES // 8:
        return None
    block_q = power_of_two(q)
    sub = min(_PART_BYTES // x.element_size() // block_q, max(vector, power_of_two(r)))
    samples = 1 if per_sample else x.shape[0]
    units = p // samples
    resident = _RESIDENT * chip.multiprocessors
    teams = units
    if dy is not None:
        read_twice = (2 * x.numel() + (0 if held else dy.numel())) * x.element_size()  # with dx, which L2 caches, too
        teams = min(units, int(chip.l2_bytes * _L2_SHARE * units // read_twice))
        if teams == 0:
            return None
    sizes = _PLANE_PARTS if q == 1 else _PARTS
    fewest = min(sizes[-1], math.ceil(16 * q / (2 * _PART_BYTES * _STATISTICS_SHARE)))
    if held:
        fitting = (n for n in sizes if n >= fewest and teams * samples * ceil_div(r, n * sub) <= resident)
        parts = next(fitting, sizes[-1])
    else:
        parts = max(fewest, ceil_div(r, sub * max(1, resident // (teams * samples))))
    chunks = ceil_div(r, parts * sub)
    members = samples * chunks
    if members > resident:
        return None
    shared = members * block_q * 8 > _MERGE_BYTES
    merge_q = min(block_q, max(8, power_of_two(ceil_div(q, members))))
    return OnePass(
        parts=parts, sub=sub, block_q=block_q, chunks=chunks, members=members, units=units,
        plane_words=r * q * x.element_size() // 4, plane_step=0 if per_sample else units,
        teams=min(teams, resident // members), shared=shared, merge_q=merge_q,
    )  # fmt: skip


@runtime.launches_on_its_device
def forward(
    x: Tensor, norm: Arguments, *, per_sample: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(y, mean, rstd, var)` of dense x; the statistics are fp32 `[N, C]` (`per_sample`, no var) or `[C]`."""
    _check_size(x, norm.pad)
    shape = x.shape[:2] if per_sample else x.shape[1:2]
    mean, rstd = (runtime.allocate(shape, x, torch.float32) for _ in range(2))
    var = None if per_sample else runtime.allocate(shape, x, torch.float32)
    plan = plan_one_pass(x, per_sample=per_sample)
    if plan is None:
        partial = _moments(x, mean, rstd, var, eps)
        return apply(x, norm, mean, rstd, partial, eps), mean, rstd, var
    in_kernel, residual, border = _supported(x, norm)
    y = runtime.allocate_like(x, in_kernel.shape(x))
    _, _, q = runtime.as_prq(x)
    partial = runtime.allocate((plan.units, 2, plan.members, q), x, torch.float32)
    arrived = torch.zeros(2 * plan.units, dtype=torch.int32, device=x.device)
    one_pass_forward_kernel[(plan.teams * plan.members,)](
        x, norm.weight.contiguous(), norm.bias.contiguous(), residual, y, mean, rstd, var, partial, arrived,
        x.shape[2], x.shape[3], x.shape[1], plan.plane_words, plan.chunks, plan.members, plan.plane_step,
        plan.units, plan.teams, float(x.numel() // mean.numel()), eps, 0,
        Q=q, RESIDUAL=residual is not None, BORDER=border, RELU=norm.relu,
        **in_kernel.constants(), **plan.constants(), **_ONE_PASS_OPTIONS,
    )  # fmt: skip
    return (y if in_kernel is norm.pad else upsample_pad(y, norm.pad)), mean, rstd, var


@runtime.launches_on_its_device
def apply(
    x: Tensor, norm: Arguments, mean: Tensor, rstd: Tensor, partial: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """`upsample_pad(relu?((x − mean)·rstd·weight + bias + residual))` in x's dtype and format.

    The last launch of the two-pass forward; with its `partial` moments it also computes and stores mean and rstd.
    """
    _check_size(x, norm.pad)
    in_kernel, residual, border = _supported(x, norm)
    p, r, q = runtime.as_prq(x)
    block_r, block_q, n_q, chunk, splits = _split(p, r, q, _TILE_ELEMENTS)
    y = runtime.allocate_like(x, in_kernel.shape(x))
    apply_kernel[(splits * p * n_q,)](
        x, norm.weight.contiguous(), norm.bias.contiguous(), mean, rstd, partial, residual, y, p, r, q, x.shape[1],
        mean.numel(), x.shape[2], x.shape[3], chunk, n_q, splits * p * q, splits, float(r), eps,
        MERGE=partial is not None, RESIDUAL=residual is not None, BORDER=border, RELU=norm.relu,
        **in_kernel.constants(),
        BLOCK_R=block_r, BLOCK_Q=block_q, BLOCK_S=min(_MERGE_ROWS, power_of_two(splits)), num_warps=4,
    )  # fmt: skip
    return y if in_kernel is norm.pad else upsample_pad(y, norm.pad)


@runtime.launches_on_its_device
def backward(
    dy: Tensor, x: Tensor, norm: Arguments, mean: Tensor, rstd: Tensor, *, fixed: bool, residual_padding: int
) -> Gradients:
    """`(dx, d_weight, d_bias, d_residual)`, the last in x's dtype, empty if `residual_padding` is -1.

    `dy` is dense in x's format; `fixed` says that mean and rstd do not depend on x.
    """
    weight, bias = norm.weight.contiguous(), norm.bias.contiguous()
    _check_size(x, norm.pad)
    in_kernel, residual, border = _supported(x, norm)
    if in_kernel is not norm.pad:
        dy = upsample_pad_adjoint(dy, norm.pad)
    # Recomputing the mask and writing the residual's gradient use the same margin, or one of them has none.
    border = max(border, residual_padding if 2 * residual_padding <= min(x.shape[2:]) else 0)
    d_residual = None
    if residual_padding >= 0:
        d_residual = runtime.allocate_like(x, UpsamplePad.zeros(border).shape(x))
    sums = runtime.allocate((2, *mean.shape), x, torch.float32)
    dx = runtime.allocate_like(x)
    affine = (weight, bias, mean, rstd)
    flags: dict[str, Any] = {
        "RESIDUAL": residual is not None, "BORDER": border, "RELU": norm.relu, **in_kernel.constants()
    }  # fmt: skip
    held = _held_by_backward(x, dy, in_kernel, residual if d_residual is None else d_residual)
    plan = None if fixed else plan_one_pass(x, dy, per_sample=mean.dim() == 2, held=held)
    if plan is None:
        _gradient(x, dy, affine, residual, (sums, dx, d_residual), fixed, flags)
    else:
        _, _, q = runtime.as_prq(x)
        partial = runtime.allocate((plan.units, 2, plan.members, q), x, torch.float32)
        arrived = torch.zeros(2 * plan.units, dtype=torch.int32, device=x.device)
        inverse_count = mean.numel() / x.numel()
        if held:
            one_pass_backward_kernel[(plan.teams * plan.members,)](
                x, dy, *affine, dx, sums, partial, arrived,
                x.shape[2], x.shape[3], x.shape[1], plan.plane_words, plan.chunks, plan.members, plan.plane_step,
                plan.units, plan.teams, inverse_count, 0, Q=q, RELU=norm.relu, **plan.constants(), **_ONE_PASS_OPTIONS,
            )  # fmt: skip
        else:
            constants = plan.constants()
            block_r = constants.pop("SUB")
            chunk = constants.pop("PARTS") * block_r
            one_pass_gather_backward_kernel[(plan.teams * plan.members,)](
                x, dy, *affine, residual, dx, d_residual, sums, partial, arrived,
                x.shape[2], x.shape[3], x.shape[1], chunk, plan.chunks, plan.members, plan.plane_step,
                plan.units, plan.teams, inverse_count, Q=q, BLOCK_R=block_r, **flags, **constants, **_ONE_PASS_OPTIONS,
            )  # fmt: skip
    n, c = sums.numel() // (2 * x.shape[1]), x.shape[1]
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(bias)
    block_g = min(64, power_of_two(c))
    parameter_gradients_kernel[(ceil_div(c, block_g),)](
        sums, d_weight, d_bias, n, c, BLOCK_S=min(_MERGE_ROWS, power_of_two(n)), BLOCK_G=block_g, num_warps=4
    )
    if d_residual is None:
        return dx, d_weight, d_bias, x.new_empty(0)
    return dx, d_weight, d_bias, upsample_pad(d_residual, UpsamplePad.zeros(residual_padding - border))


def _held_by_backward(x: Tensor, dy: Tensor, pad: UpsamplePad, third: Tensor | None) -> bool:
    """Whether registers hold g across the barrier: if it is dy itself, masked, without a third tensor.

    Not from compute capability 10.0 on, where that kernel would need more registers than there are.
    """
    chip = runtime.chip(x)
    small = chip is not None and chip.capability < (10, 0)
    return small and pad.is_identity and third is None and dy.dtype == x.dtype


def _moments(x: Tensor, mean: Tensor, rstd: Tensor, var: Tensor | None, eps: float) -> Tensor | None:
    """First launch of the forward; its partial results, or None if a second one has merged them already."""
    p, r, q = runtime.as_prq(x)
    block_r, block_q, n_q, chunk, splits = _split(p, r, q, _TILE_ELEMENTS)
    partial = runtime.allocate((2, splits, p, q), x, torch.float32)
    total = splits * p * q
    partial_moments_kernel[(splits * p * n_q,)](
        x, partial, p, r, q, chunk, n_q, total, BLOCK_R=block_r, BLOCK_Q=block_q, num_warps=4
    )
    if var is None:
        return partial
    groups = mean.numel()
    rows = total // groups
    block_g = min(16, power_of_two(groups))
    merge_moments_kernel[(ceil_div(groups, block_g),)](
        partial, mean, rstd, var, rows, groups, r, chunk, rows // splits, total, float(x.numel() // groups), eps,
        BLOCK_S=_MERGE_ROWS, BLOCK_G=block_g, num_warps=4,
    )  # fmt: skip
    return None


def _gradient(
    x: Tensor, dy: Tensor, affine: tuple[Tensor, ...], residual: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor | None], fixed: bool, flags: dict[str, Any],
) -> None:  # fmt: skip
    """The two-pass backward: two launches for instance norm, three for batch norm, two with `fixed`."""
    mean, (sums, dx, d_residual) = affine[2], outputs
    p, r, q = runtime.as_prq(x)
    block_r, block_q, n_q, chunk, splits = _split(p, r, q, _GRADIENT_TILE_ELEMENTS)
    total, groups = splits * p * q, mean.numel()
    partial = runtime.allocate((2, splits, p, q), x, torch.float32)
    per_sample = mean.dim() == 2

    def launch(step: str, d_residual: Tensor | None) -> None:
        sums_only, from_partial = step == "sums", step != "map"
        gradient_kernel[(splits * p * n_q,)](
            x, dy, *affine, residual, partial if from_partial else None,
            sums if step in ("merge", "map") else None, None if sums_only else dx, d_residual,
            p, r, q, x.shape[1], groups, x.shape[2], x.shape[3], chunk, n_q, total, splits, groups / x.numel(),
            STEP=step, BLOCK_R=block_r, BLOCK_Q=block_q, BLOCK_S=min(_MERGE_ROWS, power_of_two(splits)), num_warps=4,
            **flags,
        )  # fmt: skip

    launch("fixed" if fixed else "sums", d_residual)
    if not per_sample:
        block_g = min(16, power_of_two(groups))
        merge_sums_kernel[(2 * ceil_div(groups, block_g),)](
            partial, sums, total // groups, groups, BLOCK_S=_MERGE_ROWS, BLOCK_G=block_g, num_warps=4
        )
    if not fixed:
        launch("merge" if per_sample else "map", None)


def _supported(x: Tensor, norm: Arguments) -> tuple[UpsamplePad, Tensor | None, int]:
    """The part of `norm.pad` that the kernels do, all or nothing; the residual with the margin that they crop."""
    height, width = x.shape[2:]
    in_kernel = norm.pad if norm.pad.supports_kernels(height, width) else UpsamplePad()
    if norm.residual is None:
        return in_kernel, None, 0
    border = margin(norm.residual, x)
    if 2 * border <= min(height, width):
        return in_kernel, norm.residual, border
    return in_kernel, runtime.dense(center_crop(norm.residual, x.shape[2:]), like=x), 0


def _check_size(x: Tensor, pad: UpsamplePad) -> None:
    """The kernels count within a sample in 32 bits."""
    height, width = pad.size(x.shape[2], x.shape[3])
    largest = max(height * width, x.shape[2] * x.shape[3]) * x.shape[1]
    if largest >= 2**31:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: {largest} elements per sample, but the kernels take less than {2**31}; "
            "use FASTNST_KERNELS=reference or a smaller image"
        )


def _tile(r: int, q: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile: 64 columns make rows of at least 128 bytes, which are whole sectors."""
    block_q = min(64, power_of_two(q))
    return min(elements // block_q, power_of_two(r)), block_q


def _split(p: int, r: int, q: int, elements: int) -> tuple[int, int, int, int, int]:
    """BLOCK_R, BLOCK_Q, blocks of Q, rows per chunk and number of chunks, for launches over all of x."""
    block_r, block_q = _tile(r, q, elements)
    n_q = ceil_div(q, block_q)
    splits = max(1, runtime.TARGET_PROGRAMS // (p * n_q))
    chunk = ceil_div(ceil_div(r, splits), block_r) * block_r
    return block_r, block_q, n_q, chunk, ceil_div(r, chunk)
