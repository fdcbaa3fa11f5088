"""RankMe: how many directions a set of states has."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_me(states: Tensor) -> float:
    """The exponential of the entropy of the singular values' shares in their sum.

    Args:
        states: (count, hidden_size); rows of zeros count nowhere.

    Source: RankMe, arXiv:2210.02885.
    """
    states = states.cpu().double()
    gram = states @ states.mT if len(states) < states.shape[1] else states.mT @ states
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular_values / singular_values.sum()
    return float(torch.special.entr(shares).sum().exp())
