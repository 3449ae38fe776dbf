# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005 (Triton cannot unpack a tuple)
# (Triton reads a kernel's annotations as its signature, so only compile-time parameters carry one.)
"""The norms in one launch that reads each input once: a group stays on chip across a barrier.

Legend: see `two_pass.py`. A unit shares statistics: for instance norm one `[R, Q]` plane of x, for batch norm all
samples of it. Its rows are cut into chunks of PARTS·SUB; each of its `members` programs holds one chunk in registers,
writes partial results, waits until all members have, merges them, and maps its chunk. All programs of a launch are
resident at once (a cooperative launch), so waiting cannot deadlock; they form `n_teams` teams, and each team takes
every n_teams-th unit, so that one team's loads overlap another's stores.

Forward moves 1 read and 1 write, backward 2 reads and 1 write, and per chunk 2·Q·4 bytes of partial results.

Three things keep a chunk in registers without spilling:

- It is held as 32-bit words, two 16-bit values each, because the compiler gives each 16-bit value its own register.
- It is cut into PARTS, processed one by one, so that few fp32 values are alive at a time.
- Each walk after the first reads `word ^ zero`, with a zero that the compiler cannot predict. Otherwise it would
  recognise the previous walk's conversion to fp32 and keep its results, twice the size.
"""

from __future__ import annotations

from fastnst_kernels.norm.two_pass import (
    load_gradient,
    merge_moments,
    merge_sums,
    residual_positions,
    rstd_of,
)
from fastnst_kernels.norm.upsample_pad import store_upsample_pad
from fastnst_kernels.runtime import INTERPRETING, jit, tl

_COMPILED = None if tl is None else tl.constexpr(not INTERPRETING)  # without Triton nothing is launched


@jit
def arrive_and_wait(counter, members):
    """Wait until all members have arrived with their stores visible; return a zero that depends on it."""
    tl.debug_barrier()  # the stores of all threads, before the one that speaks for them
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while seen < members:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return tl.multiple_of(seen - members, 16)


