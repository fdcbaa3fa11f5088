"""Dense attention under any mask, in plain PyTorch: where no block-sparse kernel applies.

The whole (seq, seq) score matrix is built. Scores are computed in the inputs' dtype, the softmax in
at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def visible(
    visible_until: Tensor, position_ids: Tensor | None = None, window: int | None = None
) -> Tensor:
    """The mask itself, (batch, seq, seq) bool: may query i (dim 1) see key j (dim 2)?"""
    index = torch.arange(visible_until.shape[1], device=visible_until.device)
    seen = (index <= index[:, None]) & (index[:, None] < visible_until[:, None, :])
    if window is not None and position_ids is not None:
        positions = position_ids.long()  # a difference, or a window, may not fit in int32
        seen &= positions[:, :, None] - positions[:, None, :] < window
    return seen


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    *,
    softcap: float | None = None,
    softmax_scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention under any bool mask, (batch, q_len, kv_len); differentiable by autograd.

    Rows that see nothing (left padding) give zeros.
    """
    batch, num_heads, q_len, head_dim = q.shape
    scores, _ = masked_scores(q, k, seen, softcap, softmax_scale)  # (B, Hkv, G, q_len, kv_len)
    p, lse = _softmax(scores, sinks)
    out = p.to(v.dtype) @ v[:, :, None]
    out = out.reshape(batch, num_heads, q_len, head_dim)
    return seq_major(out), lse.reshape(batch, num_heads, q_len)


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    softcap: float | None = None,
    softmax_scale: float,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same under a mask (batch or 1, num_heads or 1, q_len, kv_len), bool or added to scores.

    Values may be of another width than q and k.

    Returns:
        out, and the weights (batch, num_heads, q_len, kv_len) of the values after dropout.
    """
    scores, _ = masked_scores(q, k, None, softcap, softmax_scale)
    if mask is not None:
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (k.shape[1], -1))
        hides = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if hides else scores + mask
    p, _ = _softmax(scores, sinks)
    p = functional.dropout(p.to(v.dtype), dropout)
    return (p @ v[:, :, None]).flatten(1, 2), p.flatten(1, 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights of (B, Hkv, G, q_len, kv_len) scores, and their natural-log normaliser."""
    lse = scores.logsumexp(dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, lse.shape[1], -1, 1).expand_as(lse))
    # exp(-inf - -inf) would be NaN where a row sees nothing.
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp(), lse


def masked_scores(
    q: Tensor, k: Tensor, seen: Tensor | None, softcap: float | None, softmax_scale: float
) -> tuple[Tensor, Tensor | float]:
    """Masked scores (B, Hkv, G, q_len, kv_len) and the derivative of the soft cap."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    scores = grouped @ k[:, :, None].mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * softmax_scale
    dcap: Tensor | float = 1.0
    if softcap is not None:
        t = torch.tanh(scores / softcap)
        scores, dcap = softcap * t, 1.0 - t * t
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return scores, dcap


def seq_major(x: Tensor) -> Tensor:
    """The same (B, H, N, D) values, stored as a contiguous (B, N, H, D) buffer."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
