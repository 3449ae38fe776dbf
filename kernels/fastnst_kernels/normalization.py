# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""What instance and batch norm share on the GPU: moments, the affine-residual-ReLU map, and the backward's sums.

Legend: x is a dense `[P, R, Q]` (see `runtime`); C channels; a group is the set of positions that share μ and σ², M of
them, G groups: instance norm has G = N·C, batch norm G = C. In both memory formats (p, q) belongs to the channel
`(p·Q + q) mod C` and to the group `(p·Q + q) mod G`. The formulas stand in `instance_norm.py` and `batch_norm.py`.

Each reduction has two launches: partial results per chunk of rows, then a merge in fixed order. No atomics, and the
chunks depend on the shape alone, so the same input gives the same bits on every run. Forward reads x twice and writes
y; backward reads x and dy twice and writes dx.

Variance (Chan, Golub, LeVeque 1983): every tile's sum of squares is taken about its own mean, and triples (n, μ, S) are
merged by S = S₁ + S₂ + (μ₂ − μ₁)²·n₁n₂/(n₁ + n₂). Values enter relative to the first of their chunk, so that a large
common mean costs no digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.runtime import ceil_div, jit, power_of_two, tl

_TILE_ELEMENTS = 2048
_MERGE_ROWS = 64


@jit
def _partial_moments_kernel(
    x, partial, P, R, Q, chunk, n_q, total,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """partial[0, s, p, q] = mean, partial[1, s, p, q] = sum of squares about it, over the rows of chunk s.

    Grid: splits × P × blocks of Q. Moves P·R·Q elements in; `total` = splits·P·Q. Limit: R < 2³¹.
    """
    pid = tl.program_id(0)
    i_p = (pid // n_q % P).to(tl.int64)
    i_s = pid // n_q // P
    o_q = pid % n_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_r = tl.arange(0, BLOCK_R)
    m_q = o_q < Q
    first = i_s * chunk
    last = tl.minimum(first + chunk, R)
    b_pivot = tl.load(x + (i_p * R + first) * Q + o_q, mask=m_q, other=0.0).to(tl.float32)
    b_mean = tl.zeros([BLOCK_Q], tl.float32)
    b_squares = tl.zeros([BLOCK_Q], tl.float32)
    count = 0.0
    for r in range(first, last, BLOCK_R):
        m_x = (r + o_r < last)[:, None] & m_q[None, :]
        p_x = x + (i_p * R + r) * Q + o_r[:, None] * Q + o_q[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32) - b_pivot[None, :]
        n = tl.minimum(last - r, BLOCK_R).to(tl.float32)
        b_tile_mean = tl.sum(tl.where(m_x, b_x, 0.0), 0) / n
        b_centred = tl.where(m_x, b_x - b_tile_mean[None, :], 0.0)
        b_delta = b_tile_mean - b_mean
        b_mean += b_delta * (n / (count + n))
        b_squares += tl.sum(b_centred * b_centred, 0) + b_delta * b_delta * (count * n / (count + n))
        count += n
    p_out = partial + (i_s.to(tl.int64) * P + i_p) * Q + o_q
    tl.store(p_out, b_mean + b_pivot, mask=m_q)
    tl.store(p_out + total, b_squares, mask=m_q)


@jit
def _merge_moments_kernel(
    partial, mean, rstd, running_mean, running_var, rows, G, R, chunk, repeat, total, count, unbias, eps, momentum,
    UPDATE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """μ and 1/√(σ² + ε) of a block of groups from `rows` partial results each; with UPDATE the running statistics too.

    Grid: blocks of G. Row s belongs to chunk s // repeat: for batch norm in contiguous format every sample has its own
    chunks. Moves 2·rows·G·4 bytes in (twice, the second time from L2).
    """
    o_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    o_s = tl.arange(0, BLOCK_S)
    m_g = o_g < G
    b_pivot = tl.load(partial + o_g, mask=m_g, other=0.0)
    b_shift = tl.zeros([BLOCK_G], tl.float32)
    for s in range(0, rows, BLOCK_S):
        m_p = (s + o_s < rows)[:, None] & m_g[None, :]
        b_n = tl.minimum(R - (s + o_s) // repeat * chunk, chunk).to(tl.float32)[:, None]
        p_mean = partial + (s + o_s).to(tl.int64)[:, None] * G + o_g[None, :]
        b_mean = tl.load(p_mean, mask=m_p, other=0.0)
        b_shift += tl.sum(tl.where(m_p, b_n * (b_mean - b_pivot[None, :]), 0.0), 0)
    b_shift /= count
    b_squares = tl.zeros([BLOCK_G], tl.float32)
    for s in range(0, rows, BLOCK_S):
        m_p = (s + o_s < rows)[:, None] & m_g[None, :]
        b_n = tl.minimum(R - (s + o_s) // repeat * chunk, chunk).to(tl.float32)[:, None]
        p_mean = partial + (s + o_s).to(tl.int64)[:, None] * G + o_g[None, :]
        b_delta = tl.load(p_mean, mask=m_p, other=0.0) - b_pivot[None, :] - b_shift[None, :]
        b_part = tl.load(p_mean + total, mask=m_p, other=0.0)
        b_squares += tl.sum(tl.where(m_p, b_part + b_n * b_delta * b_delta, 0.0), 0)
    b_mean = b_pivot + b_shift
    b_var = b_squares / count
    tl.store(mean + o_g, b_mean, mask=m_g)
    tl.store(rstd + o_g, tl.div_rn(1.0, tl.sqrt_rn(b_var + eps)), mask=m_g)
    if UPDATE:
        b_old = tl.load(running_mean + o_g, mask=m_g, other=0.0).to(tl.float32)
        tl.store(running_mean + o_g, b_old + momentum * (b_mean - b_old), mask=m_g)
        b_old = tl.load(running_var + o_g, mask=m_g, other=0.0).to(tl.float32)
        tl.store(running_var + o_g, b_old + momentum * (b_var * unbias - b_old), mask=m_g)


@jit
def _apply_kernel(
    x, weight, bias, mean, rstd, residual, y, R, Q, C, G, n_r, n_q,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """y = relu?((x − μ)·rstd·w + b + residual). Grid: P × blocks of R × blocks of Q.

    Moves P·R·Q elements in (twice that with a residual) and out. A NaN stays a NaN through the ReLU, as in PyTorch.
    """
    pid = tl.program_id(0)
    i_p = (pid // n_q // n_r).to(tl.int64)
    i_r = pid // n_q % n_r * BLOCK_R
    o_q = pid % n_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_r = tl.arange(0, BLOCK_R)
    m_q = o_q < Q
    o_pq = i_p * Q + o_q
    b_mean = tl.load(mean + o_pq % G, mask=m_q, other=0.0)
    b_rstd = tl.load(rstd + o_pq % G, mask=m_q, other=0.0)
    b_weight = tl.load(weight + o_pq % C, mask=m_q, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_pq % C, mask=m_q, other=0.0).to(tl.float32)
    m_x = (i_r + o_r < R)[:, None] & m_q[None, :]
    first = (i_p * R + i_r) * Q
    o_x = o_r[:, None] * Q + o_q[None, :]
    b_x = tl.load(x + first + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_y = (b_x - b_mean[None, :]) * b_rstd[None, :] * b_weight[None, :] + b_bias[None, :]
    if RESIDUAL:
        b_y += tl.load(residual + first + o_x, mask=m_x, other=0.0).to(tl.float32)
    if RELU:
        b_y = tl.where(b_y < 0.0, 0.0, b_y)
    tl.store(y + first + o_x, b_y, mask=m_x)


@jit
def _load_normalized(x, dy, mean, rstd, weight, bias, first, o_x, m_x, o_pq, m_q, C, G, RELU: tl.constexpr):
    """One tile of x̂ and of g (dy, masked by the recomputed z with RELU), with rstd and w per column."""
    b_mean = tl.load(mean + o_pq % G, mask=m_q, other=0.0)
    b_rstd = tl.load(rstd + o_pq % G, mask=m_q, other=0.0)
    b_weight = tl.load(weight + o_pq % C, mask=m_q, other=0.0).to(tl.float32)
    b_x = tl.load(x + first + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_g = tl.load(dy + first + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_normalized = (b_x - b_mean[None, :]) * b_rstd[None, :]
    if RELU:
        b_bias = tl.load(bias + o_pq % C, mask=m_q, other=0.0).to(tl.float32)
        b_g = tl.where(b_normalized * b_weight[None, :] + b_bias[None, :] <= 0.0, 0.0, b_g)
    return b_normalized, b_g, b_rstd, b_weight


@jit
def _partial_sums_kernel(
    x, dy, weight, bias, mean, rstd, partial, P, R, Q, C, G, chunk, n_q, total,
    RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """partial[0, s, p, q] = Σg, partial[1, s, p, q] = Σ g·x̂ over the rows of chunk s.

    Grid: splits × P × blocks of Q. Moves 2·P·R·Q elements in; `total` = splits·P·Q. Limit: R < 2³¹.
    """
    pid = tl.program_id(0)
    i_p = (pid // n_q % P).to(tl.int64)
    i_s = pid // n_q // P
    o_q = pid % n_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_r = tl.arange(0, BLOCK_R)
    m_q = o_q < Q
    first = i_s * chunk
    last = tl.minimum(first + chunk, R)
    b_sum_g = tl.zeros([BLOCK_Q], tl.float32)
    b_sum_gx = tl.zeros([BLOCK_Q], tl.float32)
    for r in range(first, last, BLOCK_R):
        m_x = (r + o_r < last)[:, None] & m_q[None, :]
        o_x = o_r[:, None] * Q + o_q[None, :]
        b_normalized, b_g, _, _ = _load_normalized(
            x, dy, mean, rstd, weight, bias, (i_p * R + r) * Q, o_x, m_x, i_p * Q + o_q, m_q, C, G, RELU
        )
        b_sum_g += tl.sum(tl.where(m_x, b_g, 0.0), 0)
        b_sum_gx += tl.sum(tl.where(m_x, b_g * b_normalized, 0.0), 0)
    p_out = partial + (i_s.to(tl.int64) * P + i_p) * Q + o_q
    tl.store(p_out, b_sum_g, mask=m_q)
    tl.store(p_out + total, b_sum_gx, mask=m_q)


@jit
def _merge_sums_kernel(partial, sums, rows, G, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr):
    """sums[v, g] = Σ_s partial[v, s, g] for v = 0, 1, in fixed order. Grid: 2 × blocks of G. Moves 2·rows·G·4 bytes."""
    n_g = tl.num_programs(0) // 2
    i_v = (tl.program_id(0) // n_g).to(tl.int64)
    o_g = tl.program_id(0) % n_g * BLOCK_G + tl.arange(0, BLOCK_G)
    o_s = tl.arange(0, BLOCK_S)
    m_g = o_g < G
    b_sum = tl.zeros([BLOCK_G], tl.float32)
    for s in range(0, rows, BLOCK_S):
        p_part = partial + (i_v * rows + s + o_s)[:, None] * G + o_g[None, :]
        b_sum += tl.sum(tl.load(p_part, mask=(s + o_s < rows)[:, None] & m_g[None, :], other=0.0), 0)
    tl.store(sums + i_v * G + o_g, b_sum, mask=m_g)


@jit
def _input_gradient_kernel(
    x, dy, weight, bias, mean, rstd, sums, dx, R, Q, C, G, inverse_count, n_r, n_q,
    RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dx = w·rstd·(g − Σg/M − x̂·Σ(g·x̂)/M). Grid: P × blocks of R × blocks of Q.

    `inverse_count` is 1/M, or 0 where μ and σ² are constants (batch norm's inference). Moves 2·P·R·Q elements in,
    P·R·Q out.
    """
    pid = tl.program_id(0)
    i_p = (pid // n_q // n_r).to(tl.int64)
    i_r = pid // n_q % n_r * BLOCK_R
    o_q = pid % n_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_r = tl.arange(0, BLOCK_R)
    m_q = o_q < Q
    m_x = (i_r + o_r < R)[:, None] & m_q[None, :]
    first = (i_p * R + i_r) * Q
    o_x = o_r[:, None] * Q + o_q[None, :]
    o_pq = i_p * Q + o_q
    b_normalized, b_g, b_rstd, b_weight = _load_normalized(
        x, dy, mean, rstd, weight, bias, first, o_x, m_x, o_pq, m_q, C, G, RELU
    )
    b_mean_g = tl.load(sums + o_pq % G, mask=m_q, other=0.0) * inverse_count
    b_mean_gx = tl.load(sums + G + o_pq % G, mask=m_q, other=0.0) * inverse_count
    b_dx = (b_weight * b_rstd)[None, :] * (b_g - b_mean_g[None, :] - b_normalized * b_mean_gx[None, :])
    tl.store(dx + first + o_x, b_dx, mask=m_x)


@runtime.launches_on_its_device
def moments(
    x: Tensor,
    *,
    per_sample: bool,
    eps: float,
    running: tuple[Tensor, Tensor] | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(σ² + eps) of dense `x`, both fp32 `[N, C]` (`per_sample`) or `[C]`; moves `running` (mean, var)."""
    p, r, q = runtime.as_prq(x)
    block_r, block_q, n_q, chunk, splits = _split(p, r, q)
    partial = runtime.allocate((2, splits, p, q), x, torch.float32)
    _partial_moments_kernel[(splits * p * n_q,)](
        x, partial, p, r, q, chunk, n_q, splits * p * q, BLOCK_R=block_r, BLOCK_Q=block_q, num_warps=4
    )  # fmt: skip
    shape = x.shape[:2] if per_sample else x.shape[1:2]
    mean, rstd = runtime.allocate(shape, x, torch.float32), runtime.allocate(shape, x, torch.float32)
    groups = mean.numel()
    rows = splits * p * q // groups
    count = x.numel() // groups
    block_g = min(64, power_of_two(groups))
    running_mean, running_var = (None, None) if running is None else running
    _merge_moments_kernel[(ceil_div(groups, block_g),)](
        partial, mean, rstd, running_mean, running_var, rows, groups, r, chunk, rows // splits, splits * p * q,
        float(count), count / max(1, count - 1), eps, momentum,
        UPDATE=running is not None, BLOCK_S=_MERGE_ROWS, BLOCK_G=block_g, num_warps=4,
    )  # fmt: skip
    return mean, rstd


@runtime.launches_on_its_device
def apply(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """`relu?((x − mean)·rstd·weight + bias + residual)` in x's dtype and format; `residual` dense in that format."""
    p, r, q = runtime.as_prq(x)
    block_r, block_q = _tile(r, q)
    n_r, n_q = ceil_div(r, block_r), ceil_div(q, block_q)
    y = runtime.allocate_like(x)
    _apply_kernel[(p * n_r * n_q,)](
        x, weight.contiguous(), bias.contiguous(), mean, rstd, residual, y, r, q, x.shape[1], mean.numel(), n_r, n_q,
        RESIDUAL=residual is not None, RELU=relu, BLOCK_R=block_r, BLOCK_Q=block_q, num_warps=4,
    )  # fmt: skip
    return y


@runtime.launches_on_its_device
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor]:
    """dx in x's dtype and format, and fp32 `[2, *mean.shape]`: Σg and Σ g·x̂ of each group.

    `dy` is dense in x's format; without `batch_statistics`, mean and rstd count as constants.
    """
    p, r, q = runtime.as_prq(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    block_r, block_q, n_q, chunk, splits = _split(p, r, q)
    groups = mean.numel()
    partial = runtime.allocate((2, splits, p, q), x, torch.float32)
    _partial_sums_kernel[(splits * p * n_q,)](
        x, dy, weight, bias, mean, rstd, partial, p, r, q, x.shape[1], groups, chunk, n_q, splits * p * q,
        RELU=relu, BLOCK_R=block_r, BLOCK_Q=block_q, num_warps=4,
    )  # fmt: skip
    sums = runtime.allocate((2, *mean.shape), x, torch.float32)
    block_g = min(64, power_of_two(groups))
    _merge_sums_kernel[(2 * ceil_div(groups, block_g),)](
        partial, sums, splits * p * q // groups, groups, BLOCK_S=_MERGE_ROWS, BLOCK_G=block_g, num_warps=4
    )  # fmt: skip
    dx = runtime.allocate_like(x)
    n_r = ceil_div(r, block_r)
    _input_gradient_kernel[(p * n_r * n_q,)](
        x, dy, weight, bias, mean, rstd, sums, dx, r, q, x.shape[1], groups,
        groups / x.numel() if batch_statistics else 0.0, n_r, n_q,
        RELU=relu, BLOCK_R=block_r, BLOCK_Q=block_q, num_warps=4,
    )  # fmt: skip
    return dx, sums


def _tile(r: int, q: int) -> tuple[int, int]:
    """Rows and columns of a tile: 64 columns make rows of at least 128 bytes, which a warp reads in whole sectors."""
    block_q = min(64, power_of_two(q))
    return min(_TILE_ELEMENTS // block_q, power_of_two(r)), block_q


def _split(p: int, r: int, q: int) -> tuple[int, int, int, int, int]:
    """BLOCK_R, BLOCK_Q, blocks of Q, rows per chunk and number of chunks for the two reductions."""
    block_r, block_q = _tile(r, q)
    n_q = ceil_div(q, block_q)
    wanted = max(1, runtime.TARGET_PROGRAMS // (p * n_q))
    chunk = ceil_div(ceil_div(r, wanted), block_r) * block_r
    return block_r, block_q, n_q, chunk, ceil_div(r, chunk)
