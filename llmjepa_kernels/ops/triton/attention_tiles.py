"""What the attention kernels share: tiles of rows, products over the head dim, and the mask.

What belongs together travels as a NamedTuple. A tile of rows is a tuple of pieces of the head dim,
of one width or two, 80 = 64 + 16, so that no matrix product is padded.

Every Triton from 3.6 on compiles this: a tensor descriptor is an argument of its own, never inside
a tuple; what a function returns holds no None; a constant taken out of a tuple is made a constexpr
again before it shapes a tensor.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Strided(NamedTuple):
    """A (batch, heads, seq, head_dim) tensor with unit stride in head_dim."""

    pointer: tl.tensor
    stride_batch: tl.tensor
    stride_head: tl.tensor
    stride_seq: tl.constexpr


class HeadDim(NamedTuple):
    """How the head dim is held and multiplied; a constant of a compiled kernel."""

    size: int
    pieces: tuple[int, ...]  # widths that cover `size`, the first the widest
    precision: str  # of matrix products of float32: "ieee", "tf32x3" or "tf32"


class Scaling(NamedTuple):
    """Base-2 scores are ``scale q.k`` or, with a softcap, ``softcap tanh(scale q.k)``."""

    scale: tl.tensor
    softcap: tl.tensor  # or None


class Row(NamedTuple):
    """One row of the batch, of `seq_len` tokens that begin at `start` of the mask's vectors."""

    visible_until: tl.tensor
    position_ids: tl.tensor  # or None, where there is no window
    start: tl.tensor
    seq_len: tl.tensor
    window: tl.tensor


class Queries(NamedTuple):
    index: tl.tensor
    position: tl.tensor


class Keys(NamedTuple):
    index: tl.tensor
    position: tl.tensor
    num_queries: tl.tensor  # how many queries see each, itself the first


class Tiles(NamedTuple):
    """One list of mask tiles, at `indices`: the partial ones from `start`, the full from `full`."""

    indices: tl.tensor
    start: tl.tensor
    full: tl.tensor
    end: tl.tensor
    ragged: tl.tensor  # 1 if the last one is full but hangs over the end of the row


# --- Tiles of rows in memory ---------------------------------------------------------------------


