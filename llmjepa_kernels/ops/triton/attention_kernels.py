"""Device code of block-sparse attention: forward, row statistics, dK/dV and dQ.

A program walks one list of mask tiles that `BlockMask` prepared: first the partial tiles, whose
scores are masked, then the full ones, which carry no mask arithmetic at all.

Source: FlashAttention-2, arXiv:2307.08691, Algorithms 1 and 2; FlashMask, arXiv:2410.01359.
"""

import triton
import triton.language as tl

from llmjepa_kernels.ops.triton.attention_tiles import (
    LN2,
    LOG2E,
    Row,
    Scaling,
    accumulate,
    add,
    dot_over_d,
    is_visible,
    list_parts,
    load_keys,
    load_queries,
    load_rows,
    num_full,
    num_masked_before,
    part_at,
    probabilities,
    rescale,
    rescale_and_accumulate,
    store_rows,
    tanh,
    tile_list,
    tile_start,
    zeros,
)

# Integers that differ from one packing to the next: specialising on them would recompile.
PER_PACKING = [
    "num_rows", "seq_len", "padded_len", "max_tiles", "window", "part_size",
    "half",
]  # fmt: skip
# Of a few rows of a batch, these begin at any multiple of 4 bytes.
MASKS = [
    "visible_until", "kv_offsets", "kv_full_start", "kv_indices", "q_offsets", "q_full_start",
    "q_indices", "position_ids",
]  # fmt: skip


# --- Forward -------------------------------------------------------------------------------------