@jit
def _low(b_words, dtype: tl.constexpr):
    """The first of the two 16-bit values of each word, as fp32."""
    if dtype == tl.bfloat16:
        b_low = (b_words << 16).to(tl.float32, bitcast=True)
    else:
        b_low = (b_words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return b_low


@jit
def _high(b_words, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        b_high = (b_words & -65536).to(tl.float32, bitcast=True)
    else:
        b_high = ((b_words >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return b_high


@jit
def _values(b_words, dtype: tl.constexpr, SUB: tl.constexpr, BLOCK_Q: tl.constexpr):
    """fp32 `[SUB, BLOCK_Q]` from the words that hold it."""
    if dtype == tl.float32:
        b = b_words.to(tl.float32, bitcast=True)
    else:
        b = tl.join(_low(b_words, dtype), _high(b_words, dtype)).reshape(SUB, BLOCK_Q)
    return b


@jit
def _words(b, dtype: tl.constexpr, WORD_R: tl.constexpr, WORD_Q: tl.constexpr):
    """The inverse of `_values`: `b` rounded to `dtype`, as words."""
    if dtype == tl.float32:
        b_words = b.to(tl.int32, bitcast=True)
    else:
        b_low, b_high = b.reshape(WORD_R, WORD_Q, 2).split()
        if _COMPILED:
            # Opaque: otherwise the compiler packs only when the words are used, and holds twice as many registers.
            CONVERT: tl.constexpr = (
                "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == tl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
            )
            b_words = tl.inline_asm_elementwise(
                CONVERT, "=r,r,r", [b_low, b_high], dtype=tl.int32, is_pure=False, pack=1
            )
        else:
            b_low = b_low.to(dtype).to(tl.uint16, bitcast=True).to(tl.int32)
            b_words = b_low | (b_high.to(dtype).to(tl.uint16, bitcast=True).to(tl.int32) << 16)
    return b_words


@jit
def one_pass_forward_kernel(
    x, weight, bias, residual, y, mean, rstd, var, partial, arrived,
    H, W, C, plane_words, n_chunks, members, plane_step, units, n_teams, count, eps, zero,
    SHARED: tl.constexpr, RESIDUAL: tl.constexpr, BORDER: tl.constexpr, RELU: tl.constexpr, UPSAMPLE_PAD: tl.constexpr,
    UP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr,
    SKIP: tl.constexpr, ZEROS: tl.constexpr,
    Q: tl.constexpr, PARTS: tl.constexpr, SUB: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
    MERGE_Q: tl.constexpr,
):  # fmt: skip
    """y = upsample_pad(relu?((x − μ)·rstd·w + b + residual)); μ, rstd (and σ² into `var`) of each group.

    Grid: n_teams × members, all resident. Moves units·members·PARTS·SUB·Q elements in (twice that with a residual),
    y's out, 2·units·members·Q·4 bytes of partial results out, which every member of a unit reads back from L2; with
    SHARED each reads MERGE_Q columns of them only, at the price of a second barrier. Limit: a sample of y has less than
    2³¹ elements.

    The moments of a chunk in two walks (Chan, Golub, LeVeque 1983): a rough mean m, then d = Σ(x − m)/n and
    Σ(x − m)² − n·d² about m + d, which the rounding of m cannot hurt.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    PER: tl.constexpr = 32 // dtype.primitive_bitwidth
    WORD_R: tl.constexpr = SUB // PER if Q == 1 else SUB
    WORD_Q: tl.constexpr = 1 if Q == 1 else BLOCK_Q // PER
    PER_ROW: tl.constexpr = PER if Q == 1 else 1
    ROW_WORDS: tl.constexpr = Q * PER_ROW // PER
    R = H * W
    i_m = tl.program_id(0) // n_teams
    first = i_m % n_chunks * (PARTS * SUB)
    last = tl.minimum(first + PARTS * SUB, R)
    n = (last - first).to(tl.float32)
    o_tile = tl.arange(0, SUB)
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < Q
    o_row = tl.arange(0, WORD_R)
    o_column = tl.arange(0, WORD_Q)
    m_column = o_column < ROW_WORDS
    later = tl.multiple_of(zero, 16)
    for i_u in range(tl.program_id(0) % n_teams, units, n_teams):
        o_words = (first // PER_ROW + later + o_row)[:, None] * ROW_WORDS + o_column[None, :]
        i_p = tl.cast(i_u, tl.int64) + i_m // n_chunks * plane_step
        p_x = x.to(tl.pointer_type(tl.int32)) + i_p * plane_words + o_words
        held = ()
        for k in tl.static_range(PARTS):
            m_words = (first + later + k * SUB + o_row * PER_ROW < R)[:, None] & m_column[None, :]
            held = held + (tl.load(p_x + k * WORD_R * ROW_WORDS, mask=m_words, other=0),)
        b_sum = tl.zeros([SUB, BLOCK_Q], tl.float32)
        for k in tl.static_range(PARTS):
            b_sum += _values(held[k], dtype, SUB, BLOCK_Q)
        b_rough = tl.sum(b_sum, 0) / n
        b_sum = tl.zeros([SUB, BLOCK_Q], tl.float32)
        b_squares = tl.zeros([SUB, BLOCK_Q], tl.float32)
        for k in tl.static_range(PARTS):
            m_r = first + later + k * SUB + o_tile < R
            b_centred = _values(held[k] ^ zero, dtype, SUB, BLOCK_Q) - b_rough[None, :]
            b_centred = tl.where(m_r[:, None], b_centred, 0.0)
            b_sum += b_centred
            b_squares += b_centred * b_centred
        b_shift = tl.sum(b_sum, 0) / n
        p_partial = partial + tl.cast(i_u, tl.int64) * members * 2 * Q
        tl.store(p_partial + i_m * Q + o_q, b_rough + b_shift, mask=m_q)
        b_moved = tl.minimum(b_shift * b_shift * n, 3e38)  # finite: squares that overflow stay infinite, not NaN
        tl.store(p_partial + (members + i_m) * Q + o_q, tl.sum(b_squares, 0) - b_moved, mask=m_q)
        later = arrive_and_wait(arrived + 2 * i_u, members)
        o_group = i_u * Q + o_q
        if SHARED:
            if i_m < (Q + MERGE_Q - 1) // MERGE_Q:
                o_m = i_m * MERGE_Q + tl.arange(0, MERGE_Q)
                b_mean, b_var = merge_moments(
                    p_partial, p_partial + members * Q, Q, members, R, PARTS * SUB, 1, count, o_m, o_m < Q, BLOCK_S
                )
                tl.store(mean + i_u * Q + o_m, b_mean, mask=o_m < Q)
                tl.store(rstd + i_u * Q + o_m, rstd_of(b_var, eps), mask=o_m < Q)
                if var is not None:
                    tl.store(var + i_u * Q + o_m, b_var, mask=o_m < Q)
            later |= arrive_and_wait(arrived + 2 * i_u + 1, members)
            b_mean = tl.load(mean + o_group, mask=m_q, other=0.0)
            b_rstd = tl.load(rstd + o_group, mask=m_q, other=0.0)
        else:
            b_mean, b_var = merge_moments(
                p_partial, p_partial + members * Q, Q, members, R, PARTS * SUB, 1, count, o_q, m_q, BLOCK_S
            )
            b_rstd = rstd_of(b_var, eps)
            if i_m == 0:
                tl.store(mean + o_group, b_mean, mask=m_q)
                tl.store(rstd + o_group, b_rstd, mask=m_q)
                if var is not None:
                    tl.store(var + o_group, b_var, mask=m_q)
        b_scale = b_rstd * tl.load(weight + o_group % C, mask=m_q, other=0.0).to(tl.float32)
        b_bias = tl.load(bias + o_group % C, mask=m_q, other=0.0).to(tl.float32)
        p_y = y + i_p * (H * UP + TOP + BOTTOM) * ((W * UP + LEFT + RIGHT) * Q)
        for k in tl.static_range(PARTS):
            o_r = first + later + k * SUB + o_tile
            m_r = o_r < R
            m_x = m_r[:, None] & m_q[None, :]
            b_x = _values(held[k] ^ later, dtype, SUB, BLOCK_Q)
            b_y = (b_x - b_mean[None, :]) * b_scale[None, :] + b_bias[None, :]
            if RESIDUAL:
                p_residual = residual + i_p * (H + 2 * BORDER) * ((W + 2 * BORDER) * Q)
                o_residual = residual_positions(o_r, W, BORDER)[:, None] * Q + o_q[None, :]
                b_y += tl.load(p_residual + o_residual, mask=m_x, other=0.0).to(tl.float32)
            if RELU:
                b_y = tl.where(b_y < 0.0, 0.0, b_y)
            b_out = b_y.to(dtype)
            if UPSAMPLE_PAD:
                start = tl.minimum(first + k * SUB, R - 1)
                store_upsample_pad(
                    p_y, b_out, o_r, m_r, o_q, m_q, start, tl.minimum(start + SUB, R), H, W, Q,
                    UP, LEFT, RIGHT, TOP, BOTTOM, SKIP, ZEROS,
                )  # fmt: skip
            else:
                tl.store(p_y + o_r[:, None] * Q + o_q[None, :], b_out, mask=m_x)


@jit
def _merged_sums(
    p_partial, sums, i_u, i_m, members, units, p_counters, o_q, m_q,
    Q: tl.constexpr, SHARED: tl.constexpr, MERGE_Q: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge and store Σg and Σ g·x̂ of the unit's columns `o_q`; with SHARED each member merges a share."""
    p_all = sums + i_u * Q + o_q
    later = arrive_and_wait(p_counters, members)
    if SHARED:
        if i_m < (Q + MERGE_Q - 1) // MERGE_Q:
            o_m = i_m * MERGE_Q + tl.arange(0, MERGE_Q)
            m_m = o_m < Q
            b_all = merge_sums(p_partial, Q, members, o_m, m_m, BLOCK_S)
            tl.store(sums + i_u * Q + o_m, b_all, mask=m_m)
            b_all = merge_sums(p_partial + members * Q, Q, members, o_m, m_m, BLOCK_S)
            tl.store(sums + (units + i_u) * Q + o_m, b_all, mask=m_m)
        later |= arrive_and_wait(p_counters + 1, members)
        b_all_g = tl.load(p_all, mask=m_q, other=0.0)
        b_all_gx = tl.load(p_all + units * Q, mask=m_q, other=0.0)
    else:
        b_all_g = merge_sums(p_partial, Q, members, o_q, m_q, BLOCK_S)
        b_all_gx = merge_sums(p_partial + members * Q, Q, members, o_q, m_q, BLOCK_S)
        if i_m == 0:
            tl.store(p_all, b_all_g, mask=m_q)
            tl.store(p_all + units * Q, b_all_gx, mask=m_q)
    return b_all_g, b_all_gx, later


@jit
def one_pass_backward_kernel(
    x, dy, weight, bias, mean, rstd, dx, sums, partial, arrived,
    H, W, C, plane_words, n_chunks, members, plane_step, units, n_teams, inverse_count, zero,
    SHARED: tl.constexpr, RELU: tl.constexpr,
    Q: tl.constexpr, PARTS: tl.constexpr, SUB: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
    MERGE_Q: tl.constexpr,
):  # fmt: skip
    """dx = w·rstd·(g − Σg/M − x̂·Σ(g·x̂)/M), sums = (Σg, Σ g·x̂); g is dy masked by the recomputed z.

    A program holds its chunk of g and reads x a second time, from L2: eviction hints keep x there and drop dy and dx.
    Grid: n_teams × members, all resident. Moves x and dy in, dx out, x a second time from L2, and partial results as
    the forward. Limit: a sample has less than 2³¹ elements.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    PER: tl.constexpr = 32 // dtype.primitive_bitwidth
    WORD_R: tl.constexpr = SUB // PER if Q == 1 else SUB
    WORD_Q: tl.constexpr = 1 if Q == 1 else BLOCK_Q // PER
    PER_ROW: tl.constexpr = PER if Q == 1 else 1
    ROW_WORDS: tl.constexpr = Q * PER_ROW // PER
    R = H * W
    i_m = tl.program_id(0) // n_teams
    first = i_m % n_chunks * (PARTS * SUB)
    o_tile = tl.arange(0, SUB)
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < Q
    o_row = tl.arange(0, WORD_R)
    o_column = tl.arange(0, WORD_Q)
    m_column = o_column < ROW_WORDS
    later = tl.multiple_of(zero, 16)
    for i_u in range(tl.program_id(0) % n_teams, units, n_teams):
        i_p = tl.cast(i_u, tl.int64) + i_m // n_chunks * plane_step
        o_group = i_u * Q + o_q
        b_mean = tl.load(mean + o_group, mask=m_q, other=0.0)
        b_rstd = tl.load(rstd + o_group, mask=m_q, other=0.0)
        b_scale = b_rstd * tl.load(weight + o_group % C, mask=m_q, other=0.0).to(tl.float32)
        b_bias = tl.load(bias + o_group % C, mask=m_q, other=0.0).to(tl.float32)
        p_x = x.to(tl.pointer_type(tl.int32)) + i_p * plane_words
        p_dy = dy.to(tl.pointer_type(tl.int32)) + i_p * plane_words
        held = ()
        b_sum_g = tl.zeros([SUB, BLOCK_Q], tl.float32)
        b_sum_gx = tl.zeros([SUB, BLOCK_Q], tl.float32)
        for k in tl.static_range(PARTS):
            o_words = (first // PER_ROW + later + k * WORD_R + o_row)[:, None] * ROW_WORDS + o_column[None, :]
            m_words = (first + later + k * SUB + o_row * PER_ROW < R)[:, None] & m_column[None, :]
            b_x = tl.load(p_x + o_words, mask=m_words, other=0, eviction_policy="evict_last")
            b_words = tl.load(p_dy + o_words, mask=m_words, other=0, eviction_policy="evict_first")
            b_g = _values(b_words, dtype, SUB, BLOCK_Q)
            b_centred = _values(b_x, dtype, SUB, BLOCK_Q) - b_mean[None, :]
            if RELU:
                b_g = tl.where(b_centred * b_scale[None, :] + b_bias[None, :] <= 0.0, 0.0, b_g)
                b_words = _words(b_g, dtype, WORD_R, WORD_Q)
            held = held + (b_words,)
            b_sum_g += b_g  # rows beyond the last hold a zero gradient
            b_sum_gx += b_g * b_centred
        p_partial = partial + tl.cast(i_u, tl.int64) * members * 2 * Q
        tl.store(p_partial + i_m * Q + o_q, tl.sum(b_sum_g, 0), mask=m_q)
        tl.store(p_partial + (members + i_m) * Q + o_q, tl.sum(b_sum_gx, 0) * b_rstd, mask=m_q)
        b_all_g, b_all_gx, later = _merged_sums(
            p_partial, sums, i_u, i_m, members, units, arrived + 2 * i_u, o_q, m_q, Q, SHARED, MERGE_Q, BLOCK_S
        )
        b_offset = b_scale * b_all_g * inverse_count
        b_slope = b_scale * b_rstd * b_all_gx * inverse_count
        p_dx = dx + i_p * R * Q
        for k in tl.static_range(PARTS):
            o_r = first + later + k * SUB + o_tile
            m_x = (o_r < R)[:, None] & m_q[None, :]
            o_words = (first // PER_ROW + later + k * WORD_R + o_row)[:, None] * ROW_WORDS + o_column[None, :]
            m_words = (first + later + k * SUB + o_row * PER_ROW < R)[:, None] & m_column[None, :]
            b_x = tl.load(p_x + o_words, mask=m_words, other=0, eviction_policy="evict_first")
            b_centred = _values(b_x, dtype, SUB, BLOCK_Q) - b_mean[None, :]
            b_g = _values(held[k] ^ later, dtype, SUB, BLOCK_Q)
            b_dx = b_g * b_scale[None, :] - b_offset[None, :] - b_centred * b_slope[None, :]
            tl.store(p_dx + o_r[:, None] * Q + o_q[None, :], b_dx.to(dtype), mask=m_x)


@jit
def one_pass_gather_backward_kernel(
    x, dy, weight, bias, mean, rstd, residual, dx, d_residual, sums, partial, arrived,
    H, W, C, chunk, n_chunks, members, plane_step, units, n_teams, inverse_count,
    SHARED: tl.constexpr, RESIDUAL: tl.constexpr, BORDER: tl.constexpr, RELU: tl.constexpr, UPSAMPLE_PAD: tl.constexpr,
    UP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr,
    SKIP: tl.constexpr, ZEROS: tl.constexpr,
    Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, MERGE_Q: tl.constexpr,
):  # fmt: skip
    """The same for g = upsample_padᵀ(dy), masked, and with the residual's gradient.

    Gathering g takes the registers that would hold it, so after the barrier a program reads its chunk of x and dy
    again, backwards, from L2, which the groups in flight fill only in part. Grid: n_teams × members, all resident.
    Moves x and dy in, dx (and d_residual) out, x and dy a second time from L2. Limit: a sample of dy has less than 2³¹
    elements.
    """
    R = H * W
    i_m = tl.program_id(0) // n_teams
    first = i_m % n_chunks * chunk
    last = tl.minimum(first + chunk, R)
    n_tiles = (last - first + BLOCK_R - 1) // BLOCK_R
    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < Q
    for i_u in range(tl.program_id(0) % n_teams, units, n_teams):
        i_p = tl.cast(i_u, tl.int64) + i_m // n_chunks * plane_step
        o_group = i_u * Q + o_q
        b_mean = tl.load(mean + o_group, mask=m_q, other=0.0)
        b_rstd = tl.load(rstd + o_group, mask=m_q, other=0.0)
        b_weight = tl.load(weight + o_group % C, mask=m_q, other=0.0).to(tl.float32)
        b_bias = tl.load(bias + o_group % C, mask=m_q, other=0.0).to(tl.float32)
        p_x = x + i_p * R * Q
        p_dx = dx + i_p * R * Q
        p_dy = dy + i_p * (H * UP + TOP + BOTTOM) * ((W * UP + LEFT + RIGHT) * Q)
        o_plane = i_p * (H + 2 * BORDER) * ((W + 2 * BORDER) * Q)
        p_residual = residual
        if RESIDUAL:
            p_residual = residual + o_plane
        b_sum_g = tl.zeros([BLOCK_Q], tl.float32)
        b_sum_gx = tl.zeros([BLOCK_Q], tl.float32)
        for i in range(n_tiles):
            r = first + i * BLOCK_R
            b_normalized, b_g, o_r, m_r, m_x, o_x = load_gradient(
                p_x, p_dy, p_residual, b_mean, b_rstd, b_weight, b_bias, r, last, o_q, m_q, H, W, Q,
                RESIDUAL, BORDER, RELU, UPSAMPLE_PAD, UP, LEFT, RIGHT, TOP, BOTTOM, SKIP, ZEROS, BLOCK_R,
            )  # fmt: skip
            b_sum_g += tl.sum(tl.where(m_x, b_g, 0.0), 0)
            b_sum_gx += tl.sum(tl.where(m_x, b_g * b_normalized, 0.0), 0)
            if d_residual is not None:
                store_upsample_pad(
                    d_residual + o_plane, b_g.to(d_residual.dtype.element_ty), o_r, m_r, o_q, m_q, r,
                    tl.minimum(r + BLOCK_R, last), H, W, Q, 1, BORDER, BORDER, BORDER, BORDER, 0, True,
                )  # fmt: skip
        p_partial = partial + tl.cast(i_u, tl.int64) * members * 2 * Q
        tl.store(p_partial + i_m * Q + o_q, b_sum_g, mask=m_q)
        tl.store(p_partial + (members + i_m) * Q + o_q, b_sum_gx, mask=m_q)
        b_all_g, b_all_gx, _ = _merged_sums(
            p_partial, sums, i_u, i_m, members, units, arrived + 2 * i_u, o_q, m_q, Q, SHARED, MERGE_Q, BLOCK_S
        )
        b_all_g *= inverse_count
        b_all_gx *= inverse_count
        for i in range(n_tiles):
            b_normalized, b_g, o_r, m_r, m_x, o_x = load_gradient(
                p_x, p_dy, p_residual, b_mean, b_rstd, b_weight, b_bias, first + (n_tiles - 1 - i) * BLOCK_R, last,
                o_q, m_q, H, W, Q,
                RESIDUAL, BORDER, RELU, UPSAMPLE_PAD, UP, LEFT, RIGHT, TOP, BOTTOM, SKIP, ZEROS, BLOCK_R,
            )  # fmt: skip
            b_rest = b_g - b_all_g[None, :] - b_normalized * b_all_gx[None, :]
            tl.store(p_dx + o_x, (b_weight * b_rstd)[None, :] * b_rest, mask=m_x)
