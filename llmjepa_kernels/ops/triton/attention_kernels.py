"""Device code of block-sparse attention: forward, row statistics, dK/dV and dQ.

A program walks one list of mask tiles that `BlockMask` prepared: first the partial tiles, whose
scores are masked, then the full ones, which carry no mask arithmetic at all. What belongs together
travels as a tuple:

    x        (pointer, stride_batch, stride_head, stride_seq) of a (batch, heads, seq, head_dim)
             tensor; with TMA, its tensor descriptors, one per piece of the head dim
    D        (head dim, widths of its pieces…): a tile is a tuple of pieces of the head dim, of one
             width or two, 80 = 64 + 16, so that no matrix product is padded
    scaling  (a, c): base-2 scores are a q.k, or c tanh(a q.k) where there is a softcap c
    row      (visible_until, position_ids, window, seq_len) of the row of the batch; position_ids
             is None where there is no window

Source: FlashAttention-2, arXiv:2307.08691, Algorithms 1 and 2; FlashMask, arXiv:2410.01359.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Integers that differ from one packing to the next: specialising on them would recompile.
PER_PACKING = ["num_rows", "seq_len", "padded_len", "max_tiles", "window"]


# --- Tiles of rows in memory ---------------------------------------------------------------------


@triton.jit
def _load_piece(
    x, b, h, row0, seq_len, ROWS: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr,
    CLAMP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, width]: one piece of rows row0, row0 + 1, … of one head."""
    FIRST: tl.constexpr = D[1] * PIECE
    SIZE: tl.constexpr = D[1 + PIECE]
    if TMA:
        # Pieces of one size share a descriptor.
        tile = x[0 if D[1] == SIZE else PIECE].load([b, h, row0, FIRST]).reshape(ROWS, SIZE)
    else:
        rows = tl.arange(0, ROWS)
        if CLAMP:  # rows past the end repeat the last one; whoever uses them masks them
            rows = tl.minimum(rows, seq_len - 1 - row0)
        offs_d = FIRST + tl.arange(0, SIZE)
        base = x[0] + b.to(tl.int64) * x[1] + h.to(tl.int64) * x[2] + row0.to(tl.int64) * x[3]
        pointers = base + (rows[:, None] * x[3] + offs_d[None, :])
        if D[0] < FIRST + SIZE:
            tile = tl.load(pointers, mask=offs_d[None, :] < D[0], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _load_rows(
    x, b, h, row0, seq_len, ROWS: tl.constexpr, D: tl.constexpr, CLAMP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    pieces = ()
    for PIECE in tl.static_range(len(D) - 1):
        pieces += (_load_piece(x, b, h, row0, seq_len, ROWS, D, PIECE, CLAMP, TMA),)
    return pieces


@triton.jit
def _store_rows(x, pieces, b, h, row0, seq_len, ROWS: tl.constexpr, D: tl.constexpr):
    rows = tl.arange(0, ROWS)
    exists = (rows < seq_len - row0)[:, None]
    base = x[0] + b.to(tl.int64) * x[1] + h.to(tl.int64) * x[2] + row0.to(tl.int64) * x[3]
    pointers = base + rows.to(tl.int64)[:, None] * x[3]
    for PIECE in tl.static_range(len(D) - 1):
        offs_d = D[1] * PIECE + tl.arange(0, D[1 + PIECE])[None, :]
        tile = pieces[PIECE].to(x[0].dtype.element_ty)
        tl.store(pointers + offs_d, tile, exists & (offs_d < D[0]))


# --- Arithmetic on pieces of the head dim --------------------------------------------------------


@triton.jit
def _zeros(ROWS: tl.constexpr, D: tl.constexpr):
    pieces = ()
    for PIECE in tl.static_range(len(D) - 1):
        pieces += (tl.zeros([ROWS, D[1 + PIECE]], tl.float32),)
    return pieces


@triton.jit
def _dot_over_d(a, b, D: tl.constexpr):
    """a b^T, [rows of a, rows of b]: contracts the head dim."""
    dots = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for PIECE in tl.static_range(1, len(D) - 1):
        dots = tl.dot(a[PIECE], tl.trans(b[PIECE]), acc=dots, input_precision="ieee")
    return dots


@triton.jit
def _accumulate(acc, weights, rows, D: tl.constexpr):
    """acc + weights @ rows: contracts the rows."""
    pieces = ()
    for PIECE in tl.static_range(len(D) - 1):
        pieces += (tl.dot(weights, rows[PIECE], acc=acc[PIECE], input_precision="ieee"),)
    return pieces


@triton.jit
def _rescale(acc, factor, D: tl.constexpr):
    pieces = ()
    for PIECE in tl.static_range(len(D) - 1):
        pieces += (acc[PIECE] * factor,)
    return pieces


@triton.jit
def _rescale_and_accumulate(acc, factor, weights, rows, D: tl.constexpr):
    """acc * factor + weights @ rows."""
    pieces = ()
    for PIECE in tl.static_range(len(D) - 1):
        piece = acc[PIECE]
        if len(D) > 3 and len(D) > PIECE + 2:
            # Of three or more pieces, only the last is rescaled before its product: the registers
            # of a thread cannot hold all of them before and after at once.
            product = tl.dot(weights, rows[PIECE], input_precision="ieee")
            piece = tl.fma(piece, tl.broadcast_to(factor, piece.shape), product)
        else:
            piece = tl.dot(weights, rows[PIECE], acc=piece * factor, input_precision="ieee")
        pieces += (piece,)
    return pieces


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    y = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2 * LOG2E)))
    if PRECISE:  # the line above cancels near zero (polynomial: Cephes, tanhf)
        z = x * x
        series = -5.70498872745e-3 * z + 2.06390887954e-2
        series = series * z - 5.37397155531e-2
        series = series * z + 1.33314422036e-1
        series = series * z - 3.33332819422e-1
        y = tl.where(tl.abs(x) < 0.625, x + x * z * series, y)
    return y


