"""Attention over a tree of your own, on tensors, without any model.

python examples/tree_attention.py
"""

from itertools import accumulate

import torch
from torch.nn.functional import scaled_dot_product_attention

from llmjepa_kernels import BlockMask, view_attention


def visible_until_of(tree):
    """(1, seq) int32 of segments given as (length, parent) in depth-first order.

    The tokens of a segment are visible until the end of its subtree.
    """
    lengths, parents = zip(*tree, strict=True)
    ends = list(accumulate(lengths))
    for i in reversed(range(len(tree))):
        if parents[i] is not None:
            ends[parents[i]] = max(ends[parents[i]], ends[i])
    return torch.tensor(ends, dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]


# A document that two questions continue, with two answers each, and an unrelated text.
tree = [(512, None), (40, 0), (120, 1), (90, 1), (30, 0), (100, 4), (140, 4), (256, None)]
visible_until = visible_until_of(tree)
seq = visible_until.shape[1]
print(f"{len(tree)} segments, {seq} tokens; tiles that attention visits:")

# The tiles to visit depend on the tree alone: build them once for all layers.
block_mask = BlockMask.from_visible_until(visible_until)
print(block_mask)

torch.manual_seed(0)
q = torch.randn(1, 9, seq, 64, requires_grad=True)  # (batch, heads, seq, head_dim)
k = torch.randn(1, 3, seq, 64, requires_grad=True)  # fewer heads: grouped queries
v = torch.randn(1, 3, seq, 64, requires_grad=True)

out = view_attention(q, k, v, visible_until, block_mask=block_mask)
ours = torch.autograd.grad(out.square().sum(), (q, k, v))

# The same with a dense mask, which takes seq × seq of memory and work.
i, j = torch.arange(seq)[:, None], torch.arange(seq)[None]
visible = (j <= i) & (i < visible_until[0])
dense = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
theirs = torch.autograd.grad(dense.square().sum(), (q, k, v))

print(f"visible: {visible.float().mean():.1%} of the scores")
print(f"largest difference from a dense mask: {(out - dense).abs().max():.1e}")
worst = max((a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True))
print(f"largest relative difference of gradients: {worst:.1e}")
