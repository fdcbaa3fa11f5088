"""The operations in plain PyTorch: the oracle of the tests, on any device, in any dtype.

Nothing here is fast: attention builds the whole (seq, seq) score matrix. Scores are computed in
the inputs' dtype, the softmax in at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmjepa_kernels.ops.block_mask import BlockMask, check_visible_until
from llmjepa_kernels.ops.common import AttentionOptions, check_pairs, compute_dtype, count_pairs
from llmjepa_kernels.ops.dense import dense_attention, masked_scores, seq_major, visible

COSINE_EPS = 1e-8  # as torch.nn.functional.cosine_similarity


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """out (batch, num_heads, seq, head_dim) and the natural-log lse (batch, num_heads, seq)."""
    check_visible_until(mask.visible_until)
    seen = visible(mask.visible_until, options.position_ids, options.window)
    with torch.autocast(q.device.type, enabled=False):
        return dense_attention(
            q,
            k,
            v,
            seen,
            softcap=options.softcap,
            softmax_scale=options.softmax_scale,
            sinks=options.sinks,
        )


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dsinks (None without sinks). Source: arXiv:2307.08691, Algorithm 2."""
    seen = visible(mask.visible_until, options.position_ids, options.window)
    with torch.autocast(q.device.type, enabled=False):
        batch, num_heads, seq, head_dim = q.shape
        grouped = (batch, k.shape[1], -1, seq, head_dim)
        scores, dcap = masked_scores(q, k, seen, options.softcap, options.softmax_scale)
        lse = lse.reshape(batch, k.shape[1], -1, seq)
        p = (scores - lse[..., None]).exp()
        dout, out, q = dout.reshape(grouped), out.reshape(grouped), q.reshape(grouped)

        # What is hidden may overflow where what is seen does not.
        hidden = ~seen[:, None, None]
        dp = (dout @ v[:, :, None].mT).to(p.dtype).masked_fill(hidden, 0.0)
        # In low precision, out and dp are rounded apart: they would not cancel in a peaked softmax.
        delta = (dout * out if out.dtype == p.dtype else p * dp).sum(dim=-1)
        ds = p * (dp - delta[..., None]) * dcap * options.softmax_scale
        ds = ds.masked_fill(hidden, 0.0)
        ds, p = ds.to(q.dtype), p.to(q.dtype)
        dq = (ds @ k[:, :, None]).reshape(batch, num_heads, seq, head_dim)
        # Queries of a group are summed inside one matrix product, in its accumulation precision.
        dk = ds.flatten(2, 3).mT @ q.flatten(2, 3)
        dv = p.flatten(2, 3).mT @ dout.flatten(2, 3)
        dsinks = None
        if (sinks := options.sinks) is not None:
            share = (sinks.to(lse.dtype).view(1, k.shape[1], -1, 1) - lse).exp()
            dsinks = -(share * delta).sum(dim=(0, 3)).flatten().to(sinks.dtype)
    return seq_major(dq), seq_major(dk), seq_major(dv), dsinks


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
        cx = torch.where(xx.sqrt() > COSINE_EPS, dot / (nx * ny) / xx, 0.0)[..., None]
        cy = torch.where(yy.sqrt() > COSINE_EPS, dot / (nx * ny) / yy, 0.0)[..., None]
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


def tubes_forward(hidden: Tensor, tubes: Tensor) -> Tensor:
    """Both vectors of each tube, (batch, num_tubes, 2, hidden_size)."""
    check_pairs(tubes, hidden.shape[1], "tubes")
    batch = torch.arange(len(tubes), device=tubes.device).view(-1, 1, 1, 1, 1)
    ends = hidden[batch, tubes.clamp(min=0)].to(compute_dtype(hidden))
    steps = ends[..., 1, :] - ends[..., 0, :]
    return steps.masked_fill(tubes[..., :1] < 0, 0.0).sum(dim=3)


def tubes_backward(dvectors: Tensor, tubes: Tensor, seq: int, dtype: torch.dtype) -> Tensor:
    """dhidden (batch, seq, hidden_size), zero except at the tubes' rows."""
    dhidden = dvectors.new_zeros(len(tubes), seq, dvectors.shape[-1])
    signed = torch.stack([-dvectors, dvectors], dim=3)[:, :, :, None].expand(*tubes.shape, -1)
    signed = signed.masked_fill(tubes[..., None] < 0, 0.0).flatten(1, 4)
    index = tubes.clamp(min=0).flatten(1)[..., None].expand_as(signed)
    return dhidden.scatter_add_(1, index, signed).to(dtype)


def _pair_rows(hidden: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predictor and target rows (batch, num_pairs, hidden_size) and which pairs are real."""
    rows = torch.arange(len(pairs), device=pairs.device)[:, None]
    index = pairs.clamp(min=0)
    gathered = hidden[rows, index[..., 0]], hidden[rows, index[..., 1]]
    x, y = (g.to(compute_dtype(g)) for g in gathered)
    return x, y, pairs[..., 0] >= 0


def _scatter(dx: Tensor, dy: Tensor, hidden: Tensor, pairs: Tensor) -> Tensor:
    """dhidden from the gradients of the predictors' and the targets' rows."""
    dhidden = torch.zeros_like(hidden, dtype=dx.dtype, memory_format=torch.contiguous_format)
    index = pairs.clamp(min=0)[..., None].expand(*pairs.shape, hidden.shape[-1])
    padding = (pairs[..., 0] < 0)[..., None]
    dhidden.scatter_add_(1, index[:, :, 0], dx.masked_fill(padding, 0.0))
    dhidden.scatter_add_(1, index[:, :, 1], dy.masked_fill(padding, 0.0))
    return dhidden.to(hidden.dtype)
