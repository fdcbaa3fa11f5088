"""How attention stores what it returns: (batch, seq, heads, head_dim), as models take it."""

from torch import Tensor


def empty_seq_major(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape (batch, heads, seq, head_dim), stored as above."""
    batch, heads, seq, head_dim = x.shape
    return x.new_empty(batch, seq, heads, head_dim).transpose(1, 2)
