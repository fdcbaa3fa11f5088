"""What back ends share: the options of attention, how it stores what it returns, pairs of the loss.

Attention stores (batch, seq, heads, head_dim), as models take it. Pairs of last tokens are
(batch, num_pairs, 2), padded with -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_HEAD_DIM = 256  # of the kernels; plain PyTorch takes any


@dataclass(frozen=True)
class AttentionOptions:
    """What attention is told besides its tensors and its mask; see `view_attention`.

    Attributes:
        softmax_scale: Multiplies q·k.
        position_ids: (batch, seq) int32; there if `window` is.
        window: Positions that a token looks back, itself included.
        softcap: Replaces each score s by ``softcap * tanh(s / softcap)``.
        sinks: (num_heads,), a score per head that takes part in the softmax without a value.
    """

    softmax_scale: float
    position_ids: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def empty_seq_major(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape (batch, heads, seq, head_dim), stored as above."""
    batch, heads, seq, head_dim = x.shape
    return x.new_empty(batch, seq, heads, head_dim).transpose(1, 2)


def refuse_if(wrong: Tensor, message: str) -> None:
    """Raises ValueError if true; elsewhere than on a CPU asserts it without waiting."""
    if wrong.device.type != "cpu":
        torch._assert_async(~wrong, message)
    elif wrong:
        raise ValueError(message)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What sums over x are computed in: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def count_pairs(pairs: Tensor) -> Tensor:
    """How many are not padding, an integer scalar."""
    return (pairs[..., 0] >= 0).sum()


def real_tubes(tubes: Tensor) -> Tensor:
    """(batch, num_tubes) bool: which have any step, and so are no padding."""
    return (tubes >= 0).flatten(2).any(dim=2)


def count_tubes(tubes: Tensor) -> Tensor:
    """How many are not padding, an integer scalar."""
    return real_tubes(tubes).sum()


def check_pairs(pairs: Tensor, seq: int, name: str = "pairs") -> None:
    """Raises IndexError unless both indices (…, 2) of each pair lie in the row, or both are -1.

    Elsewhere than on a CPU it is asserted, without waiting for the device.
    """
    padding = (pairs == -1).all(dim=-1, keepdim=True)
    wrong = ~padding & ((pairs < 0) | (pairs >= seq))
    if pairs.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"{name} must hold indices in 0 .. seq - 1, or -1 twice")
    elif wrong.any():
        *place, _ = wrong.nonzero()[0].tolist()
        raise IndexError(
            f"{name} must hold indices in 0 .. {seq - 1}, or -1 twice for padding; "
            f"got {name}{place} = {pairs[tuple(place)].tolist()}"
        )
