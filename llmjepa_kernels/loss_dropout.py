"""Loss dropout: examples that go without views, and so without their cost."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from llmjepa_kernels.chat import without_views
from llmjepa_kernels.packing import Example


class LossDropout(Dataset):
    """A dataset whose examples lose their views with probability `rate`, drawn anew every epoch.

    A dropped example has neither [PRED] nor view tokens, only its next-token loss: at rate α the
    views' share of the cost is down to 1 − α. The draw is a pure function of (seed, epoch, index),
    so it is the same after a resume and on any number of processes. Trainer sets the epoch.

    Args:
        data: `Example`s, or mappings with ``messages`` for an `LLMJEPACollator`.
        rate: α, from 0 to 1.
        seed: Of the draws.

    Raises:
        ValueError: `rate` is out of range.

    Source: LLM-JEPA, arXiv:2509.14252, where one draw decides for a whole step.
    """

    def __init__(self, data: Sequence[Example | Mapping[str, Any]], rate: float, *, seed: int = 0):
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be from 0 to 1, got {rate}")
        self.data = data
        self.rate = rate
        self.seed = seed
        # Shared memory, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the draws of an epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example | dict[str, Any]:
        item = self.data[index]
        if random.Random(f"{self.seed},{int(self._epoch)},{index}").random() >= self.rate:
            return item
        return without_views(item) if isinstance(item, Example) else {**item, "without_views": True}