@triton.jit
def _probabilities(dots, lse2, scaling, PRECISE: tl.constexpr):
    """p, and the derivative of the softcap at each score (1 without one)."""
    scores = dots * scaling[0]
    dcap = 1.0
    if scaling[1] is not None:
        t = _tanh(scores, PRECISE)
        scores, dcap = scaling[1] * t, 1.0 - t * t
    return tl.exp2(scores - lse2), dcap


# --- The mask ------------------------------------------------------------------------------------


@triton.jit
def _row(visible_until, position_ids, window, seq_len, b):
    if position_ids is not None:
        position_ids += b.to(tl.int64) * seq_len
    return visible_until + b.to(tl.int64) * seq_len, position_ids, window, seq_len


@triton.jit
def _positions(row, offs):
    positions = offs
    if row[1] is not None:
        positions = tl.load(row[1] + offs, mask=offs < row[3], other=0).to(tl.int32)
    return positions


@triton.jit
def _queries(row, m0, BLOCK_M: tl.constexpr):
    """(indices, positions) of a tile of queries."""
    offs_m = m0 + tl.arange(0, BLOCK_M)
    return offs_m, _positions(row, offs_m)


@triton.jit
def _keys(row, n0, BLOCK_N: tl.constexpr):
    """(indices, positions, how many queries see each) of a tile of keys; past the end none do."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    until = tl.load(row[0] + offs_n, mask=offs_n < row[3], other=0)
    return offs_n, _positions(row, offs_n), tl.maximum(until - offs_n, 0).to(tl.uint32)


@triton.jit
def _visible(queries, keys, row, KEYS_FIRST: tl.constexpr):
    Q: tl.constexpr = 0 if KEYS_FIRST else 1
    i, j = tl.expand_dims(queries[0], Q), tl.expand_dims(keys[0], 1 - Q)
    # j <= i < visible_until[j], as one unsigned comparison
    visible = (i - j).to(tl.uint32) < tl.expand_dims(keys[2], 1 - Q)
    if row[1] is not None:
        distance = tl.expand_dims(queries[1], Q) - tl.expand_dims(keys[1], 1 - Q)
        visible = visible & (distance < row[2])
    return visible


@triton.jit
def _tile_list(
    offsets, full_start, indices, b, block, max_tiles, num_blocks, seq_len,
    MASK_BLOCK: tl.constexpr, ALL_MASKED: tl.constexpr,
):  # fmt: skip
    """(indices, start, full_start, end, 1 if the last tile is ragged) of one list.

    A full tile that hangs over the end of the row can only be the last one; it joins the masked.
    """
    block += b * num_blocks
    start, end = tl.load(offsets + block + b), tl.load(offsets + block + b + 1)
    full = tl.load(full_start + block)
    if ALL_MASKED:
        full = end
    indices += b.to(tl.int64) * max_tiles
    last = tl.load(indices + end - 1)
    ragged = ((end > full) & ((last + 1) * MASK_BLOCK > seq_len)).to(tl.int32)
    return indices, start, full, end, ragged


@triton.jit
def _num_masked(tiles, MASK_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    return (tiles[2] - tiles[1] + tiles[4]) * (MASK_BLOCK // BLOCK)


@triton.jit
def _num_full(tiles, MASK_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    return (tiles[3] - tiles[2] - tiles[4]) * (MASK_BLOCK // BLOCK)


@triton.jit
def _tile_start(tiles, t, FULL: tl.constexpr, MASK_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """First row of the t-th compute tile of the full or of the masked part of a list."""
    PARTS: tl.constexpr = MASK_BLOCK // BLOCK
    indices, start, full, end, _ = tiles
    if FULL:
        tile = full + t // PARTS
    else:
        tile = start + t // PARTS
        tile = tl.where(tile < full, tile, end - 1)
    return tl.load(indices + tile) * MASK_BLOCK + t % PARTS * BLOCK


@triton.jit
def _num_masked_keys(tiles, row_end, MASK_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Masked compute tiles of a tile of queries that ends at row_end, without those after it."""
    masked = _num_masked(tiles, MASK_N, BLOCK_N)
    if MASK_N > BLOCK_N:
        last = _tile_start(tiles, tl.maximum(masked - 1, 0), False, MASK_N, BLOCK_N)
        masked -= tl.maximum(last + BLOCK_N - row_end, 0) // BLOCK_N
    return masked