@triton.jit
def _online_softmax_tile(
    state, q_tile, queries, k, v, b, kv_head, n0, row, scaling,
    BLOCK_N: tl.constexpr, D: tl.constexpr, FOLD_SCALE: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """(acc, m_i, l_i) after the keys n0, n0 + 1, …"""
    acc, m_i, l_i = state
    # [BLOCK_N, head_dim]
    k_tile = load_rows(k, b, kv_head, n0, row.seq_len, BLOCK_N, D, MASKED, TMA)
    scores = dot_over_d(q_tile, k_tile, D)  # [BLOCK_M, BLOCK_N]
    if scaling.softcap is not None:
        scores = scaling.softcap * tanh(scores * scaling.scale, q_tile[0].dtype == tl.float32)
    elif not FOLD_SCALE:
        scores = scores * scaling.scale
    if MASKED:
        visible = is_visible(queries, load_keys(row, n0, BLOCK_N), row, False)
        scores = tl.where(visible, scores, -float("inf"))

    m_new = tl.max(scores, 1)
    if FOLD_SCALE:  # one fused multiply-add per score: a positive scale commutes with the maximum
        m_new = m_new * scaling.scale
    m_new = tl.maximum(m_i, m_new)
    m_finite = m_new
    if MASKED:  # a query that has seen no key yet
        m_finite = tl.where(m_new == -float("inf"), 0.0, m_new)
    if FOLD_SCALE:
        p = tl.exp2(scores * scaling.scale - m_finite[:, None])
    else:
        p = tl.exp2(scores - m_finite[:, None])
    alpha = tl.exp2(m_i - m_finite)
    # [BLOCK_N, head_dim]
    v_tile = load_rows(v, b, kv_head, n0, row.seq_len, BLOCK_N, D, MASKED, TMA)
    acc = rescale_and_accumulate(acc, alpha[:, None], p.to(v_tile[0].dtype), v_tile, D)
    return acc, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit(do_not_specialize=PER_PACKING, do_not_specialize_on_alignment=MASKS)
def _attention_forward_kernel(
    q, k, v, out, lse, visible_until, kv_offsets, kv_full_start, kv_indices, position_ids, sinks,
    num_rows, num_heads, group_size, seq_len, max_tiles, window, scale, softcap,
    D: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALL_MASKED: tl.constexpr,
    FOLD_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out and the natural-log lse of BLOCK_M queries of one head.

    q, k and v are Strided or, with TMA, tensor descriptors. Source: arXiv:2307.08691, Algorithm 1.
    """
    # Heads vary fastest, so that a group shares K and V in L2; the last queries, which tend to
    # see most keys, start first.
    head = tl.program_id(0) % num_heads
    b = tl.program_id(0) // num_heads % num_rows
    m0 = (tl.cdiv(seq_len, BLOCK_M) - 1 - tl.program_id(0) // num_heads // num_rows) * BLOCK_M
    kv_head = head // group_size
    row = Row(visible_until, position_ids, b.to(tl.int64) * seq_len, seq_len, window)
    scaling = Scaling(scale, softcap)
    tiles = tile_list(
        kv_offsets, kv_full_start, kv_indices, b, m0 // MASK_M, max_tiles,
        tl.cdiv(seq_len, MASK_M), seq_len, MASK_N, ALL_MASKED,
    )  # fmt: skip

    queries = load_queries(row, m0, BLOCK_M)
    # [BLOCK_M, head_dim]
    q_tile = load_rows(q, b, head, m0, seq_len, BLOCK_M, D, True, TMA)
    # [BLOCK_M]
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # a key with a score and no value
        m_i = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        l_i = tl.full([BLOCK_M], 1.0, tl.float32)
    state = zeros(BLOCK_M, D), m_i, l_i

    masked = num_masked_before(tiles, tl.minimum(m0 + BLOCK_M, seq_len), MASK_N, BLOCK_N)
    for t in tl.range(0, masked):
        n0 = tile_start(tiles, t, False, MASK_N, BLOCK_N)
        state = _online_softmax_tile(
            state, q_tile, queries, k, v, b, kv_head, n0, row, scaling,
            BLOCK_N, D, FOLD_SCALE, True, TMA,
        )  # fmt: skip
    for t in tl.range(0, num_full(tiles, MASK_N, BLOCK_N)):
        n0 = tile_start(tiles, t, True, MASK_N, BLOCK_N)
        state = _online_softmax_tile(
            state, q_tile, queries, k, v, b, kv_head, n0, row, scaling,
            BLOCK_N, D, FOLD_SCALE, False, TMA,
        )  # fmt: skip

    acc, m_i, l_i = state
    acc = rescale(acc, tl.div_rn(1.0, l_i)[:, None], D)
    store_rows(out, acc, b, head, m0, seq_len, BLOCK_M, D)
    lse += (b * num_heads + head).to(tl.int64) * seq_len
    tl.store(lse + queries.index, (m_i + tl.log2(l_i)) * LN2, mask=queries.index < seq_len)


# --- Backward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=PER_PACKING, do_not_specialize_on_alignment=MASKS)
def _attention_row_statistics_kernel(
    out, dout, lse, lse2, delta, sinks, dsinks, num_rows, num_heads, seq_len, padded_len,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) and lse in base 2, both padded to where p comes out as 0.

    With sinks, also BLOCK_M queries' part of the gradient of their head's sink.
    """
    head = tl.program_id(0) % num_heads
    b = tl.program_id(0) // num_heads % num_rows
    tile = tl.program_id(0) // num_heads // num_rows
    m0 = tile * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    exists = offs_m < seq_len
    plane = (b * num_heads + head).to(tl.int64)

    # [BLOCK_M, head_dim]; a tile of padding repeats the last row, and uses none of it
    row0 = tl.minimum(m0, seq_len - 1)
    o = load_rows(out, b, head, row0, seq_len, BLOCK_M, D, True, False)
    do = load_rows(dout, b, head, row0, seq_len, BLOCK_M, D, True, False)
    # [BLOCK_M]
    row_delta = tl.zeros([BLOCK_M], tl.float32)
    for PIECE in tl.static_range(len(D.pieces)):
        row_delta += tl.sum(o[PIECE].to(tl.float32) * do[PIECE].to(tl.float32), 1)
    row_delta = tl.where(exists, row_delta, 0.0)
    row_lse2 = tl.load(lse + plane * seq_len + offs_m, mask=exists, other=float("inf")) * LOG2E
    tl.store(lse2 + plane * padded_len + offs_m, row_lse2)
    tl.store(delta + plane * padded_len + offs_m, row_delta)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        partial = -tl.sum(tl.exp2(sink - row_lse2) * row_delta)
        tl.store(dsinks + plane * (padded_len // BLOCK_M) + tile, partial)


@triton.jit
def _dkdv_tile(
    dk_acc, dv_acc, k_tile, v_tile, keys, q, dout, lse2, delta, b, head, m0, row, scaling,
    BLOCK_M: tl.constexpr, D: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, EAGER_DP: tl.constexpr,
):  # fmt: skip
    """(dk_acc, dv_acc) after the queries m0, m0 + 1, … of one head."""
    # [BLOCK_M, head_dim]
    q_tile = load_rows(q, b, head, m0, row.seq_len, BLOCK_M, D, MASKED, TMA)
    dots = dot_over_d(k_tile, q_tile, D)  # [BLOCK_N, BLOCK_M]
    queries = load_queries(row, m0, BLOCK_M)
    if EAGER_DP:
        do_tile = load_rows(dout, b, head, m0, row.seq_len, BLOCK_M, D, MASKED, TMA)
        dp = dot_over_d(v_tile, do_tile, D)
    row_lse2 = tl.load(lse2 + queries.index)  # [BLOCK_M]
    p, dcap = probabilities(dots, row_lse2[None, :], scaling, k_tile[0].dtype == tl.float32)
    if MASKED:
        p = tl.where(is_visible(queries, keys, row, True), p, 0.0)
    if not EAGER_DP:
        do_tile = load_rows(dout, b, head, m0, row.seq_len, BLOCK_M, D, MASKED, TMA)
    if WANT_DV:
        dv_acc = accumulate(dv_acc, p.to(do_tile[0].dtype), do_tile, D)
    if WANT_DK:
        if not EAGER_DP:
            dp = dot_over_d(v_tile, do_tile, D)
        ds = p * (dp - tl.load(delta + queries.index)[None, :])
        if scaling.softcap is not None:
            ds = ds * dcap
        dk_acc = accumulate(dk_acc, ds.to(q_tile[0].dtype), q_tile, D)
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=PER_PACKING, do_not_specialize_on_alignment=MASKS)
def _attention_dkdv_kernel(
    q, k, v, dout, lse2, delta, dk, dv, dk_parts, dv_parts, visible_until, q_offsets,
    q_full_start, q_indices, position_ids, num_rows, num_heads, group_size, part_size, half,
    seq_len, padded_len, max_tiles, window, softmax_scale, scale, softcap,
    D: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALL_MASKED: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, EAGER_DP: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys, or a part of their sum, from the query heads that share them.

    Keys that many queries see, those of a shared prefix, would keep one program busy long after
    all others: their list is cut into parts, which `_attention_sum_parts_kernel` adds up. Source:
    arXiv:2307.08691, Algorithm 2, the loop over queries inside; of the cut, arXiv:2301.03598.
    """
    num_kv_heads = num_heads // group_size
    kv_head = tl.program_id(0) % num_kv_heads
    b = tl.program_id(0) // num_kv_heads % num_rows
    place = tl.program_id(0) // num_kv_heads // num_rows
    num_blocks = tl.cdiv(seq_len, MASK_N)
    block, part = part_at(
        q_offsets, b, num_blocks, half, place // (MASK_N // BLOCK_N), group_size, part_size
    )  # fmt: skip
    parts, slot = list_parts(q_offsets, b, num_blocks, block, group_size, part_size)
    n0 = block * MASK_N + place % (MASK_N // BLOCK_N) * BLOCK_N
    if (part >= parts) | (n0 >= seq_len):
        return
    row = Row(visible_until, position_ids, b.to(tl.int64) * seq_len, seq_len, window)
    scaling = Scaling(scale, softcap)
    tiles = tile_list(
        q_offsets, q_full_start, q_indices, b, block, max_tiles, num_blocks, seq_len, MASK_M,
        ALL_MASKED,
    )  # fmt: skip

    keys = load_keys(row, n0, BLOCK_N)
    # [BLOCK_N, head_dim]
    k_tile = load_rows(k, b, kv_head, n0, seq_len, BLOCK_N, D, True, TMA)
    v_tile = k_tile
    if WANT_DK:
        v_tile = load_rows(v, b, kv_head, n0, seq_len, BLOCK_N, D, True, TMA)
    dk_acc = zeros(BLOCK_N, D)
    dv_acc = zeros(BLOCK_N, D)

    first = 0
    if MASK_M > BLOCK_M:  # the diagonal's mask tile may begin with queries before the first key
        first = tl.maximum(n0 - tile_start(tiles, 0, False, MASK_M, BLOCK_M), 0) // BLOCK_M
    # One loop over the heads and their tiles, so that loads are prefetched across heads: `t` is
    # the tile of the head that comes next.
    last = num_masked_before(tiles, seq_len, MASK_M, BLOCK_M)
    masked = group_size * (last - first)
    total = masked + group_size * num_full(tiles, MASK_M, BLOCK_M)
    low, high = part * total // parts, (part + 1) * total // parts
    done = tl.minimum(low, masked)
    head = kv_head * group_size + done // tl.maximum(last - first, 1)
    t = first + done % tl.maximum(last - first, 1)
    for _ in tl.range(0, tl.minimum(high, masked) - done):
        m0 = tile_start(tiles, t, False, MASK_M, BLOCK_M)
        plane = (b * num_heads + head).to(tl.int64) * padded_len
        dk_acc, dv_acc = _dkdv_tile(
            dk_acc, dv_acc, k_tile, v_tile, keys, q, dout, lse2 + plane, delta + plane,
            b, head, m0, row, scaling, BLOCK_M, D, WANT_DK, WANT_DV, True, TMA, EAGER_DP,
        )  # fmt: skip
        t += 1
        head = tl.where(t == last, head + 1, head)
        t = tl.where(t == last, first, t)
    last = num_full(tiles, MASK_M, BLOCK_M)
    done = tl.maximum(low - masked, 0)
    head = kv_head * group_size + done // tl.maximum(last, 1)
    t = done % tl.maximum(last, 1)
    for _ in tl.range(0, tl.maximum(high - masked, 0) - done):
        m0 = tile_start(tiles, t, True, MASK_M, BLOCK_M)
        plane = (b * num_heads + head).to(tl.int64) * padded_len
        dk_acc, dv_acc = _dkdv_tile(
            dk_acc, dv_acc, k_tile, v_tile, keys, q, dout, lse2 + plane, delta + plane,
            b, head, m0, row, scaling, BLOCK_M, D, WANT_DK, WANT_DV, False, TMA, EAGER_DP,
        )  # fmt: skip
        t += 1
        head = tl.where(t == last, head + 1, head)
        t = tl.where(t == last, 0, t)

    if WANT_DK:
        dk_acc = rescale(dk_acc, softmax_scale, D)
    kv_plane, row0 = b * num_kv_heads + kv_head, n0 - block * MASK_N
    if parts == 1:
        if WANT_DV:
            store_rows(dv, dv_acc, b, kv_head, n0, seq_len, BLOCK_N, D)
        if WANT_DK:
            store_rows(dk, dk_acc, b, kv_head, n0, seq_len, BLOCK_N, D)
    else:
        if WANT_DV:
            store_rows(dv_parts, dv_acc, kv_plane, slot + part, row0, MASK_N, BLOCK_N, D)
        if WANT_DK:
            store_rows(dk_parts, dk_acc, kv_plane, slot + part, row0, MASK_N, BLOCK_N, D)


@triton.jit(do_not_specialize=PER_PACKING, do_not_specialize_on_alignment=MASKS)
def _attention_sum_parts_kernel(
    dk, dv, dk_parts, dv_parts, q_offsets, num_rows, num_kv_heads, group_size, part_size, seq_len,
    D: tl.constexpr, MASK_N: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys whose list is in parts, added in their order."""
    kv_head = tl.program_id(0) % num_kv_heads
    b = tl.program_id(0) // num_kv_heads % num_rows
    n0 = tl.program_id(0) // num_kv_heads // num_rows * BLOCK_N
    block = n0 // MASK_N
    parts, slot = list_parts(
        q_offsets, b, tl.cdiv(seq_len, MASK_N), block, group_size, part_size
    )  # fmt: skip
    if parts == 1:
        return
    kv_plane, row0 = b * num_kv_heads + kv_head, n0 - block * MASK_N
    if WANT_DV:
        dv_sum = _sum_of_parts(dv_parts, kv_plane, slot, parts, row0, MASK_N, BLOCK_N, D)
        store_rows(dv, dv_sum, b, kv_head, n0, seq_len, BLOCK_N, D)
    if WANT_DK:
        dk_sum = _sum_of_parts(dk_parts, kv_plane, slot, parts, row0, MASK_N, BLOCK_N, D)
        store_rows(dk, dk_sum, b, kv_head, n0, seq_len, BLOCK_N, D)


@triton.jit
def _sum_of_parts(
    x, plane, slot, parts, row0, MASK_N: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    total = zeros(BLOCK_N, D)
    for i in tl.range(0, parts):
        tile = load_rows(x, plane, slot + i, row0, MASK_N, BLOCK_N, D, False, False)
        total = add(total, tile, D)
    return total


@triton.jit
def _dq_tile(
    dq_acc, q_tile, do_tile, row_lse2, row_delta, queries, k, v, b, kv_head, n0, row, scaling,
    BLOCK_N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    EAGER_DP: tl.constexpr,
):  # fmt: skip
    """dq_acc after the keys n0, n0 + 1, …"""
    # [BLOCK_N, head_dim]
    k_tile = load_rows(k, b, kv_head, n0, row.seq_len, BLOCK_N, D, MASKED, TMA)
    dots = dot_over_d(q_tile, k_tile, D)  # [BLOCK_M, BLOCK_N]
    if EAGER_DP:
        v_tile = load_rows(v, b, kv_head, n0, row.seq_len, BLOCK_N, D, MASKED, TMA)
        dp = dot_over_d(do_tile, v_tile, D)
    p, dcap = probabilities(dots, row_lse2[:, None], scaling, q_tile[0].dtype == tl.float32)
    if MASKED:
        p = tl.where(is_visible(queries, load_keys(row, n0, BLOCK_N), row, False), p, 0.0)
    if not EAGER_DP:
        v_tile = load_rows(v, b, kv_head, n0, row.seq_len, BLOCK_N, D, MASKED, TMA)
        dp = dot_over_d(do_tile, v_tile, D)
    ds = p * (dp - row_delta[:, None])
    if scaling.softcap is not None:
        ds = ds * dcap
    return accumulate(dq_acc, ds.to(k_tile[0].dtype), k_tile, D)


@triton.jit(do_not_specialize=PER_PACKING, do_not_specialize_on_alignment=MASKS)
def _attention_dq_kernel(
    q, k, v, dout, lse2, delta, dq, visible_until, kv_offsets, kv_full_start, kv_indices,
    position_ids, num_rows, num_heads, group_size, seq_len, padded_len, max_tiles, window,
    softmax_scale, scale, softcap,
    D: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALL_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, EAGER_DP: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head.

    Source: arXiv:2307.08691, Algorithm 2, the loop over keys inside.
    """
    head = tl.program_id(0) % num_heads
    b = tl.program_id(0) // num_heads % num_rows
    m0 = (tl.cdiv(seq_len, BLOCK_M) - 1 - tl.program_id(0) // num_heads // num_rows) * BLOCK_M
    kv_head = head // group_size
    row = Row(visible_until, position_ids, b.to(tl.int64) * seq_len, seq_len, window)
    scaling = Scaling(scale, softcap)
    tiles = tile_list(
        kv_offsets, kv_full_start, kv_indices, b, m0 // MASK_M, max_tiles,
        tl.cdiv(seq_len, MASK_M), seq_len, MASK_N, ALL_MASKED,
    )  # fmt: skip

    queries = load_queries(row, m0, BLOCK_M)
    # [BLOCK_M, head_dim]
    q_tile = load_rows(q, b, head, m0, seq_len, BLOCK_M, D, True, TMA)
    do_tile = load_rows(dout, b, head, m0, seq_len, BLOCK_M, D, True, TMA)
    plane = (b * num_heads + head).to(tl.int64) * padded_len
    # [BLOCK_M]
    row_lse2 = tl.load(lse2 + plane + queries.index)
    row_delta = tl.load(delta + plane + queries.index)
    dq_acc = zeros(BLOCK_M, D)

    masked = num_masked_before(tiles, tl.minimum(m0 + BLOCK_M, seq_len), MASK_N, BLOCK_N)
    for t in tl.range(0, masked):
        n0 = tile_start(tiles, t, False, MASK_N, BLOCK_N)
        dq_acc = _dq_tile(
            dq_acc, q_tile, do_tile, row_lse2, row_delta, queries, k, v, b, kv_head, n0, row,
            scaling, BLOCK_N, D, True, TMA, EAGER_DP,
        )  # fmt: skip
    for t in tl.range(0, num_full(tiles, MASK_N, BLOCK_N)):
        n0 = tile_start(tiles, t, True, MASK_N, BLOCK_N)
        dq_acc = _dq_tile(
            dq_acc, q_tile, do_tile, row_lse2, row_delta, queries, k, v, b, kv_head, n0, row,
            scaling, BLOCK_N, D, False, TMA, EAGER_DP,
        )  # fmt: skip

    store_rows(dq, rescale(dq_acc, softmax_scale, D), b, head, m0, seq_len, BLOCK_M, D)
