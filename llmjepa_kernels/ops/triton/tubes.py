"""The Triton back end of tubes: the rows at the ends of their steps are read in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmjepa_kernels.ops.common import check_pairs
from llmjepa_kernels.ops.triton.loss import SUM_D, SUM_ROWS, check_dtype, row_strides

BLOCK_D = 1024


def tubes_forward(hidden: Tensor, tubes: Tensor) -> Tensor:
    """Both vectors of each tube, (batch, num_tubes, 2, hidden_size)."""
    check_dtype(hidden)
    check_pairs(tubes, hidden.shape[1], "tubes")
    shape = (*tubes.shape[:3], hidden.shape[2])
    vectors = hidden.new_empty(shape, dtype=torch.float32)
    if tubes.numel():
        batch, num_tubes = tubes.shape[:2]
        grid = (batch * num_tubes * 2, triton.cdiv(hidden.shape[2], BLOCK_D))
        _tubes_forward_kernel[grid](
            hidden,
            *row_strides(hidden),
            tubes.contiguous(),
            vectors,
            num_tubes * 2,
            hidden.shape[2],
            STEPS=tubes.shape[3],
            BLOCK_D=BLOCK_D,
            enable_fp_fusion=True,
        )
    return vectors


def tubes_backward(dvectors: Tensor, tubes: Tensor, seq: int, dtype: torch.dtype) -> Tensor:
    """dhidden (batch, seq, hidden_size), zero except at the tubes' rows."""
    hidden_size = dvectors.shape[-1]
    dhidden = dvectors.new_zeros(len(tubes), seq, hidden_size, dtype=dtype)
    if tubes.numel():
        # Many steps begin or end in the same row, as all of an example do at the ends of its path.
        # A stable sort brings them together, in their order.
        rows, slots = tubes.flatten(1).sort(dim=1, stable=True)
        num_slots = rows.shape[1]
        _tubes_backward_kernel[(rows.numel(), triton.cdiv(hidden_size, SUM_D))](
            dvectors,
            rows,
            slots,
            dhidden,
            num_slots,
            seq,
            hidden_size,
            SLOTS=num_slots // (2 * tubes.shape[1]),
            BLOCK_D=SUM_D,
            BLOCK_ROWS=SUM_ROWS,
            enable_fp_fusion=True,
        )
    return dhidden


@triton.jit(do_not_specialize=["num_vectors"])
def _tubes_forward_kernel(
    hidden, stride_batch, stride_seq, tubes, vectors, num_vectors, hidden_size,
    STEPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    hidden += index // num_vectors * stride_batch
    tubes += index * STEPS * 2
    vector = tl.zeros([BLOCK_D], tl.float32)
    for step in tl.static_range(STEPS):
        start = tl.load(tubes + step * 2)
        end = tl.load(tubes + step * 2 + 1)
        inside = offs_d < tl.where(start >= 0, hidden_size, 0)
        x = tl.load(hidden + tl.maximum(end, 0) * stride_seq + offs_d, mask=inside, other=0.0)
        y = tl.load(hidden + tl.maximum(start, 0) * stride_seq + offs_d, mask=inside, other=0.0)
        vector += x.to(tl.float32) - y.to(tl.float32)
    tl.store(vectors + index * hidden_size + offs_d, vector, mask=offs_d < hidden_size)


@triton.jit
def _row_at(rows, place, num_slots):
    """The row of the slot at `place` in their sorted order; -2 outside it."""
    return tl.load(rows + place, mask=(place >= 0) & (place < num_slots), other=-2)


@triton.jit(do_not_specialize=["num_slots", "seq_len"])
def _tubes_backward_kernel(
    dvectors, rows, slots, dhidden, num_slots, seq_len, hidden_size,
    SLOTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    # The first of the slots that name a row sums them all, some at once, and is the only one to
    # write.
    b = (tl.program_id(0) // num_slots).to(tl.int64)
    place = tl.program_id(0) % num_slots
    rows += b * num_slots
    slots += b * num_slots
    dvectors += b * (num_slots // SLOTS) * hidden_size
    row = _row_at(rows, place, num_slots)
    if (row >= 0) & (_row_at(rows, place - 1, num_slots) != row):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = offs_d < hidden_size
        gradient = tl.zeros([BLOCK_D], tl.float32)
        while _row_at(rows, place, num_slots) == row:
            places = place + tl.arange(0, BLOCK_ROWS)
            same = _row_at(rows, places, num_slots) == row
            slot = tl.load(slots + places, mask=same, other=0)
            offsets = (slot // SLOTS * hidden_size)[:, None] + offs_d
            dvector = tl.load(dvectors + offsets, mask=same[:, None] & inside[None, :], other=0.0)
            # A row gains it where it ends a step, and loses it where it starts one.
            gradient += tl.sum(tl.where((slot % 2 == 1)[:, None], dvector, -dvector), axis=0)
            place += BLOCK_ROWS
        out = dhidden + (b * seq_len + row) * hidden_size
        tl.store(out + offs_d, gradient.to(dhidden.dtype.element_ty), mask=inside)