# --- Forward -------------------------------------------------------------------------------------


@triton.jit
def _online_softmax_tile(
    state, q_tile, queries, k, v, b, kv_head, n0, row, scaling,
    BLOCK_N: tl.constexpr, D: tl.constexpr, FOLD_SCALE: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    acc, m_i, l_i = state
    k_tile = _load_rows(k, b, kv_head, n0, row[3], BLOCK_N, D, MASKED, TMA)
    scores = _dot_over_d(q_tile, k_tile, D)  # [BLOCK_M, BLOCK_N]
    if scaling[1] is not None:
        scores = scaling[1] * _tanh(scores * scaling[0], q_tile[0].dtype == tl.float32)
    elif not FOLD_SCALE:
        scores = scores * scaling[0]
    if MASKED:
        visible = _visible(queries, _keys(row, n0, BLOCK_N), row, False)
        scores = tl.where(visible, scores, -float("inf"))

    m_new = tl.max(scores, 1)
    if FOLD_SCALE:  # one fused multiply-add per score: a positive scale commutes with the maximum
        m_new = m_new * scaling[0]
    m_new = tl.maximum(m_i, m_new)
    m_finite = m_new
    if MASKED:  # a query that has seen no key yet
        m_finite = tl.where(m_new == -float("inf"), 0.0, m_new)
    if FOLD_SCALE:
        p = tl.exp2(scores * scaling[0] - m_finite[:, None])
    else:
        p = tl.exp2(scores - m_finite[:, None])
    alpha = tl.exp2(m_i - m_finite)
    v_tile = _load_rows(v, b, kv_head, n0, row[3], BLOCK_N, D, MASKED, TMA)
    acc = _rescale_and_accumulate(acc, alpha[:, None], p.to(v_tile[0].dtype), v_tile, D)
    return acc, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit(do_not_specialize=PER_PACKING)
def _attention_forward_kernel(
    q, k, v, out, lse, visible_until, kv_offsets, kv_full_start, kv_indices, position_ids, sinks,
    num_rows, num_heads, group_size, seq_len, max_tiles, window, scaling,
    D: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALL_MASKED: tl.constexpr,
    FOLD_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest, so that a group shares K and V in L2; the last queries, which tend to
    # see most keys, start first.
    head = tl.program_id(0) % num_heads
    b = tl.program_id(0) // num_heads % num_rows
    m0 = (tl.cdiv(seq_len, BLOCK_M) - 1 - tl.program_id(0) // num_heads // num_rows) * BLOCK_M
    kv_head = head // group_size
    row = _row(visible_until, position_ids, window, seq_len, b)
    tiles = _tile_list(
        kv_offsets, kv_full_start, kv_indices, b, m0 // MASK_M, max_tiles,
        tl.cdiv(seq_len, MASK_M), seq_len, MASK_N, ALL_MASKED,
    )  # fmt: skip

    queries = _queries(row, m0, BLOCK_M)
    q_tile = _load_rows(q, b, head, m0, seq_len, BLOCK_M, D, True, TMA)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # a key with a score and no value
        m_i = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        l_i = tl.full([BLOCK_M], 1.0, tl.float32)
    state = _zeros(BLOCK_M, D), m_i, l_i

    masked = _num_masked_keys(tiles, tl.minimum(m0 + BLOCK_M, seq_len), MASK_N, BLOCK_N)
    for t in tl.range(0, masked):
        n0 = _tile_start(tiles, t, False, MASK_N, BLOCK_N)
        state = _online_softmax_tile(
            state, q_tile, queries, k, v, b, kv_head, n0, row, scaling,
            BLOCK_N, D, FOLD_SCALE, True, TMA,
        )  # fmt: skip
    for t in tl.range(0, _num_full(tiles, MASK_N, BLOCK_N)):
        n0 = _tile_start(tiles, t, True, MASK_N, BLOCK_N)
        state = _online_softmax_tile(
            state, q_tile, queries, k, v, b, kv_head, n0, row, scaling,
            BLOCK_N, D, FOLD_SCALE, False, TMA,
        )  # fmt: skip

    acc, m_i, l_i = state
    acc = _rescale(acc, 1.0 / l_i[:, None], D)
    _store_rows(out, acc, b, head, m0, seq_len, BLOCK_M, D)
    lse += (b * num_heads + head).to(tl.int64) * seq_len
    tl.store(lse + queries[0], (m_i + tl.log2(l_i)) * LN2, mask=queries[0] < seq_len)


# --- Backward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=PER_PACKING)
def _attention_row_statistics_kernel(
    out, dout, lse, lse2, delta, sinks, dsinks, num_rows, num_heads, seq_len, padded_len,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) and lse in base 2, both padded to where p comes out as 0."""
    head = tl.program_id(0) % num_heads
    b = tl.program_id(0) // num_heads % num_rows
    tile = tl.program_id(0) // num_heads // num_rows
    m0 = tile * BLOCK_M
    offs_m = m0 + tl.arange(0, BLOCK_M)
    exists = offs_m < seq_len
    plane = (b * num_heads + head).to(tl.int64)

    o = _load_rows(out, b, head, m0, seq_len, BLOCK_M, D, True, False)
    do = _load_rows(dout, b, head, m0, seq_len, BLOCK_M, D, True, False)
    row_delta = tl.zeros([BLOCK_M], tl.float32)
    for PIECE in tl.static_range(len(D) - 1):
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
    q_tile = _load_rows(q, b, head, m0, row[3], BLOCK_M, D, MASKED, TMA)
    dots = _dot_over_d(k_tile, q_tile, D)  # [BLOCK_N, BLOCK_M]
    queries = _queries(row, m0, BLOCK_M)
    if EAGER_DP:
        do_tile = _load_rows(dout, b, head, m0, row[3], BLOCK_M, D, MASKED, TMA)
        dp = _dot_over_d(v_tile, do_tile, D)
    row_lse2 = tl.load(lse2 + queries[0])
    p, dcap = _probabilities(dots, row_lse2[None, :], scaling, k_tile[0].dtype == tl.float32)
    if MASKED:
        p = tl.where(_visible(queries, keys, row, True), p, 0.0)
    if not EAGER_DP:
        do_tile = _load_rows(dout, b, head, m0, row[3], BLOCK_M, D, MASKED, TMA)
    if WANT_DV:
        dv_acc = _accumulate(dv_acc, p.to(do_tile[0].dtype), do_tile, D)
    if WANT_DK:
        if not EAGER_DP:
            dp = _dot_over_d(v_tile, do_tile, D)
        ds = p * (dp - tl.load(delta + queries[0])[None, :])
        if scaling[1] is not None:
            ds = ds * dcap
        dk_acc = _accumulate(dk_acc, ds.to(q_tile[0].dtype), q_tile, D)
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=PER_PACKING)
def _attention_dkdv_kernel(
    q, k, v, dout, lse2, delta, dk, dv, visible_until, q_offsets, q_full_start, q_indices,
    position_ids, num_rows, num_kv_heads, group_size, seq_len, padded_len, max_tiles, window,
    softmax_scale, scaling,
    D: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALL_MASKED: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, EAGER_DP: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) % num_kv_heads
    b = tl.program_id(0) // num_kv_heads % num_rows
    n0 = tl.program_id(0) // num_kv_heads // num_rows * BLOCK_N
    row = _row(visible_until, position_ids, window, seq_len, b)
    tiles = _tile_list(
        q_offsets, q_full_start, q_indices, b, n0 // MASK_N, max_tiles,
        tl.cdiv(seq_len, MASK_N), seq_len, MASK_M, ALL_MASKED,
    )  # fmt: skip

    keys = _keys(row, n0, BLOCK_N)
    k_tile = _load_rows(k, b, kv_head, n0, seq_len, BLOCK_N, D, True, TMA)
    v_tile = k_tile
    if WANT_DK:
        v_tile = _load_rows(v, b, kv_head, n0, seq_len, BLOCK_N, D, True, TMA)
    dk_acc = _zeros(BLOCK_N, D)
    dv_acc = _zeros(BLOCK_N, D)

    first = 0
    if MASK_M > BLOCK_M:  # the diagonal's mask tile may begin with queries before the first key
        first = tl.maximum(n0 - _tile_start(tiles, 0, False, MASK_M, BLOCK_M), 0) // BLOCK_M
    # One loop over the heads of the group and their tiles, so that loads are prefetched across
    # heads: `t` is the tile of the head that comes next.
    last = _num_masked(tiles, MASK_M, BLOCK_M)
    head = kv_head * group_size
    t = first
    for _ in tl.range(0, group_size * (last - first)):
        m0 = _tile_start(tiles, t, False, MASK_M, BLOCK_M)
        plane = (b * num_kv_heads * group_size + head).to(tl.int64) * padded_len
        dk_acc, dv_acc = _dkdv_tile(
            dk_acc, dv_acc, k_tile, v_tile, keys, q, dout, lse2 + plane, delta + plane,
            b, head, m0, row, scaling, BLOCK_M, D, WANT_DK, WANT_DV, True, TMA, EAGER_DP,
        )  # fmt: skip
        t += 1
        head = tl.where(t == last, head + 1, head)
        t = tl.where(t == last, first, t)
    last = _num_full(tiles, MASK_M, BLOCK_M)
    head = kv_head * group_size
    t = 0
    for _ in tl.range(0, group_size * last):
        m0 = _tile_start(tiles, t, True, MASK_M, BLOCK_M)
        plane = (b * num_kv_heads * group_size + head).to(tl.int64) * padded_len
        dk_acc, dv_acc = _dkdv_tile(
            dk_acc, dv_acc, k_tile, v_tile, keys, q, dout, lse2 + plane, delta + plane,
            b, head, m0, row, scaling, BLOCK_M, D, WANT_DK, WANT_DV, False, TMA, EAGER_DP,
        )  # fmt: skip
        t += 1
        head = tl.where(t == last, head + 1, head)
        t = tl.where(t == last, 0, t)

    if WANT_DV:
        _store_rows(dv, dv_acc, b, kv_head, n0, seq_len, BLOCK_N, D)
    if WANT_DK:
        _store_rows(dk, _rescale(dk_acc, softmax_scale, D), b, kv_head, n0, seq_len, BLOCK_N, D)


@triton.jit
def _dq_tile(
    dq_acc, q_tile, do_tile, row_lse2, row_delta, queries, k, v, b, kv_head, n0, row, scaling,
    BLOCK_N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    EAGER_DP: tl.constexpr,
):  # fmt: skip
    k_tile = _load_rows(k, b, kv_head, n0, row[3], BLOCK_N, D, MASKED, TMA)
    dots = _dot_over_d(q_tile, k_tile, D)  # [BLOCK_M, BLOCK_N]
    if EAGER_DP:
        v_tile = _load_rows(v, b, kv_head, n0, row[3], BLOCK_N, D, MASKED, TMA)
        dp = _dot_over_d(do_tile, v_tile, D)
    p, dcap = _probabilities(dots, row_lse2[:, None], scaling, q_tile[0].dtype == tl.float32)
    if MASKED:
        p = tl.where(_visible(queries, _keys(row, n0, BLOCK_N), row, False), p, 0.0)
    if not EAGER_DP:
        v_tile = _load_rows(v, b, kv_head, n0, row[3], BLOCK_N, D, MASKED, TMA)
        dp = _dot_over_d(do_tile, v_tile, D)
    ds = p * (dp - row_delta[:, None])
    if scaling[1] is not None:
        ds = ds * dcap
    return _accumulate(dq_acc, ds.to(k_tile[0].dtype), k_tile, D)


@triton.jit(do_not_specialize=PER_PACKING)
def _attention_dq_kernel(
    q, k, v, dout, lse2, delta, dq, visible_until, kv_offsets, kv_full_start, kv_indices,
    position_ids, num_rows, num_heads, group_size, seq_len, padded_len, max_tiles, window,
    softmax_scale, scaling,
    D: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr, ALL_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, EAGER_DP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    b = tl.program_id(0) // num_heads % num_rows
    m0 = (tl.cdiv(seq_len, BLOCK_M) - 1 - tl.program_id(0) // num_heads // num_rows) * BLOCK_M
    kv_head = head // group_size
    row = _row(visible_until, position_ids, window, seq_len, b)
    tiles = _tile_list(
        kv_offsets, kv_full_start, kv_indices, b, m0 // MASK_M, max_tiles,
        tl.cdiv(seq_len, MASK_M), seq_len, MASK_N, ALL_MASKED,
    )  # fmt: skip

    queries = _queries(row, m0, BLOCK_M)
    q_tile = _load_rows(q, b, head, m0, seq_len, BLOCK_M, D, True, TMA)
    do_tile = _load_rows(dout, b, head, m0, seq_len, BLOCK_M, D, True, TMA)
    plane = (b * num_heads + head).to(tl.int64) * padded_len
    row_lse2 = tl.load(lse2 + plane + queries[0])
    row_delta = tl.load(delta + plane + queries[0])
    dq_acc = _zeros(BLOCK_M, D)

    masked = _num_masked_keys(tiles, tl.minimum(m0 + BLOCK_M, seq_len), MASK_N, BLOCK_N)
    for t in tl.range(0, masked):
        n0 = _tile_start(tiles, t, False, MASK_N, BLOCK_N)
        dq_acc = _dq_tile(
            dq_acc, q_tile, do_tile, row_lse2, row_delta, queries, k, v, b, kv_head, n0, row,
            scaling, BLOCK_N, D, True, TMA, EAGER_DP,
        )  # fmt: skip
    for t in tl.range(0, _num_full(tiles, MASK_N, BLOCK_N)):
        n0 = _tile_start(tiles, t, True, MASK_N, BLOCK_N)
        dq_acc = _dq_tile(
            dq_acc, q_tile, do_tile, row_lse2, row_delta, queries, k, v, b, kv_head, n0, row,
            scaling, BLOCK_N, D, False, TMA, EAGER_DP,
        )  # fmt: skip

    _store_rows(dq, _rescale(dq_acc, softmax_scale, D), b, head, m0, seq_len, BLOCK_M, D)