@triton.jit
def _load_piece(
    x, b, h, row0, seq_len, ROWS: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr,
    CLAMP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    FIRST: tl.constexpr = D.pieces[0] * PIECE
    WIDTH: tl.constexpr = D.pieces[PIECE]
    if TMA:  # x is a tensor descriptor
        tile = x.load([b, h, row0, FIRST]).reshape(ROWS, WIDTH)
    else:
        rows = tl.arange(0, ROWS)
        if CLAMP:  # rows past the end repeat the last one; whoever uses them masks them
            rows = tl.minimum(rows, seq_len - 1 - row0)
        offs_d = FIRST + tl.arange(0, WIDTH)
        base = (
            x.pointer
            + b.to(tl.int64) * x.stride_batch
            + h.to(tl.int64) * x.stride_head
            + row0.to(tl.int64) * x.stride_seq
        )
        if ROWS * x.stride_seq >= 2**31:  # of many heads of many short rows, stored by position
            rows = rows.to(tl.int64)
        pointers = base + (rows[:, None] * x.stride_seq + offs_d[None, :])
        if D.size < FIRST + WIDTH:
            tile = tl.load(pointers, mask=offs_d[None, :] < D.size, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile  # [ROWS, WIDTH]


@triton.jit
def load_rows(
    x, b, h, row0, seq_len, ROWS: tl.constexpr, D: tl.constexpr, CLAMP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, head_dim] in pieces: the rows row0, row0 + 1, … of head h."""
    pieces = ()
    for PIECE in tl.static_range(len(D.pieces)):
        pieces += (_load_piece(x, b, h, row0, seq_len, ROWS, D, PIECE, CLAMP, TMA),)
    return pieces


@triton.jit
def store_rows(x, pieces, b, h, row0, seq_len, ROWS: tl.constexpr, D: tl.constexpr):
    """Stores [ROWS, head_dim] in pieces, but for the rows past the end."""
    rows = tl.arange(0, ROWS)
    exists = (rows < seq_len - row0)[:, None]
    base = (
        x.pointer
        + b.to(tl.int64) * x.stride_batch
        + h.to(tl.int64) * x.stride_head
        + row0.to(tl.int64) * x.stride_seq
    )
    pointers = base + rows.to(tl.int64)[:, None] * x.stride_seq
    for PIECE in tl.static_range(len(D.pieces)):
        offs_d = D.pieces[0] * PIECE + tl.arange(0, tl.constexpr(D.pieces[PIECE]))[None, :]
        tile = pieces[PIECE].to(x.pointer.dtype.element_ty)
        tl.store(pointers + offs_d, tile, exists & (offs_d < D.size))


# --- Arithmetic on pieces of the head dim --------------------------------------------------------


@triton.jit
def zeros(ROWS: tl.constexpr, D: tl.constexpr):
    """[ROWS, head_dim] in pieces, float32."""
    pieces = ()
    for PIECE in tl.static_range(len(D.pieces)):
        pieces += (tl.zeros([ROWS, tl.constexpr(D.pieces[PIECE])], tl.float32),)
    return pieces


@triton.jit
def dot_over_d(a, b, D: tl.constexpr):
    """a b^T, [rows of a, rows of b]: contracts the head dim."""
    dots = tl.dot(a[0], tl.trans(b[0]), input_precision=D.precision)
    for PIECE in tl.static_range(1, len(D.pieces)):
        dots = tl.dot(a[PIECE], tl.trans(b[PIECE]), acc=dots, input_precision=D.precision)
    return dots


@triton.jit
def accumulate(acc, weights, rows, D: tl.constexpr):
    """acc + weights @ rows: contracts the rows."""
    pieces = ()
    for PIECE in tl.static_range(len(D.pieces)):
        pieces += (tl.dot(weights, rows[PIECE], acc=acc[PIECE], input_precision=D.precision),)
    return pieces


@triton.jit
def add(a, b, D: tl.constexpr):
    """a + b."""
    pieces = ()
    for PIECE in tl.static_range(len(D.pieces)):
        pieces += (a[PIECE] + b[PIECE],)
    return pieces


@triton.jit
def rescale(acc, factor, D: tl.constexpr):
    """acc * factor."""
    pieces = ()
    for PIECE in tl.static_range(len(D.pieces)):
        pieces += (acc[PIECE] * factor,)
    return pieces


@triton.jit
def rescale_and_accumulate(acc, factor, weights, rows, D: tl.constexpr):
    """acc * factor + weights @ rows."""
    pieces = ()
    for PIECE in tl.static_range(len(D.pieces)):
        piece = acc[PIECE]
        if len(D.pieces) > 2 and len(D.pieces) > PIECE + 1:
            # Of three or more pieces, only the last is rescaled before its product: the registers
            # of a thread cannot hold all of them before and after at once.
            product = tl.dot(weights, rows[PIECE], input_precision=D.precision)
            piece = tl.fma(piece, tl.broadcast_to(factor, piece.shape), product)
        else:
            piece = tl.dot(weights, rows[PIECE], acc=piece * factor, input_precision=D.precision)
        pieces += (piece,)
    return pieces


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh(x), with PRECISE to the precision of float32."""
    e = 1.0 + tl.exp2(x * (2 * LOG2E))
    if not PRECISE:  # of a half: near zero the same would be off by the cap's share of float32
        y = tl.where(tl.abs(x) < 0.02, x - x * x * x * (1 / 3), 1.0 - 2.0 / e)
    else:  # the same cancels near zero (polynomial: Cephes, tanhf)
        y = 1.0 - tl.div_rn(2.0, e)
        z = x * x
        series = -5.70498872745e-3 * z + 2.06390887954e-2
        series = series * z - 5.37397155531e-2
        series = series * z + 1.33314422036e-1
        series = series * z - 3.33332819422e-1
        y = tl.where(tl.abs(x) < 0.625, x + x * z * series, y)
    return y


@triton.jit
def probabilities(dots, lse2, scaling, PRECISE: tl.constexpr):
    """p, and the derivative of the softcap at each score (1 without one)."""
    scores = dots * scaling.scale
    dcap = 1.0
    if scaling.softcap is not None:
        t = tanh(scores, PRECISE)
        scores, dcap = scaling.softcap * t, 1.0 - t * t
    return tl.exp2(scores - lse2), dcap


# --- The mask ------------------------------------------------------------------------------------


@triton.jit
def _positions(row, offs):
    positions = offs
    if row.position_ids is not None:
        pointers = row.position_ids + row.start + offs
        positions = tl.load(pointers, mask=offs < row.seq_len, other=0).to(tl.int32)
    return positions


@triton.jit
def load_queries(row, m0, BLOCK_M: tl.constexpr):
    """[BLOCK_M] queries."""
    offs_m = m0 + tl.arange(0, BLOCK_M)
    return Queries(offs_m, _positions(row, offs_m))


@triton.jit
def load_keys(row, n0, BLOCK_N: tl.constexpr):
    """[BLOCK_N] keys; those past the end nobody sees."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    pointers = row.visible_until + row.start + offs_n
    until = tl.load(pointers, mask=offs_n < row.seq_len, other=0)
    return Keys(offs_n, _positions(row, offs_n), tl.maximum(until - offs_n, 0).to(tl.uint32))


@triton.jit
def is_visible(queries, keys, row, KEYS_FIRST: tl.constexpr):
    """[BLOCK_M, BLOCK_N], or with KEYS_FIRST its transpose: which query sees which key."""
    Q: tl.constexpr = 0 if KEYS_FIRST else 1
    i, j = tl.expand_dims(queries.index, Q), tl.expand_dims(keys.index, 1 - Q)
    # j <= i < visible_until[j], as one unsigned comparison
    visible = (i - j).to(tl.uint32) < tl.expand_dims(keys.num_queries, 1 - Q)
    if row.position_ids is not None:
        distance = tl.expand_dims(queries.position, Q) - tl.expand_dims(keys.position, 1 - Q)
        visible = visible & (distance < row.window)
    return visible


@triton.jit
def tile_list(
    offsets, full_start, indices, b, block, max_tiles, num_blocks, seq_len,
    MASK_BLOCK: tl.constexpr, ALL_MASKED: tl.constexpr,
):  # fmt: skip
    """The list of one block; with ALL_MASKED, all of its tiles count as partial.

    A full tile that hangs over the end of the row can only be the last one; it joins the masked.
    """
    block += b * (num_blocks + 1)
    start, end = tl.load(offsets + block), tl.load(offsets + block + 1)
    full = tl.load(full_start + block)
    if ALL_MASKED:
        full = end
    indices += b.to(tl.int64) * max_tiles
    last = tl.load(indices + end - 1)
    ragged = ((end > full) & ((last + 1) * MASK_BLOCK > seq_len)).to(tl.int32)
    return Tiles(indices, start, full, end, ragged)


@triton.jit
def num_full(tiles, MASK_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Compute tiles of the full part of a list."""
    return (tiles.end - tiles.full - tiles.ragged) * (MASK_BLOCK // BLOCK)


@triton.jit
def tile_start(tiles, t, FULL: tl.constexpr, MASK_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """First row of the t-th compute tile of the full or of the masked part of a list."""
    PARTS: tl.constexpr = MASK_BLOCK // BLOCK
    if FULL:
        tile = tiles.full + t // PARTS
    else:
        tile = tiles.start + t // PARTS
        tile = tl.where(tile < tiles.full, tile, tiles.end - 1)
    return tl.load(tiles.indices + tile) * MASK_BLOCK + t % PARTS * BLOCK


@triton.jit
def num_masked_before(tiles, row_end, MASK_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """Compute tiles of the masked part of a list, without those that begin at row_end or later."""
    masked = (tiles.full - tiles.start + tiles.ragged) * (MASK_BLOCK // BLOCK)
    if MASK_BLOCK > BLOCK:
        last = tile_start(tiles, tl.maximum(masked - 1, 0), False, MASK_BLOCK, BLOCK)
        masked -= tl.maximum(last + BLOCK - row_end, 0) // BLOCK
    return masked


# --- Long lists in parts -------------------------------------------------------------------------
#
# The list of a block holds `group_size` products per tile, those of the heads of a group, and is
# cut into as many parts as it holds `part_size`, rounded up. Where each begins follows from the
# offsets of the lists alone: the parts of block n are places n + offset * group_size // part_size
# and on, of which the last may stay empty, and lie in memory from slot 2 * offset * group_size //
# part_size on, where they are more than one.


@triton.jit
def part_at(offsets, b, num_blocks, half, place, group_size, part_size):
    """(block, part) at a place, by bisection; `half`: the largest power of two below num_blocks.

    A search over a vector of blocks is one load, but what is reduced across a block of threads
    makes the loops that follow keep copies of their accumulators (Triton 3.6, sm_90).
    """
    offsets += b * (num_blocks + 1)
    block, step, before = 0, half, 0
    while step > 0:
        middle = tl.minimum(block + step, num_blocks)
        start = tl.load(offsets + middle).to(tl.int64) * group_size // part_size
        begun = (start + middle <= place) & (middle < num_blocks)
        block = tl.where(begun, middle, block)
        before = tl.where(begun, start.to(tl.int32), before)
        step = step // 2
    return block, place - before - block


@triton.jit
def list_parts(offsets, b, num_blocks, block, group_size, part_size):
    """(number of parts, slot of the first) of the list of a block."""
    offsets += b * (num_blocks + 1) + block
    start, end = tl.load(offsets).to(tl.int64), tl.load(offsets + 1).to(tl.int64)
    parts = tl.cdiv((end - start) * group_size, part_size)
    slot = 2 * start * group_size // part_size
    return parts.to(tl.int32), slot.to(tl.int32)
