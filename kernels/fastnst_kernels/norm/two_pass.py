# mypy: disable-error-code="no-untyped-def"
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""The norms in two launches (three for batch norm), for shapes that one pass cannot hold on chip.

Legend: x is a dense `[P, R, Q]` (see `runtime`), R = H·W; C channels; a group is the set of positions that share μ and
σ², M of them, G groups: instance norm has G = N·C, batch norm G = C. In both memory formats (p, q) belongs to the
channel `(p·Q + q) mod C` and to the group `(p·Q + q) mod G`. The formulas are in `instance_norm.py` and
`batch_norm.py`, those of upsampling and padding in `upsample_pad.py`.

The first launch writes partial results per chunk of rows, the second merges them in fixed order and maps. No atomics,
and the chunks depend on the shape alone, so the same input gives the same bits on every run. Forward reads x twice and
writes y; backward reads x and dy twice and writes dx. The second launch walks through its chunk backwards, because L2
still holds the last rows that the first launch read.

Variance (Chan, Golub, LeVeque 1983): every tile's sum of squares is taken about its own mean, and triples (n, μ, S) are
merged by S = S₁ + S₂ + (μ₂ − μ₁)²·n₁n₂/(n₁ + n₂). Values enter relative to the first of their chunk, so that a large
common mean costs no digits. Squares that overflow make S infinite, never NaN.
"""

from __future__ import annotations

from fastnst_kernels.norm.upsample_pad import load_upsample_pad_adjoint, store_upsample_pad
from fastnst_kernels.runtime import jit, tl


@jit
def partial_moments_kernel(
    x, partial, P, R, Q, chunk, n_q, total,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """partial[0, s, p, q] = mean, partial[1, s, p, q] = sum of squares about it, over the rows of chunk s.

    Grid: splits × P × blocks of Q. Moves P·R·Q elements in; `total` = splits·P·Q. Limit: R·Q < 2³¹.
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
        b_squares += tl.sum(b_centred * b_centred, 0) + b_delta * (b_delta * (count * n / (count + n)))
        count += n
    p_out = partial + (i_s.to(tl.int64) * P + i_p) * Q + o_q
    tl.store(p_out, b_mean + b_pivot, mask=m_q)
    tl.store(p_out + total, b_squares, mask=m_q)


