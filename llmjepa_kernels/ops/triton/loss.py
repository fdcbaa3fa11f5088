"""The Triton back end of the last-token loss: the rows of each pair are read once, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmjepa_kernels.ops.common import check_pairs, count_pairs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK_D = 1024
BLOCK_SLOTS = 64  # pair sides compared at once when looking for repeated indices
# The tile of a sum over the pairs that share a row: pairs and columns at once.
SUM_ROWS, SUM_D = 8, 256

EPS = tl.constexpr(1e-8)  # as torch.nn.functional.cosine_similarity


def distance_forward(
    hidden: Tensor, pairs: Tensor, *, metric: str, reduction: str
) -> tuple[Tensor, Tensor]:
    """The loss: (batch, num_pairs) or reduced; and what its backward needs (…, 3)."""
    check_dtype(hidden)
    check_pairs(pairs, hidden.shape[1])
    batch, num_pairs, _ = pairs.shape
    distance = hidden.new_empty(batch, num_pairs, dtype=torch.float32)
    stats = hidden.new_empty(batch, num_pairs, 3, dtype=torch.float32)
    if pairs.numel():
        _distance_forward_kernel[(batch * num_pairs,)](
            hidden,
            *row_strides(hidden),
            pairs.contiguous(),
            distance,
            stats,
            num_pairs,
            hidden.shape[2],
            METRIC=metric,
            BLOCK_D=BLOCK_D,
            enable_fp_fusion=True,
        )
    loss = distance if reduction == "none" else distance.sum()
    if reduction == "mean":
        loss = loss / count_pairs(pairs).clamp(min=1)
    return loss, stats


def distance_backward(
    ddistance: Tensor, hidden: Tensor, pairs: Tensor, stats: Tensor, *, metric: str
) -> Tensor:
    """dhidden (batch, seq, hidden_size), zero except at the pairs' rows."""
    check_dtype(hidden)
    batch, num_pairs, _ = pairs.shape
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    if pairs.numel():
        grid = (batch * num_pairs * 2, triton.cdiv(hidden.shape[2], SUM_D))
        _distance_backward_kernel[grid](
            ddistance,
            hidden,
            *row_strides(hidden),
            pairs.contiguous(),
            stats,
            dhidden,
            num_pairs,
            hidden.shape[1],
            hidden.shape[2],
            METRIC=metric,
            BLOCK_D=SUM_D,
            BLOCK_SLOTS=BLOCK_SLOTS,
            BLOCK_ROWS=SUM_ROWS,
            enable_fp_fusion=True,
        )
    return dhidden


def views_forward(hidden: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs' rows at length 1, (2, batch, num_pairs, hidden_size), and their squared norms."""
    check_dtype(hidden)
    check_pairs(pairs, hidden.shape[1])
    shape = (2, *pairs.shape[:2])
    views = hidden.new_empty(*shape, hidden.shape[2], dtype=torch.float32)
    squares = hidden.new_empty(shape, dtype=torch.float32)
    if pairs.numel():
        _views_forward_kernel[(pairs.numel(),)](
            hidden,
            *row_strides(hidden),
            pairs.contiguous(),
            views,
            squares,
            pairs.shape[0],
            pairs.shape[1],
            hidden.shape[2],
            BLOCK_D=BLOCK_D,
            enable_fp_fusion=True,
        )
    return views, squares


def views_backward(
    dviews: Tensor, hidden: Tensor, pairs: Tensor, views: Tensor, squares: Tensor
) -> Tensor:
    """dhidden (batch, seq, hidden_size), zero except at the pairs' rows."""
    check_dtype(hidden)
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    if pairs.numel():
        dots = torch.empty_like(squares)
        _views_dot_kernel[(pairs.numel(),)](
            dviews, views, dots, hidden.shape[2], BLOCK_D=BLOCK_D, enable_fp_fusion=True
        )
        grid = (pairs.numel(), triton.cdiv(hidden.shape[2], SUM_D))
        _views_backward_kernel[grid](
            dviews,
            views,
            squares,
            dots,
            pairs.contiguous(),
            dhidden,
            pairs.shape[0],
            pairs.shape[1],
            hidden.shape[1],
            hidden.shape[2],
            BLOCK_D=SUM_D,
            BLOCK_SLOTS=BLOCK_SLOTS,
            BLOCK_ROWS=SUM_ROWS,
            enable_fp_fusion=True,
        )
    return dhidden


def row_strides(hidden: Tensor) -> tuple[int, int]:
    """Of the batch and of the row; 0 where there is only one."""
    batch, seq, _ = hidden.shape
    return hidden.stride(0) if batch > 1 else 0, hidden.stride(1) if seq > 1 else 0


def check_dtype(hidden: Tensor) -> None:
    """Raises ValueError unless the kernels take the dtype of `hidden`."""
    if hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden must be float16, bfloat16 or float32 for impl='triton', got {hidden.dtype}"
        )


