"""A collator for Trainer: a list of examples becomes packed rows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.predictor_tokens import known_predictor_tokens
from llmjepa_kernels.example import IGNORE, Example, with_tubes, without_views
from llmjepa_kernels.ops.choice import may_choose_flash
from llmjepa_kernels.packing import PackedBatch, pack
from llmjepa_kernels.training.objective import supervised_positions
from llmjepa_kernels.tubes import TubeSampler


@dataclass
class LLMJEPACollator:
    """Packs a list of examples into rows.

    A feature is an `Example`, or a mapping with ``messages`` ([system,] user and assistant turns)
    that `tokenizer` turns into one; it may have ``text``, ``code``, ``views`` and ``pairs``, see
    `chat_example`, and ``without_views``, True if it is to go without any.

    Attributes:
        tokenizer: A fast tokenizer; needed for features with ``messages``.
        example_format: How `tokenizer` turns those into examples, [PRED] tokens included.
        max_length: Tokens in a row at most. Default: one row per batch, without any padding.
        share_prefixes: Store equal prefixes once per row.
        with_views: False leaves the views out: no LLM-JEPA, and no tokens for it.
        tubes: Draws tubes for Semantic Tube Prediction, anew every epoch, for the examples that
            have none yet. Trainer sets the epoch.
        pad_to_multiple_of: Pads rows to a multiple of this, for fewer different shapes.
        flash_plan: Also plan the calls of ``impl="flash"``. Default: where ``LLMJEPA_AUTOTUNE=1``
            is to choose between the back ends and flash-attn is installed.

    Raises:
        ValueError: An example is malformed or longer than `max_length`; names it by its index in
            the batch.

    Warns:
        UserWarning: The tokenizer has [PRED] tokens, but by `example_format` none follows a view.
    """

    tokenizer: Any = None
    example_format: ExampleFormat = field(default_factory=ExampleFormat)
    max_length: int | None = None
    share_prefixes: bool = True
    with_views: bool = True
    tubes: TubeSampler | None = None
    pad_to_multiple_of: int | None = None
    flash_plan: bool | None = None

    def __post_init__(self) -> None:
        # Shared memory, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        # Asked here, as a worker process could not.
        cuda = torch.cuda.is_available() and torch.version.hip is None
        self._compute_capability = torch.cuda.get_device_capability() if cuda else None

        if self.with_views and self.tokenizer is not None and not self.example_format.pred_ids:
            known = known_predictor_tokens(self.tokenizer)
            if known:
                warnings.warn(
                    f"the tokenizer has {known} [PRED] tokens, but example_format has none, so no "
                    "view is followed by one: give their ids, the last one first, in "
                    "ExampleFormat(pred_ids=…), or read it beside the checkpoint by "
                    "ExampleFormat.load",
                    stacklevel=3,
                )

    def set_epoch(self, epoch: int) -> None:
        """Chooses the tubes of an epoch."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """Whose tubes are drawn."""
        return int(self._epoch)

    def for_evaluation(self) -> LLMJEPACollator:
        """A copy that draws the same tubes in every epoch of this one."""
        own = copy.copy(self)
        own._epoch = torch.zeros_like(self._epoch)
        return own

    def __call__(self, features: Sequence[Example | Mapping[str, Any]]) -> PackedBatch:
        """Packs the features, and adds how many tokens their chats alone take.

        Returns:
            batch: A `PackedBatch`; ``supervised``, the positions that need logits, computed here
                to spare the training process the work; and ``sft_tokens`` (batch,) int64, whose
                sum is how many tokens plain fine-tuning on the same chats takes, unpadded.
        """
        examples = [self.example(feature) for feature in features]
        packed = examples if self.with_views else [without_views(example) for example in examples]
        if self.tubes is not None:
            packed = [x if x.tubes else with_tubes(x, self.tubes, self.epoch) for x in packed]
        batch = pack(
            packed,
            self.max_length,
            share_prefixes=self.share_prefixes,
            pad_token_id=getattr(self.tokenizer, "pad_token_id", None) or 0,
            pad_to_multiple_of=self.pad_to_multiple_of,
            compute_capability=self._compute_capability,
            flash_plan=may_choose_flash() if self.flash_plan is None else self.flash_plan,
        )
        batch["supervised"] = supervised_positions(batch["labels"])
        batch["sft_tokens"] = torch.zeros(len(batch["input_ids"]), dtype=torch.int64)
        batch["sft_tokens"][0] = sum(map(chat_tokens, examples))
        return batch

    def example(self, feature: Example | Mapping[str, Any]) -> Example:
        """The `Example` of one feature."""
        if isinstance(feature, Example):
            return feature
        if not isinstance(feature, Mapping) or "messages" not in feature:
            found = sorted(feature) if isinstance(feature, Mapping) else type(feature).__name__
            raise ValueError(
                f"features must be Examples or mappings with the key messages, got {found}; "
                "Trainers but LLMJEPATrainer drop that key unless remove_unused_columns=False"
            )
        if self.tokenizer is None:
            raise ValueError("features with messages need a tokenizer, got tokenizer=None")
        example = self.example_format.example(feature, self.tokenizer)
        return without_views(example) if feature.get("without_views") else example


def chat_tokens(example: Example) -> int:
    """Tokens of an example without its views: what plain fine-tuning takes for it.

    None of one without supervised tokens, which it would not take.
    """
    if not any(y != IGNORE for segment in example.segments for y in segment.labels or ()):
        return 0
    return sum(len(segment.input_ids) for segment in without_views(example).segments)
