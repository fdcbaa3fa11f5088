"""Loss dropout: examples, or all of an update, go without views and so without their cost."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from llmjepa_kernels.example import Example, without_views

PER = ("example", "step")


class LossDropout(Dataset):
    """A dataset whose examples lose their views with probability `rate`, drawn anew every epoch.

    A dropped example has neither [PRED] nor view tokens, only its next-token loss: at rate α the
    views' share of the cost is down to 1 − α. The draw is a pure function of the seed, the epoch,
    and the index or the update within the epoch, so it is the same after a resume and on any
    number of processes. Trainer sets the epoch.

    Args:
        data: `Example`s, or mappings with ``messages`` for an `LLMJEPACollator`.
        rate: α, from 0 to 1.
        per: "example", or "step": one draw decides for all examples of an update, as in the
            paper. An item is then asked for as ``(index, update)``, which the sampler of
            `LLMJEPATrainer` does.
        seed: Of the draws.

    Raises:
        ValueError: `rate` or `per` is none of these.

    Source: LLM-JEPA, arXiv:2509.14252.
    """

    def __init__(
        self,
        data: Sequence[Example | Mapping[str, Any]],
        rate: float,
        *,
        per: str = "example",
        seed: int = 0,
    ):
        if per not in PER:
            raise ValueError(f"per must be one of {PER}, got {per!r}")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be from 0 to 1, got {rate}")
        self.data = data
        self.rate = rate
        self.per = per
        self.seed = seed
        # Shared memory, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the draws of an epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def drops(self, index: int, update: int | None = None) -> bool:
        """Whether an example goes without views in this epoch."""
        if self.per == "example":
            drawn = f"{index}"
        elif update is None:
            raise ValueError(
                "loss dropout per step needs the update that an example is part of: train with "
                "LLMJEPATrainer, whose sampler knows it, or ask for dataset[index, update]"
            )
        else:
            drawn = f"update {update}"
        return random_fraction(self.seed, int(self._epoch), drawn) < self.rate

    def __getitem__(self, index: int | tuple[int, int]) -> Example | Mapping[str, Any]:
        index, update = index if isinstance(index, tuple) else (index, None)
        item = self.data[index]
        if not self.drops(index, update):
            return item
        return without_views(item) if isinstance(item, Example) else {**item, "without_views": True}


def random_fraction(seed: int, epoch: int, drawn: str) -> float:
    """A number from 0 to 1 that depends on nothing but these."""
    return random.Random(f"{seed},{epoch},{drawn}").random()