@triton.jit(do_not_specialize=["num_pairs"])
def _distance_forward_kernel(
    hidden, stride_batch, stride_seq, pairs, distance, stats, num_pairs, hidden_size,
    METRIC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    predictor = tl.load(pairs + pair * 2)
    target = tl.load(pairs + pair * 2 + 1)
    real = predictor >= 0
    base = hidden + pair // num_pairs * stride_batch
    x_row = base + tl.maximum(predictor, 0) * stride_seq
    y_row = base + tl.maximum(target, 0) * stride_seq

    xy = tl.zeros([BLOCK_D], tl.float32)
    xx = tl.zeros([BLOCK_D], tl.float32)
    yy = tl.zeros([BLOCK_D], tl.float32)
    for d0 in tl.range(0, hidden_size, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        inside = offs_d < tl.where(real, hidden_size, 0)
        x = tl.load(x_row + offs_d, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_row + offs_d, mask=inside, other=0.0).to(tl.float32)
        if METRIC == "cosine":
            xy += x * y
            xx += x * x
            yy += y * y
        else:
            xy += (x - y) * (x - y)

    first, second, third = tl.sum(xy), tl.sum(xx), tl.sum(yy)
    if METRIC == "cosine":
        norms = tl.maximum(tl.sqrt_rn(second), EPS) * tl.maximum(tl.sqrt_rn(third), EPS)
        value = 1.0 - tl.div_rn(first, norms)
    elif METRIC == "l2":
        value = tl.sqrt_rn(first)
    else:
        value = tl.div_rn(first, hidden_size * 1.0)
    tl.store(distance + pair, tl.where(real, value, 0.0))
    tl.store(stats + pair * 3, first)
    tl.store(stats + pair * 3 + 1, second)
    tl.store(stats + pair * 3 + 2, third)


@triton.jit
def _slot_indices(pairs, slots, num_slots):
    """The row that each (pair, side) slot refers to; -1 for padding and past the end."""
    predictor = tl.load(pairs + slots // 2 * 2, mask=slots < num_slots, other=-1)
    index = tl.load(pairs + slots, mask=slots < num_slots, other=-1)
    return tl.where(predictor >= 0, index, -1)


@triton.jit
def _occurrences(pairs, slot, index, num_slots, BLOCK_SLOTS: tl.constexpr):
    """How many slots before `slot` refer to the row `index`, and how many there are in all."""
    before = 0
    occurrences = 0
    for s0 in tl.range(0, num_slots, BLOCK_SLOTS):
        slots = s0 + tl.arange(0, BLOCK_SLOTS)
        same = _slot_indices(pairs, slots, num_slots) == index
        before += tl.sum((same & (slots < slot)).to(tl.int32))
        occurrences += tl.sum(same.to(tl.int32))
    return before, occurrences


@triton.jit
def _coefficients(stats, pair, side, real, hidden_size, METRIC: tl.constexpr):
    """The gradient of the distance by the row on one side is a * that row - c * the other row."""
    stats += pair * 3
    first = tl.load(stats, mask=real, other=0.0)
    if METRIC == "cosine":
        own_norm = tl.sqrt_rn(tl.load(stats + 1 + side, mask=real, other=0.0))
        own = tl.maximum(own_norm, EPS)
        other = tl.maximum(tl.sqrt_rn(tl.load(stats + 2 - side, mask=real, other=0.0)), EPS)
        c = tl.div_rn(1.0, own * other)
        # Below the clamp the norm is a constant; NaN is not.
        a = tl.where(own_norm <= EPS, 0.0, tl.div_rn(first * c, own * own))
    elif METRIC == "l2":
        c = tl.where(first == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(first)))
        a = c
    else:
        c = tl.zeros_like(first) + tl.div_rn(2.0, hidden_size * 1.0)
        a = c
    return a, c


@triton.jit(do_not_specialize=["num_pairs", "seq_len"])
def _distance_backward_kernel(
    ddistance, hidden, stride_batch, stride_seq, pairs, stats, dhidden, num_pairs, seq_len,
    hidden_size, METRIC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    # A row may occur in several pairs: the first slot that names it sums them all, some at once,
    # and is the only one to write. So it does in _views_backward_kernel.
    num_slots = num_pairs * 2
    b = (tl.program_id(0) // num_slots).to(tl.int64)
    slot = tl.program_id(0) % num_slots
    pairs += b * num_slots
    stats += b * num_pairs * 3
    ddistance += b * num_pairs
    index = _slot_indices(pairs, slot, num_slots)

    before, occurrences = _occurrences(pairs, slot, index, num_slots, BLOCK_SLOTS)
    if (index >= 0) & (before == 0):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = offs_d < hidden_size
        hidden += b * stride_batch
        own = tl.load(hidden + index * stride_seq + offs_d, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.zeros([BLOCK_D], tl.float32)
        while occurrences > 0:
            slots = slot + tl.arange(0, BLOCK_ROWS)
            same = _slot_indices(pairs, slots, num_slots) == index
            pair, side = slots // 2, slots % 2
            there = same[:, None] & inside[None, :]
            other_row = tl.load(pairs + pair * 2 + 1 - side, mask=same, other=0) * stride_seq
            other = tl.load(hidden + (other_row[:, None] + offs_d), mask=there, other=0.0)
            a, c = _coefficients(stats, pair, side, same, hidden_size, METRIC)
            weight = tl.load(ddistance + pair, mask=same, other=0.0)
            terms = (a[:, None] * own - c[:, None] * other.to(tl.float32)) * weight[:, None]
            gradient += tl.sum(tl.where(there, terms, 0.0), axis=0)
            occurrences -= tl.sum(same.to(tl.int32))
            slot += BLOCK_ROWS
        row = dhidden + (b * seq_len + index) * hidden_size
        tl.store(row + offs_d, gradient.to(dhidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "num_pairs"])
def _views_forward_kernel(
    hidden, stride_batch, stride_seq, pairs, views, squares, batch, num_pairs, hidden_size,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program order is that of `views`: all predictors, then all targets.
    view = tl.program_id(0).to(tl.int64)
    side, pair = view // (batch * num_pairs), view % (batch * num_pairs)
    index = tl.load(pairs + pair * 2 + side)
    row = hidden + pair // num_pairs * stride_batch + tl.maximum(index, 0) * stride_seq
    size = tl.where(index >= 0, hidden_size, 0)

    xx = tl.zeros([BLOCK_D], tl.float32)
    for d0 in tl.range(0, hidden_size, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(row + offs_d, mask=offs_d < size, other=0.0).to(tl.float32)
        xx += x * x
    square = tl.sum(xx)
    norm = tl.maximum(tl.sqrt_rn(square), EPS)
    for d0 in tl.range(0, hidden_size, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(row + offs_d, mask=offs_d < size, other=0.0).to(tl.float32)
        tl.store(views + view * hidden_size + offs_d, tl.div_rn(x, norm), mask=offs_d < hidden_size)
    tl.store(squares + view, square)


@triton.jit
def _views_dot_kernel(dviews, views, dots, hidden_size, BLOCK_D: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    row = view * hidden_size
    dot = tl.zeros([BLOCK_D], tl.float32)
    for d0 in tl.range(0, hidden_size, BLOCK_D):
        offs_d = d0 + tl.arange(0, BLOCK_D)
        inside = offs_d < hidden_size
        x = tl.load(views + row + offs_d, mask=inside, other=0.0)
        dot += x * tl.load(dviews + row + offs_d, mask=inside, other=0.0)
    tl.store(dots + view, tl.sum(dot))


@triton.jit(do_not_specialize=["batch", "num_pairs", "seq_len"])
def _views_backward_kernel(
    dviews, views, squares, dots, pairs, dhidden, batch, num_pairs, seq_len, hidden_size,
    BLOCK_D: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    num_slots = num_pairs * 2
    b = (tl.program_id(0) // num_slots).to(tl.int64)
    slot = tl.program_id(0) % num_slots
    pairs += b * num_slots
    index = _slot_indices(pairs, slot, num_slots)
    before, occurrences = _occurrences(pairs, slot, index, num_slots, BLOCK_SLOTS)

    if (index >= 0) & (before == 0):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = offs_d < hidden_size
        gradient = tl.zeros([BLOCK_D], tl.float32)
        while occurrences > 0:
            slots = slot + tl.arange(0, BLOCK_ROWS)
            same = _slot_indices(pairs, slots, num_slots) == index
            view = (slots % 2 * batch + b) * num_pairs + slots // 2
            norm = tl.sqrt_rn(tl.load(squares + view, mask=same, other=0.0))
            # Below the clamp the norm is a constant; NaN is not.
            along = tl.where(norm <= EPS, 0.0, tl.load(dots + view, mask=same, other=0.0))
            there = same[:, None] & inside[None, :]
            offsets = view[:, None] * hidden_size + offs_d
            x = tl.load(views + offsets, mask=there, other=0.0)
            dx = tl.load(dviews + offsets, mask=there, other=0.0)
            terms = tl.div_rn(dx - along[:, None] * x, tl.maximum(norm, EPS)[:, None])
            gradient += tl.sum(tl.where(there, terms, 0.0), axis=0)
            occurrences -= tl.sum(same.to(tl.int32))
            slot += BLOCK_ROWS
        row = dhidden + (b * seq_len + index) * hidden_size
        tl.store(row + offs_d, gradient.to(dhidden.dtype.element_ty), mask=inside)
