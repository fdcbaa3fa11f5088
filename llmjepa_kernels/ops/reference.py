"""Both operations in plain PyTorch: the oracle of the tests, on any device, in any dtype.

Nothing here is fast: attention builds the whole (seq, seq) score matrix. Scores are computed in
the inputs' dtype, the softmax in at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmjepa_kernels.ops.block_mask import BlockMask
from llmjepa_kernels.ops.common import check_pairs, count_pairs

COSINE_EPS = 1e-8  # as torch.nn.functional.cosine_similarity


def visible(
    visible_until: Tensor, position_ids: Tensor | None = None, window: int | None = None
) -> Tensor:
    """The mask itself, (batch, seq, seq) bool: may query i (dim 1) see key j (dim 2)?"""
    index = torch.arange(visible_until.shape[1], device=visible_until.device)
    seen = (index <= index[:, None]) & (index[:, None] < visible_until[:, None, :])
    if window is not None:
        seen &= position_ids[:, :, None] - position_ids[:, None, :] < window
    return seen


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    position_ids: Tensor | None,
    window: int | None,
    softcap: float | None,
    softmax_scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (batch, num_heads, seq, head_dim) and the natural-log lse (batch, num_heads, seq)."""
    seen = visible(mask.visible_until, position_ids, window)
    return dense_attention(q, k, v, seen, softcap=softcap, softmax_scale=softmax_scale, sinks=sinks)


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
    scores, _ = _scores(q, k, seen, softcap, softmax_scale)  # (B, Hkv, G, q_len, kv_len)
    lse = scores.logsumexp(dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, k.shape[1], -1, 1).expand_as(lse))
    # exp(-inf - -inf) would be NaN where a row sees nothing.
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = p.to(v.dtype) @ v[:, :, None]
    out = out.reshape(batch, num_heads, q_len, head_dim)
    return _seq_major(out), lse.reshape(batch, num_heads, q_len)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    *,
    position_ids: Tensor | None,
    window: int | None,
    softcap: float | None,
    softmax_scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dsinks (None without sinks). Source: arXiv:2307.08691, Algorithm 2."""
    batch, num_heads, seq, head_dim = q.shape
    grouped = (batch, k.shape[1], -1, seq, head_dim)
    seen = visible(mask.visible_until, position_ids, window)
    scores, dcap = _scores(q, k, seen, softcap, softmax_scale)
    lse = lse.reshape(batch, k.shape[1], -1, seq)
    p = (scores - lse[..., None]).exp()
    dout, out, q = dout.reshape(grouped), out.reshape(grouped), q.reshape(grouped)

    delta = (dout.to(p.dtype) * out.to(p.dtype)).sum(dim=-1)
    dp = (dout @ v[:, :, None].mT).to(p.dtype)
    ds = p * (dp - delta[..., None]) * dcap * softmax_scale
    ds, p = ds.to(q.dtype), p.to(q.dtype)
    dq = (ds @ k[:, :, None]).reshape(batch, num_heads, seq, head_dim)
    # Queries of a group are summed inside one matrix product, in its accumulation precision.
    dk = ds.flatten(2, 3).mT @ q.flatten(2, 3)
    dv = p.flatten(2, 3).mT @ dout.flatten(2, 3)
    dsinks = None
    if sinks is not None:
        share = (sinks.to(lse.dtype).view(1, k.shape[1], -1, 1) - lse).exp()
        dsinks = -(share * delta).sum(dim=(0, 3)).flatten().to(sinks.dtype)
    return _seq_major(dq), _seq_major(dk), _seq_major(dv), dsinks


def _scores(
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


def _seq_major(x: Tensor) -> Tensor:
    """The same (B, H, N, D) values, stored as a contiguous (B, N, H, D) buffer."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def distance_forward(
    hidden: Tensor, pairs: Tensor, *, metric: str, reduction: str
) -> tuple[Tensor, Tensor]:
    """The loss: (batch, num_pairs) or reduced; and what its backward needs (…, 3)."""
    check_pairs(pairs, hidden.shape[1])
    x, y, valid = _pair_rows(hidden, pairs)
    stats = torch.zeros(*valid.shape, 3, dtype=x.dtype, device=x.device)
    if metric == "cosine":
        dot, xx, yy = (x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)
        stats[..., 0], stats[..., 1], stats[..., 2] = dot, xx, yy
        distance = 1 - dot / (xx.sqrt().clamp(min=COSINE_EPS) * yy.sqrt().clamp(min=COSINE_EPS))
    else:
        squares = ((x - y) ** 2).sum(-1)
        stats[..., 0] = squares
        distance = squares.sqrt() if metric == "l2" else squares / hidden.shape[-1]
    loss = distance.masked_fill(~valid, 0.0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / count_pairs(pairs).clamp(min=1)
    return loss, stats.masked_fill(~valid[..., None], 0.0)


def distance_backward(
    ddistance: Tensor, hidden: Tensor, pairs: Tensor, stats: Tensor, *, metric: str
) -> Tensor:
    """dhidden (batch, seq, hidden_size), zero except at the pairs' rows."""
    x, y, valid = _pair_rows(hidden, pairs)
    scale = ddistance.masked_fill(~valid, 0.0)[..., None]
    if metric == "cosine":
        dot, xx, yy = stats.unbind(-1)
        nx, ny = xx.sqrt().clamp(min=COSINE_EPS), yy.sqrt().clamp(min=COSINE_EPS)
        # Below the clamp the norm is a constant.
        cx = torch.where(xx.sqrt() > COSINE_EPS, dot / (nx**3 * ny), 0.0)[..., None]
        cy = torch.where(yy.sqrt() > COSINE_EPS, dot / (ny**3 * nx), 0.0)[..., None]
        cross = (1 / (nx * ny))[..., None]
        dx, dy = (cx * x - cross * y) * scale, (cy * y - cross * x) * scale
    elif metric == "l2":
        norm = stats[..., :1].sqrt()
        dx = torch.where(norm == 0, 0.0, (x - y) / norm) * scale
        dy = -dx
    else:
        dx = 2 / hidden.shape[-1] * (x - y) * scale
        dy = -dx

    return _scatter(dx, dy, hidden, pairs)


def views_forward(hidden: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs' rows at length 1, (2, batch, num_pairs, hidden_size), and their squared norms."""
    check_pairs(pairs, hidden.shape[1])
    x, y, valid = _pair_rows(hidden, pairs)
    views = torch.stack([x, y]).masked_fill(~valid[..., None], 0.0)
    squares = (views * views).sum(-1)
    return views / squares.sqrt().clamp(min=COSINE_EPS)[..., None], squares


def views_backward(
    dviews: Tensor, hidden: Tensor, pairs: Tensor, views: Tensor, squares: Tensor
) -> Tensor:
    """dhidden (batch, seq, hidden_size), zero except at the pairs' rows."""
    norm = squares.sqrt()[..., None]
    along = torch.where(norm > COSINE_EPS, (views * dviews).sum(-1, keepdim=True), 0.0)
    dx, dy = (dviews - along * views) / norm.clamp(min=COSINE_EPS)
    return _scatter(dx, dy, hidden, pairs)


def _pair_rows(hidden: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predictor and target rows (batch, num_pairs, hidden_size) and which pairs are real."""
    rows = torch.arange(len(pairs), device=pairs.device)[:, None]
    index = pairs.clamp(min=0)
    gathered = hidden[rows, index[..., 0]], hidden[rows, index[..., 1]]
    x, y = (g.to(torch.promote_types(g.dtype, torch.float32)) for g in gathered)
    return x, y, pairs[..., 0] >= 0


def _scatter(dx: Tensor, dy: Tensor, hidden: Tensor, pairs: Tensor) -> Tensor:
    """dhidden from the gradients of the predictors' and the targets' rows."""
    dhidden = torch.zeros_like(hidden, dtype=dx.dtype, memory_format=torch.contiguous_format)
    index = pairs.clamp(min=0)[..., None].expand(*pairs.shape, hidden.shape[-1])
    padding = (pairs[..., 0] < 0)[..., None]
    dhidden.scatter_add_(1, index[:, :, 0], dx.masked_fill(padding, 0.0))
    dhidden.scatter_add_(1, index[:, :, 1], dy.masked_fill(padding, 0.0))
    return dhidden.to(hidden.dtype)
