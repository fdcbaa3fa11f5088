"""The epoch of a training, told to all that draw anew in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback


class SetEpoch(TrainerCallback):
    """Tells sampler, dataset and collator the epoch.

    Accelerate tells the first two, but only in one process that has not resumed.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.epoch: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = None

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # Counted, since the state's stays below 1 over a stream of unknown length.
        self.epoch = int(state.epoch or 0) if self.epoch is None else self.epoch + 1
        dataset = getattr(train_dataloader, "dataset", None)
        for stage in (self.trainer._update_sampler, self.trainer.data_collator, *_within(dataset)):
            set_epoch = getattr(stage, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.epoch)


def _within(dataset: Any) -> Iterator[Any]:
    """A dataset, and those that it is a part of, or made of."""
    yield dataset
    inner = getattr(dataset, "dataset", None)
    for part in [*([] if inner is None else [inner]), *(getattr(dataset, "datasets", None) or ())]:
        yield from _within(part)
