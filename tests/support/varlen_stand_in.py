"""flash-attn's variable-length functions in plain PyTorch, on any device and in any dtype.

Signatures are those of

- `_flash_attn_varlen_forward` and `_flash_attn_varlen_backward` of flash_attn_interface.py in
  flash-attn 2.8.0.post2 to 2.8.3.post2: names, order and defaults;
- the operators `fwd` and `bwd` of flash_attn_3, as TORCH_LIBRARY of flash_api.cpp in hopper/ at
  3.0.0b1 and flash_api_stable.cpp later define them; there `max_seqlen_q` to `v_descale` and
  `softmax_scale` have defaults in some versions, so calls must give them all.

Conventions are those of the kernels: layouts; causal masks and windows aligned to the last query
and key; a query without keys has out 0, dq 0 and lse inf in version 2 (softmax.h,
flash_fwd_kernel.h) but -inf in 3; keys without queries have dk = dv = 0 (flash_bwd_kernel.h and
store_zero of the epilogue in 3); gradients are of all keys in a sequence and of no others; what
version 2 makes of a maximal query length of 1 (mha_varlen_fwd). What they leave unwritten is NaN
here.
"""

import math

import torch

from llmjepa_kernels.ops.dense import dense_attention, masked_scores
from llmjepa_kernels.ops.flash import FlashAttention2, FlashAttention3

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FlashAttention2StandIn(FlashAttention2):
    """Version 2 over this module; counts its calls."""

    dtypes = DTYPES

    def __init__(self):
        super().__init__(self)
        self.calls = []

    def _flash_attn_varlen_forward(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
        zero_tensors=False,
    ):
        assert dropout_p == 0.0
        assert alibi_slopes is block_table is leftpad_k is seqused_k is None
        self.calls.append("forward")
        empty_rows_as_one_query(q, k, cu_seqlens_q, max_seqlen_q)
        sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        mask = (causal, window_size_left, window_size_right)
        out, lse = forward(q, k, v, sequences, mask, softmax_scale, softcap, math.inf)
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        self,
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
        zero_tensors=False,
    ):
        assert dropout_p == 0.0
        assert alibi_slopes is None
        assert deterministic
        self.calls.append("backward")
        sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        mask = (causal, window_size_left, window_size_right)
        tensors = (dout, q, k, v, out, softmax_lse, dq, dk, dv)
        backward(*tensors, sequences, mask, softmax_scale, softcap)


