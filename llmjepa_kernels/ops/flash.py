"""The flash-attn back end of attention: the calls of a `FlashPlan`, merged by their log-sum-exp.

Each call attends from some queries to some of the keys that they see. With the log-sum-exp over
all of them and the final output, flash-attn's backward of one call gives its exact share of the
gradients (as in ring attention, arXiv:2310.01889), so shares just add up.
"""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from llmjepa_kernels.ops.common import AttentionOptions
from llmjepa_kernels.ops.flash_plan import FlashPlan, VarlenCall

MAX_SEQUENCES = 65535  # sequences are the second dimension of a CUDA grid


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: FlashPlan,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    kernels = check(q, plan, options.softmax_scale)
    batch = len(q)
    q, k, v = _by_token(q), _by_token(k), _by_token(v)
    attend = functools.partial(kernels.forward, k=k, v=v, **_scaling(options))
    causal, *further = _calls(plan, len(q), options.window)

    out, lse = attend(q, call=causal)
    if further:
        rows = _flat(plan.rows, len(q) // batch).long()
        merged, merged_lse = _unsigned_zero(out[rows].to(lse.dtype)), lse[:, rows]
        for call in further:
            slots = call.slots
            part, part_lse = attend(q[rows[slots]], call=call)
            before = merged_lse[:, slots]
            after = torch.logaddexp(before, part_lse)
            merged[slots] = merged[slots] * _weight(before, after) + part * _weight(part_lse, after)
            merged_lse[:, slots] = after
        out[rows], lse[:, rows] = merged.to(out.dtype), merged_lse
    if options.sinks is not None:
        after = torch.logaddexp(lse, options.sinks.to(lse.dtype)[:, None])
        out, lse = (out * _weight(lse, after)).to(out.dtype), after
    lse = lse.unflatten(1, (batch, -1)).transpose(0, 1).contiguous()
    return _by_row(out.contiguous(), batch), lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: FlashPlan,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    kernels = check(q, plan, options.softmax_scale)
    batch = len(q)
    dout, q, k, v, out = (_by_token(x) for x in (dout, q, k, v, out))
    lse = lse.transpose(0, 1).flatten(1).contiguous()
    causal, *further = _calls(plan, len(q), options.window)

    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    scaling = _scaling(options)
    kernels.backward(dout, q, k, v, out, lse, dq, dk, dv, call=causal, **scaling)
    if further:
        rows = _flat(plan.rows, len(q) // batch).long()
        merged = _unsigned_zero(dq[rows].to(lse.dtype))
        dk_part, dv_part = torch.empty_like(dk), torch.empty_like(dv)
        for call in further:
            queries = rows[call.slots]
            dq_part = dq.new_empty(len(queries), *dq.shape[1:])
            kernels.backward(
                *(dout[queries], q[queries], k, v, out[queries], lse.index_select(1, queries)),
                *(dq_part, dk_part, dv_part),
                call=call,
                **scaling,
            )
            merged[call.slots] = merged[call.slots] + dq_part
            # A key has queries in one of these calls at most: a wider accumulator gains nothing.
            dk += dk_part
            dv += dv_part
        dq[rows] = merged.to(dq.dtype)

    dsinks = None
    if options.sinks is not None:
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        dsinks = (
            -((options.sinks.to(lse.dtype) - lse.T).exp() * delta).sum(0).to(options.sinks.dtype)
        )
    return _by_row(dq, batch), _by_row(dk, batch), _by_row(dv, batch), dsinks


class _Scaling(TypedDict):
    softmax_scale: float
    softcap: float | None


def _scaling(options: AttentionOptions) -> _Scaling:
    return {"softmax_scale": options.softmax_scale, "softcap": options.softcap}


def _by_token(x: Tensor) -> Tensor:
    """(batch, heads, seq, head_dim) -> (batch * seq, heads, head_dim), a view where possible."""
    return x.transpose(1, 2).flatten(0, 1)


def _by_row(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _unsigned_zero(x: Tensor) -> Tensor:
    """x without -0.0, which adding nothing would turn into 0.0.

    What fills up a row in the lists of a plan is written back several times, merged with nothing or
    not: these must be the same bits.
    """
    return x + 0.0


def _weight(lse: Tensor, total: Tensor) -> Tensor:
    """(heads, tokens) each -> (tokens, heads, 1): the share of a part in the whole softmax."""
    return (lse - total).exp().T[..., None]


# From the rows of a plan to sequences laid end to end


@dataclass(frozen=True)
class _Call:
    cu_seqlens_q: Tensor  # (sequences + 1,) int32, like the next
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    slots: Tensor  # (queries,) int64, where they are in the plan's rows
    causal: bool
    window: int | None


def _calls(plan: FlashPlan, tokens: int, window: int | None) -> list[_Call]:
    """The calls to make: the causal one, and those of the others that have queries."""
    seq = tokens // len(plan.rows)

    def call(planned: VarlenCall, causal: bool, window: int | None) -> _Call:
        return _Call(
            # The end of a row and the start of the next are a sequence of nothing.
            _flat(planned.bounds[:, 0], planned.slots.shape[1] or seq),
            _flat(planned.bounds[:, 1], seq),
            planned.max_seqlen_q,
            planned.max_seqlen_k,
            _flat(planned.slots, plan.rows.shape[1]).long(),
            causal,
            window,
        )

    first, solitary, *levels = plan.calls
    calls = [call(first, True, window)]
    if solitary.slots.shape[1]:
        calls.append(call(solitary, True, 1))
    return calls + [call(level, False, None) for level in levels]


def _flat(index: Tensor, length: int) -> Tensor:
    """(batch, n) -> (batch * n,): indices into rows of a length, as indices into all rows."""
    if len(index) == 1:
        return index[0]
    row = torch.arange(len(index), dtype=index.dtype, device=index.device)
    return (index + row[:, None] * length).flatten()


# The kernels


def check(q: Tensor, plan: FlashPlan, softmax_scale: float) -> FlashAttention2 | FlashAttention3:
    """The kernels to run.

    Raises:
        ValueError: They do not take such inputs; says why.
        RuntimeError: There are none.
    """
    head_dim = q.shape[-1]
    if head_dim % 8 or head_dim > 256:
        raise ValueError(
            f"head_dim must be a multiple of 8 up to 256 for impl='flash', got {head_dim}"
        )
    if softmax_scale <= 0:
        raise ValueError(f"softmax_scale must be positive for impl='flash', got {softmax_scale}")
    sequences = max(len(call.bounds) * call.bounds.shape[2] for call in plan.calls)
    if sequences > MAX_SEQUENCES:
        raise ValueError(
            f"impl='flash' takes at most {MAX_SEQUENCES} sequences in a call, and "
            f"visible_until has {sequences}; use impl='triton'"
        )
    kernels = find_kernels(q.device, head_dim)
    if q.dtype not in kernels.dtypes:
        raise ValueError(f"q must be float16 or bfloat16 for impl='flash', got {q.dtype}")
    return kernels


@functools.cache
def find_kernels(device: torch.device, head_dim: int) -> FlashAttention2 | FlashAttention3:
    """The installed flash-attn: 3 on Hopper, else 2.

    Raises:
        RuntimeError: There is none, or `device` is no GPU.
    """
    if device.type != "cuda":
        raise RuntimeError(f"impl='flash' runs on CUDA GPUs, q is on {device}")
    # Version 3 has no deterministic backward of the largest head dimensions.
    if torch.cuda.get_device_capability(device) == (9, 0) and head_dim <= 192:
        try:
            importlib.import_module("flash_attn_3._C")  # registers the operators
        except ImportError:
            pass
        else:
            return FlashAttention3(torch.ops.flash_attn_3)
    try:
        return FlashAttention2(importlib.import_module("flash_attn.flash_attn_interface"))
    except ImportError as error:
        raise RuntimeError(
            "impl='flash' needs the flash-attn package: pip install 'llmjepa_kernels[flash]'"
        ) from error


class FlashAttention2:
    """flash-attn 2. Read in 2.8.0.post2 to 2.8.3.post2: interface, flash_api.cpp and kernels.

    out is (queries, heads, head_dim), lse (heads, queries) float32. A query without keys gets
    out 0, dq 0 and lse +inf, here turned into -inf; keys without queries get dk = dv = 0. Causal
    masks align the last query with the last key. Only `dq`, `dk` and `dv` are written to.
    """

    dtypes = (torch.float16, torch.bfloat16)

    def __init__(self, interface):
        self.interface = interface

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: _Call,
        *,
        softmax_scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        window_left, window_right = _window_sizes(call)
        out, lse, *_ = self.interface._flash_attn_varlen_forward(
            *(q, k, v, *_seqlens(call)),
            dropout_p=0.0,
            softmax_scale=softmax_scale,
            causal=call.causal,
            window_size_left=window_left,
            window_size_right=window_right,
            softcap=softcap or 0.0,
        )
        return out, lse.masked_fill_(lse == math.inf, -math.inf)

    def backward(
        self,
        *tensors: Tensor,  # dout, q, k, v, out, lse, dq, dk, dv
        call: _Call,
        softmax_scale: float,
        softcap: float | None,
    ) -> None:
        window_left, window_right = _window_sizes(call)
        self.interface._flash_attn_varlen_backward(
            *(*tensors, *_seqlens(call)),
            dropout_p=0.0,
            softmax_scale=softmax_scale,
            causal=call.causal,
            window_size_left=window_left,
            window_size_right=window_right,
            softcap=softcap or 0.0,
            alibi_slopes=None,
            deterministic=True,
        )


class FlashAttention3:
    """flash-attn 3, by its operators, whose arguments outlast those of its Python functions.

    Read in flash-attention's hopper/ at 3.0.0b1 and at the move to the stable ABI of PyTorch.
    Like version 2, but a query without keys gets lse -inf itself.
    """

    dtypes = FlashAttention2.dtypes

    def __init__(self, operators):
        self.operators = operators

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: _Call,
        *,
        softmax_scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = _seqlens(call)
        window_left, window_right = _window_sizes(call)
        out, lse, *_ = self.operators.fwd(
            *(q, k, v),
            *(None, None, None, None),  # k_new, v_new, q_v, out
            *(cu_seqlens_q, cu_seqlens_k, None),  # cu_seqlens_k_new
            *(None, None),  # seqused_q, seqused_k
            *(max_seqlen_q, max_seqlen_k),
            *(None, None, None),  # page_table, kv_batch_idx, leftpad_k
            *(None, None, None),  # rotary_cos, rotary_sin, seqlens_rotary
            *(None, None, None),  # q_descale, k_descale, v_descale
            softmax_scale,
            call.causal,
            window_size_left=window_left,
            window_size_right=window_right,
            softcap=softcap or 0.0,
            num_splits=1,
        )
        return out, lse

    def backward(
        self,
        *tensors: Tensor,  # dout, q, k, v, out, lse, dq, dk, dv
        call: _Call,
        softmax_scale: float,
        softcap: float | None,
    ) -> None:
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = _seqlens(call)
        window_left, window_right = _window_sizes(call)
        self.operators.bwd(
            *tensors,
            *(cu_seqlens_q, cu_seqlens_k),
            *(None, None),  # seqused_q, seqused_k
            *(max_seqlen_q, max_seqlen_k),
            softmax_scale,
            call.causal,
            window_size_left=window_left,
            window_size_right=window_right,
            softcap=softcap or 0.0,
            deterministic=True,
        )


def _seqlens(call: _Call) -> tuple[Tensor, Tensor, int, int]:
    # At a maximum of 1, version 2 takes it that every sequence has one query, none being empty
    # (Dao-AILab/flash-attention#1537). The maximum only bounds the grid.
    return call.cu_seqlens_q, call.cu_seqlens_k, max(call.max_seqlen_q, 2), call.max_seqlen_k


def _window_sizes(call: _Call) -> tuple[int, int]:
    return (-1, -1) if call.window is None else (call.window - 1, 0)