@jit
def merge_moments(p_means, p_squares, step, rows, R, chunk, repeat, count, o_g, m_g, BLOCK_S: tl.constexpr):
    """μ and σ² of the columns `o_g` from `rows` partial results each, `step` elements apart.

    Row s belongs to chunk (s // repeat) mod ⌈R/chunk⌉. Two walks over the partial results: the mean first, then the
    squares about it.
    """
    o_s = tl.arange(0, BLOCK_S)
    n_chunks = (R + chunk - 1) // chunk
    b_pivot = tl.load(p_means + o_g, mask=m_g, other=0.0)
    b_shift = tl.zeros_like(b_pivot)
    for s in range(0, rows, BLOCK_S):
        m_p = (s + o_s < rows)[:, None] & m_g[None, :]
        b_n = tl.minimum(R - (s + o_s) // repeat % n_chunks * chunk, chunk).to(tl.float32)[:, None]
        b_mean = tl.load(p_means + (s + o_s).to(tl.int64)[:, None] * step + o_g[None, :], mask=m_p, other=0.0)
        b_shift += tl.sum(tl.where(m_p, b_n * (b_mean - b_pivot[None, :]), 0.0), 0)
    b_shift /= count
    b_squares = tl.zeros_like(b_pivot)
    for s in range(0, rows, BLOCK_S):
        m_p = (s + o_s < rows)[:, None] & m_g[None, :]
        b_n = tl.minimum(R - (s + o_s) // repeat % n_chunks * chunk, chunk).to(tl.float32)[:, None]
        o_p = (s + o_s).to(tl.int64)[:, None] * step + o_g[None, :]
        b_delta = tl.load(p_means + o_p, mask=m_p, other=0.0) - b_pivot[None, :] - b_shift[None, :]
        b_part = tl.load(p_squares + o_p, mask=m_p, other=0.0)
        b_squares += tl.sum(tl.where(m_p, b_part + b_n * b_delta * b_delta, 0.0), 0)
    return b_pivot + b_shift, b_squares / count


@jit
def merge_sums(p_part, step, rows, o_g, m_g, BLOCK_S: tl.constexpr):
    """Σ over `rows` partial sums of the columns `o_g`, `step` elements apart, in fixed order."""
    o_s = tl.arange(0, BLOCK_S)
    b_sum = tl.zeros([o_g.shape[0]], tl.float32)
    for s in range(0, rows, BLOCK_S):
        m_p = (s + o_s < rows)[:, None] & m_g[None, :]
        b_sum += tl.sum(tl.load(p_part + (s + o_s).to(tl.int64)[:, None] * step + o_g[None, :], mask=m_p, other=0.0), 0)
    return b_sum


@jit
def rstd_of(b_var, eps):
    """1/√(σ² + ε), correctly rounded in each step: the approximations would cost two bits."""
    return tl.div_rn(1.0, tl.sqrt_rn(b_var + eps))


@jit
def merge_moments_kernel(
    partial, mean, rstd, var, rows, G, R, chunk, repeat, total, count, eps,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """μ, 1/√(σ² + ε), σ² of a block of groups. Grid: blocks of G. Moves 2·rows·G·4 bytes, means twice."""
    o_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    m_g = o_g < G
    b_mean, b_var = merge_moments(partial, partial + total, G, rows, R, chunk, repeat, count, o_g, m_g, BLOCK_S)
    tl.store(mean + o_g, b_mean, mask=m_g)
    tl.store(rstd + o_g, rstd_of(b_var, eps), mask=m_g)
    tl.store(var + o_g, b_var, mask=m_g)


@jit
def residual_positions(o_r, W, BORDER: tl.constexpr):
    """The positions `o_r` of x in a residual that is larger by BORDER at each side."""
    o_t = o_r
    if BORDER > 0:
        o_h = o_r // W
        o_t = (o_h + BORDER) * (W + 2 * BORDER) + o_r - o_h * W + BORDER
    return o_t


@jit
def apply_kernel(
    x, weight, bias, mean, rstd, partial, residual, y, P, R, Q, C, G, H, W, chunk, n_q, total, splits, count, eps,
    MERGE: tl.constexpr, RESIDUAL: tl.constexpr, BORDER: tl.constexpr, RELU: tl.constexpr, UPSAMPLE_PAD: tl.constexpr,
    UP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr,
    SKIP: tl.constexpr, ZEROS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y = upsample_pad(relu?((x − μ)·rstd·w + b + residual)) over the rows of a chunk.

    Grid: splits × P × blocks of Q. With MERGE the partial moments are this group's own and are merged into μ and rstd
    here; the first chunk stores them. Moves P·R·Q elements in (twice that with a residual), y's out. The ReLU keeps
    NaN, as in PyTorch. Limit: a sample of y has less than 2³¹ elements.
    """
    pid = tl.program_id(0)
    i_p = (pid // n_q % P).to(tl.int64)
    i_s = pid // n_q // P
    o_q = pid % n_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_tile = tl.arange(0, BLOCK_R)
    m_q = o_q < Q
    o_pq = i_p * Q + o_q
    if MERGE:
        b_mean, b_var = merge_moments(partial, partial + total, P * Q, splits, R, chunk, 1, count, o_pq, m_q, BLOCK_S)
        b_rstd = rstd_of(b_var, eps)
        if i_s == 0:
            tl.store(mean + o_pq, b_mean, mask=m_q)
            tl.store(rstd + o_pq, b_rstd, mask=m_q)
    else:
        b_mean = tl.load(mean + o_pq % G, mask=m_q, other=0.0)
        b_rstd = tl.load(rstd + o_pq % G, mask=m_q, other=0.0)
    b_weight = tl.load(weight + o_pq % C, mask=m_q, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_pq % C, mask=m_q, other=0.0).to(tl.float32)
    p_x = x + i_p * R * Q
    p_y = y + i_p * (H * UP + TOP + BOTTOM) * ((W * UP + LEFT + RIGHT) * Q)
    p_residual = residual
    if RESIDUAL:
        p_residual = residual + i_p * (H + 2 * BORDER) * ((W + 2 * BORDER) * Q)
    first = i_s * chunk
    last = tl.minimum(first + chunk, R)
    for i in range(0, (last - first + BLOCK_R - 1) // BLOCK_R):
        r = first + ((last - first - 1) // BLOCK_R - i) * BLOCK_R
        o_r = r + o_tile
        m_r = o_r < last
        m_x = m_r[:, None] & m_q[None, :]
        o_x = o_r[:, None] * Q + o_q[None, :]
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_y = (b_x - b_mean[None, :]) * b_rstd[None, :] * b_weight[None, :] + b_bias[None, :]
        if RESIDUAL:
            o_residual = residual_positions(o_r, W, BORDER)[:, None] * Q + o_q[None, :]
            b_y += tl.load(p_residual + o_residual, mask=m_x, other=0.0).to(tl.float32)
        if RELU:
            b_y = tl.where(b_y < 0.0, 0.0, b_y)
        b_y = b_y.to(y.dtype.element_ty)
        if UPSAMPLE_PAD:
            store_upsample_pad(
                p_y, b_y, o_r, m_r, o_q, m_q, r, tl.minimum(r + BLOCK_R, last), H, W, Q,
                UP, LEFT, RIGHT, TOP, BOTTOM, SKIP, ZEROS,
            )  # fmt: skip
        else:
            tl.store(p_y + o_x, b_y, mask=m_x)


@jit
def load_gradient(
    p_x, p_dy, p_residual, b_mean, b_rstd, b_weight, b_bias, r, last, o_q, m_q, H, W, Q,
    RESIDUAL: tl.constexpr, BORDER: tl.constexpr, RELU: tl.constexpr, UPSAMPLE_PAD: tl.constexpr,
    UP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr,
    SKIP: tl.constexpr, ZEROS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x̂ and g of the rows from r to before `last`; g is upsample_padᵀ(dy), masked by the recomputed z."""
    o_r = r + tl.arange(0, BLOCK_R)
    m_r = o_r < last
    m_x = m_r[:, None] & m_q[None, :]
    o_x = o_r[:, None] * Q + o_q[None, :]
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    if UPSAMPLE_PAD:
        b_g = load_upsample_pad_adjoint(
            p_dy, o_r, m_r, o_q, m_q, r, tl.minimum(r + BLOCK_R, last), H, W, Q,
            UP, LEFT, RIGHT, TOP, BOTTOM, SKIP, ZEROS,
        )  # fmt: skip
    else:
        b_g = tl.load(p_dy + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_normalized = (b_x - b_mean[None, :]) * b_rstd[None, :]
    if RELU:
        b_z = b_normalized * b_weight[None, :] + b_bias[None, :]
        if RESIDUAL:
            o_residual = residual_positions(o_r, W, BORDER)[:, None] * Q + o_q[None, :]
            b_z += tl.load(p_residual + o_residual, mask=m_x, other=0.0).to(tl.float32)
        b_g = tl.where(b_z <= 0.0, 0.0, b_g)
    return b_normalized, b_g, o_r, m_r, m_x, o_x


@jit
def gradient_kernel(
    x, dy, weight, bias, mean, rstd, residual, partial, sums, dx, d_residual,
    P, R, Q, C, G, H, W, chunk, n_q, total, splits, inverse_count,
    STEP: tl.constexpr, RESIDUAL: tl.constexpr, BORDER: tl.constexpr, RELU: tl.constexpr, UPSAMPLE_PAD: tl.constexpr,
    UP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr,
    SKIP: tl.constexpr, ZEROS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One of the two steps of the backward, over the rows of a chunk. Grid: splits × P × blocks of Q.

    | STEP | writes |
    |---|---|
    | "sums" | partial[0, s, p, q] = Σg, partial[1, s, p, q] = Σ g·x̂, and d_residual = g if that is given |
    | "fixed" | the same, and dx = w·rstd·g: the only step if μ and σ² are constants |
    | "merge" | dx = w·rstd·(g − Σg/M − x̂·Σ(g·x̂)/M), Σ merged from this group's own partial sums, and stored |
    | "map" | the same with Σ from `sums [2, G]` |

    Moves 2·P·R·Q elements in; dx's and d_residual's out. Limit: a sample of dy has less than 2³¹ elements.
    """
    pid = tl.program_id(0)
    i_p = (pid // n_q % P).to(tl.int64)
    i_s = pid // n_q // P
    o_q = pid % n_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < Q
    o_pq = i_p * Q + o_q
    b_mean = tl.load(mean + o_pq % G, mask=m_q, other=0.0)
    b_rstd = tl.load(rstd + o_pq % G, mask=m_q, other=0.0)
    b_weight = tl.load(weight + o_pq % C, mask=m_q, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_pq % C, mask=m_q, other=0.0).to(tl.float32)
    p_x = x + i_p * R * Q
    p_dx = dx
    if dx is not None:
        p_dx = dx + i_p * R * Q
    p_dy = dy + i_p * (H * UP + TOP + BOTTOM) * ((W * UP + LEFT + RIGHT) * Q)
    o_plane = i_p * (H + 2 * BORDER) * ((W + 2 * BORDER) * Q)
    p_residual = residual
    if RESIDUAL:
        p_residual = residual + o_plane
    b_sum_g = tl.zeros([BLOCK_Q], tl.float32)
    b_sum_gx = tl.zeros([BLOCK_Q], tl.float32)
    if STEP == "merge":
        b_sum_g = merge_sums(partial, P * Q, splits, o_pq, m_q, BLOCK_S)
        b_sum_gx = merge_sums(partial + total, P * Q, splits, o_pq, m_q, BLOCK_S)
        if i_s == 0:
            tl.store(sums + o_pq, b_sum_g, mask=m_q)
            tl.store(sums + G + o_pq, b_sum_gx, mask=m_q)
    if STEP == "map":
        b_sum_g = tl.load(sums + o_pq % G, mask=m_q, other=0.0)
        b_sum_gx = tl.load(sums + G + o_pq % G, mask=m_q, other=0.0)
    first = i_s * chunk
    last = tl.minimum(first + chunk, R)
    for i in range(0, (last - first + BLOCK_R - 1) // BLOCK_R):
        r = first + i * BLOCK_R
        if (STEP == "merge") | (STEP == "map"):
            r = first + ((last - first - 1) // BLOCK_R - i) * BLOCK_R
        b_normalized, b_g, o_r, m_r, m_x, o_x = load_gradient(
            p_x, p_dy, p_residual, b_mean, b_rstd, b_weight, b_bias, r, last, o_q, m_q, H, W, Q,
            RESIDUAL, BORDER, RELU, UPSAMPLE_PAD, UP, LEFT, RIGHT, TOP, BOTTOM, SKIP, ZEROS, BLOCK_R,
        )  # fmt: skip
        if (STEP == "merge") | (STEP == "map"):
            b_rest = b_g - b_sum_g[None, :] * inverse_count - b_normalized * (b_sum_gx * inverse_count)[None, :]
            tl.store(p_dx + o_x, (b_weight * b_rstd)[None, :] * b_rest, mask=m_x)
        else:
            b_sum_g += tl.sum(tl.where(m_x, b_g, 0.0), 0)
            b_sum_gx += tl.sum(tl.where(m_x, b_g * b_normalized, 0.0), 0)
            if STEP == "fixed":
                tl.store(p_dx + o_x, (b_weight * b_rstd)[None, :] * b_g, mask=m_x)
            if d_residual is not None:
                # The gradient of the residual's margin is zero.
                store_upsample_pad(
                    d_residual + o_plane, b_g.to(d_residual.dtype.element_ty), o_r, m_r, o_q, m_q, r,
                    tl.minimum(r + BLOCK_R, last), H, W, Q, 1, BORDER, BORDER, BORDER, BORDER, 0, True,
                )  # fmt: skip
    if (STEP == "sums") | (STEP == "fixed"):
        p_out = partial + (i_s.to(tl.int64) * P + i_p) * Q + o_q
        tl.store(p_out, b_sum_g, mask=m_q)
        tl.store(p_out + total, b_sum_gx, mask=m_q)


@jit
def merge_sums_kernel(partial, sums, rows, G, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr):
    """sums[v, g] = Σ_s partial[v, s, g] for v = 0, 1. Grid: 2 × blocks of G. Moves 2·rows·G·4 bytes."""
    n_g = tl.num_programs(0) // 2
    i_v = (tl.program_id(0) // n_g).to(tl.int64)
    o_g = tl.program_id(0) % n_g * BLOCK_G + tl.arange(0, BLOCK_G)
    m_g = o_g < G
    b_sum = merge_sums(partial + i_v * rows * G, G, rows, o_g, m_g, BLOCK_S)
    tl.store(sums + i_v * G + o_g, b_sum, mask=m_g)


@jit
def parameter_gradients_kernel(sums, d_weight, d_bias, N, C, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr):
    """d_bias = Σ_n sums[0, n], d_weight = Σ_n sums[1, n]. Grid: blocks of C. Moves 2·N·C·4 bytes."""
    o_c = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    m_c = o_c < C
    tl.store(d_bias + o_c, merge_sums(sums, C, N, o_c, m_c, BLOCK_S), mask=m_c)
    tl.store(d_weight + o_c, merge_sums(sums + tl.cast(N, tl.int64) * C, C, N, o_c, m_c, BLOCK_S), mask=m_c)