class FlashAttention3StandIn(FlashAttention3):
    """Version 3 over this module; counts its calls."""

    dtypes = DTYPES

    def __init__(self):
        super().__init__(self)
        self.calls = []

    def fwd(
        self,
        q,
        k,
        v,
        k_new,
        v_new,
        q_v,
        out,
        cu_seqlens_q,
        cu_seqlens_k,
        cu_seqlens_k_new,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        page_table,
        kv_batch_idx,
        leftpad_k,
        rotary_cos,
        rotary_sin,
        seqlens_rotary,
        q_descale,
        k_descale,
        v_descale,
        softmax_scale,
        is_causal,
        window_size_left=-1,
        window_size_right=-1,
        attention_chunk=0,
        softcap=0.0,
        is_rotary_interleaved=False,
        scheduler_metadata=None,
        num_splits=0,
        pack_gqa=None,
        sm_margin=0,
    ):
        assert k_new is v_new is q_v is out is cu_seqlens_k_new is seqused_q is seqused_k is None
        assert page_table is kv_batch_idx is leftpad_k is q_descale is k_descale is v_descale
        assert rotary_cos is rotary_sin is seqlens_rotary is page_table is None
        assert num_splits == 1  # else a heuristic decides, and with it the rounding
        self.calls.append("forward")
        sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        mask = (is_causal, window_size_left, window_size_right)
        out, lse = forward(q, k, v, sequences, mask, softmax_scale, softcap, -math.inf)
        return out, lse, None, None

    def bwd(
        self,
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        is_causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        assert seqused_q is seqused_k is None
        assert deterministic
        self.calls.append("backward")
        sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        mask = (is_causal, window_size_left, window_size_right)
        tensors = (dout, q, k, v, out, softmax_lse, dq, dk, dv)
        backward(*tensors, sequences, mask, softmax_scale, softcap)
        return (None,) * 8


class Sequences:
    """The (queries, keys) slices of a call; checks what the kernels take for granted."""

    def __init__(self, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
            assert cu_seqlens.dtype == torch.int32
            assert cu_seqlens.is_contiguous()
            assert cu_seqlens[0] == 0
            assert 0 <= cu_seqlens.diff().min() <= cu_seqlens.diff().max() <= longest
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        self.slices = [
            (slice(*q[s : s + 2]), slice(*k[s : s + 2])) for s in range(len(cu_seqlens_q) - 1)
        ]


def empty_rows_as_one_query(q, k, cu_seqlens_q, max_seqlen_q):
    """Version 2 reshapes q by the number of sequences where it expects one query in each."""
    if max_seqlen_q == 1 and q.shape[1] > k.shape[1] and len(q) != len(cu_seqlens_q) - 1:
        raise RuntimeError(f"shape [{len(cu_seqlens_q) - 1}, ...] is invalid for {len(q)} queries")


def forward(q, k, v, sequences, mask, softmax_scale, softcap, empty_lse):
    out = torch.full_like(q, math.nan)  # strides as q's, too
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((q.shape[1], len(q)), math.nan, dtype=lse_dtype, device=q.device)
    for i, j in sequences.slices:
        out[i], lse[:, i] = 0.0, empty_lse
        if i.start < i.stop and j.start < j.stop:
            part, part_lse = dense_attention(
                *(by_head(x) for x in (q[i], k[j], v[j])),
                visible(i, j, mask, q.device),
                softcap=softcap or None,
                softmax_scale=softmax_scale,
            )
            out[i], lse[:, i] = part[0].transpose(0, 1), part_lse[0]
    return out, lse


def backward(dout, q, k, v, out, lse, dq, dk, dv, sequences, mask, softmax_scale, softcap):
    assert lse.is_contiguous()  # the kernels take no strides of it
    for x in (dq, dk, dv):
        x.fill_(math.nan)
    for i, j in sequences.slices:
        dq[i], dk[j], dv[j] = 0.0, 0.0, 0.0
        if i.start == i.stop or j.start == j.stop:
            continue
        seen = visible(i, j, mask, q.device)
        scores, dcap = masked_scores(
            by_head(q[i]), by_head(k[j]), seen, softcap or None, softmax_scale
        )
        grouped = scores.shape[1:3]  # kv heads, query heads of each
        p = (scores[0] - lse[:, i].unflatten(0, grouped)[..., None]).exp()
        dout_i, out_i, q_i = (by_head(x[i])[0].unflatten(0, grouped) for x in (dout, out, q))
        k_j, v_j = by_head(k[j])[0][:, None], by_head(v[j])[0][:, None]
        delta = (dout_i.to(p.dtype) * out_i.to(p.dtype)).sum(-1, keepdim=True)
        ds = p * ((dout_i @ v_j.mT).to(p.dtype) - delta) * softmax_scale
        ds = (ds if softcap == 0.0 else ds * dcap[0]).to(q.dtype)
        dq[i] = (ds @ k_j).flatten(0, 1).transpose(0, 1)
        dk[j] = (ds.flatten(1, 2).mT @ q_i.flatten(1, 2)).transpose(0, 1)
        dv[j] = (p.to(q.dtype).flatten(1, 2).mT @ dout_i.flatten(1, 2)).transpose(0, 1)


def by_head(x):
    """(tokens, heads, head_dim) -> (1, heads, tokens, head_dim)"""
    return x.transpose(0, 1)[None]


def visible(i, j, mask, device):
    """(1, queries, keys) bool; the last query stands at the last key."""
    causal, left, right = mask
    num_q, num_k = i.stop - i.start, j.stop - j.start
    distance = (torch.arange(num_q, device=device)[:, None] + num_k - num_q) - torch.arange(
        num_k, device=device
    )
    seen = torch.ones(num_q, num_k, dtype=torch.bool, device=device)
    if causal:
        right = 0
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    return seen[None]
