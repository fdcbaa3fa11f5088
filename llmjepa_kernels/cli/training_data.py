"""What `llmjepa train` trains on and evaluates with: read, divided, tokenized, and all counted."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from llmjepa_kernels.cli.fingerprints import data_fingerprint
from llmjepa_kernels.cli.held_out import Located, built_in_samples
from llmjepa_kernels.cli.starting_point import StartingPoint
from llmjepa_kernels.cli.train_options import TrainOptions
from llmjepa_kernels.cli.training_defaults import TRAIN_SAMPLES
from llmjepa_kernels.data.samples import located_chats
from llmjepa_kernels.data.splits import Split
from llmjepa_kernels.evaluation.predict import beyond_positions
from llmjepa_kernels.example import IGNORE, Example, segment_ends
from llmjepa_kernels.packing import pack
from llmjepa_kernels.training.streaming import ExampleStream
from llmjepa_kernels.tubes import TubeSampler

HEAD = 1000  # samples of a stream that are looked at before training
TOLD_BY = 1000  # samples whose tokens tell tokenizers apart


def _strings(value: Any) -> Iterator[str]:
    """All texts in a sample, as they are written."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _strings(value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


class LeftOut:
    """Counts what is left out or cut, by kind, also in the workers of a DataLoader."""

    KINDS = ("out of distribution", "malformed", "too long", "truncated")
    SHOWN = 3  # messages per kind

    def __init__(self, *, silent: bool = False) -> None:
        self._shown = 0 if silent else self.SHOWN
        # A row per worker, which nobody else writes.
        self._counts = torch.zeros(256, len(self.KINDS), dtype=torch.int64).share_memory_()

    def add(self, kind: str, message: str | None = None) -> None:
        info = get_worker_info()
        row = self._counts[info.id % 256 if info else 0]
        row[self.KINDS.index(kind)] += 1
        if message and row[self.KINDS.index(kind)] <= self._shown:
            what = kind if kind == "truncated" else "left out"
            print(f"{what}: {message}", file=sys.stderr)

    def counts(self) -> dict[str, int]:
        """Those that are not zero."""
        counts = dict(zip(self.KINDS, self._counts.sum(dim=0).tolist(), strict=True))
        return {kind: count for kind, count in counts.items() if count}


class LocatedSample(NamedTuple):
    """A sample, and where it is from."""

    place: str
    sample: dict[str, Any]


class SampleReader:
    """Reads the samples of ``--data``, ``--eval-data`` or built-in ones, and divides them.

    Args:
        options: Of ``llmjepa train``.
        left_out: Counts what is left out.

    Raises:
        ValueError: The split is none.
    """

    def __init__(self, options: TrainOptions, left_out: LeftOut) -> None:
        self.options = options
        self.left_out = left_out
        self.split = Split.parse(options.split) if options.split else None

    def in_distribution(self, shard: tuple[int, int] = (0, 1)) -> Located:
        """The samples to train on; of a `shard` (i, n), every n-th row from the i-th on."""
        options = self.options
        if options.data is None:
            located = built_in_samples("train", seed=options.seed, split=self.split)
        elif options.eval_split is not None:
            located = iter(self._parts[0])
        else:
            located = self._read(options.data, shard)
        for place, sample in located:
            if self.split and self._is_out(place, sample):
                self.left_out.add("out of distribution")
            else:
                yield place, sample

    def first(self) -> list[LocatedSample]:
        """As many samples to train on as are asked for; of a stream, those that are checked.

        Raises:
            ValueError: There are none, or one is malformed.
        """
        options = self.options
        count = options.train_samples
        if options.streaming:
            count = HEAD
        elif options.data is None:
            count = count or TRAIN_SAMPLES
        found = [LocatedSample(*each) for each in islice(self.in_distribution(), count)]
        if not found:
            held_back = f" in distribution of --split {self.split}" if self.split else ""
            raise ValueError(f"--data {options.data} has no samples{held_back}")
        return found

    def held_out(self) -> tuple[list[LocatedSample], list[LocatedSample]]:
        """Those to evaluate on, in and out of distribution; the latter only with a split.

        Raises:
            ValueError: A part that was asked for has none, or one is malformed.
        """
        options, split = self.options, self.split
        if options.eval_data is not None:
            stream = self._read(options.eval_data)
        elif options.data is None:
            stream = built_in_samples("heldout", seed=options.seed, split=split)
        elif options.eval_split is not None:
            stream = iter(self._parts[1])
        else:
            return [], []
        if split is None:
            found = [LocatedSample(*each) for each in islice(stream, options.eval_samples)]
            if not found:
                raise ValueError(f"--eval-data {options.eval_data} has no samples")
            return found, []
        inside: list[LocatedSample] = []
        outside: list[LocatedSample] = []
        for place, sample in stream:
            part = outside if self._is_out(place, sample) else inside
            if len(part) < options.eval_samples:
                part.append(LocatedSample(place, sample))
            if min(len(inside), len(outside)) == options.eval_samples:
                break
        for part, name in ((inside, "in"), (outside, "out of")):
            if not part:
                raise ValueError(f"--split {split}: no held-out sample is {name} distribution")
        return inside, outside

    @cached_property
    def _parts(self) -> tuple[list[tuple[str, dict[str, Any]]], list[tuple[str, dict[str, Any]]]]:
        """The samples of ``--data`` to train on, and those held out by ``--eval-split``."""
        from datasets import Dataset

        rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for place, sample in self._read(str(self.options.data)):
            rows.setdefault(place, []).append((place, sample))
        if len(rows) < 2:
            raise ValueError(f"--eval-split needs two rows of --data, got {len(rows)}")
        # Samples of one row, such as paraphrases of one another, stay together.
        parts = Dataset.from_dict({"row": list(rows)}).train_test_split(
            self.options.eval_split, seed=self.options.eval_split_seed
        )
        train, held_out = (
            [sample for row in parts[part]["row"] for sample in rows[row]]
            for part in ("train", "test")
        )
        return train, held_out

    def _is_out(self, place: str, sample: dict[str, Any]) -> bool:
        assert self.split is not None
        try:
            return self.split.is_out_of_distribution(sample)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error

    def _read(self, source: str, shard: tuple[int, int] = (0, 1)) -> Located:
        def skip(error: ValueError) -> None:
            self.left_out.add("malformed", str(error))

        on_error = skip if self.options.skip_bad_lines else None
        return located_chats(source, recipe=self.options.recipe, on_error=on_error, shard=shard)


class Made(NamedTuple):
    """A sample, its example, and the length that its sequences were cut to, if they were."""

    located: LocatedSample
    example: Example
    max_length: int | None


@dataclass(frozen=True)
class ExampleMaker:
    """Makes examples of samples; leaves out, cuts or refuses those that are too long.

    Attributes:
        options: Of ``llmjepa train``.
        start: Its tokenizer and format make the examples; its model has so many positions.
        left_out: Counts samples that are too long.
        answered: Whether the model is to answer the samples, for which they must be whole.
    """

    options: TrainOptions
    start: StartingPoint
    left_out: LeftOut
    answered: bool = False

    def examples(self, located: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Made]:
        """Those of the samples that fit, or can be made to.

        Raises:
            ValueError: A sample is malformed, or too long and to be refused; names its line.
        """
        policy = self.options.max_length_policy
        for place, sample in located:
            made = LocatedSample(place, sample)
            try:
                example = self._example(sample)
                reason = self._too_long(example)
                if reason and policy == "refuse":
                    raise ValueError(f"{reason}; see --max-length-policy")
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            if reason is None:
                yield Made(made, example, None)
                continue
            cut = self._cut(sample, example) if policy == "truncate" else None
            if cut is None:
                self.left_out.add("too long", f"{place}: {reason}")
                continue
            self.left_out.add("truncated", f"{place}: {reason}")
            yield Made(made, *cut)

    def _example(self, sample: dict[str, Any], max_length: int | None = None) -> Example:
        start = self.start
        return start.example_format.example(sample, start.tokenizer, max_length=max_length)

    def _cut(self, sample: dict[str, Any], example: Example) -> tuple[Example, int] | None:
        """The longest example that fits; None if there is none, or nothing of it is supervised."""
        if self.answered and beyond_positions(example, self.start.max_positions):
            return None
        limits = (self.options.max_sequence_length, self.start.max_positions)
        longest = min([max(segment_ends(example)), *(limit for limit in limits if limit)])
        fits, too_long, found = 0, longest + 1, None
        length = longest  # which fits, unless a row is what is short
        while fits < length < too_long:
            try:
                shorter = self._example(sample, length)
            except ValueError:  # nothing is left of a view
                fits = length
            else:
                if self._too_long(shorter):
                    too_long = length
                else:
                    fits, found = length, shorter
            length = (fits + too_long) // 2
        supervised = found and any(
            label != IGNORE for segment in found.segments for label in segment.labels or ()
        )
        return (found, fits) if found and supervised else None

    def _too_long(self, example: Example) -> str | None:
        longest, most = max(segment_ends(example)), self.options.max_sequence_length
        if most and longest > most:
            return f"it is {longest} tokens long, more than --max-sequence-length {most}"
        limit = self.options.max_length
        if limit and sum(len(segment.input_ids) for segment in example.segments) > limit:
            row = pack([example], share_prefixes=self.options.share_prefixes)
            size = row["input_ids"].shape[1]
            if size > limit:
                return f"it takes {size} tokens, more than --max-length {limit}"
        return beyond_positions(example, self.start.max_positions)


@dataclass(frozen=True)
class Part:
    """Samples, and their examples."""

    made: list[Made]

    @property
    def located(self) -> list[LocatedSample]:
        return [each.located for each in self.made]

    @property
    def examples(self) -> list[Example]:
        return [each.example for each in self.made]

    @property
    def samples(self) -> list[dict[str, Any]]:
        return [each.sample for each in self.located]

    def __len__(self) -> int:
        return len(self.made)


class TrainingData:
    """The three parts of the data: to train on, held out, and held out of distribution.

    All is tokenized once, before hours of training depend on it. Of a stream, the part to train on
    is its beginning only, which is checked like all others.

    Attributes:
        train, held_out, out_of_distribution: `Part`s; the last two may be empty.
        left_out: What was left out of them, samples out of distribution that a split keeps from
            training, malformed ones, and too long ones; and what was cut.

    Args:
        options: Of ``llmjepa train``.
        train: From `SampleReader`, as `held_out`.
        held_out: In and out of distribution.
        start: Has the tokenizer and the format.
        left_out: What the reader has left out.

    Raises:
        ValueError: A sample is malformed or too long; names its line.
    """

    def __init__(
        self,
        options: TrainOptions,
        train: list[LocatedSample],
        held_out: tuple[list[LocatedSample], list[LocatedSample]],
        start: StartingPoint,
        left_out: LeftOut,
    ) -> None:
        # This lives longer than a model, of which there should not be two in memory.
        self._options, self._start = options, replace(start, model=None)
        self.left_out = left_out
        # What a stream begins with is counted as it is trained on.
        counted = LeftOut(silent=True) if options.streaming else left_out
        self.train = self._part(train, counted)
        self.held_out, self.out_of_distribution = (
            self._part(part, left_out, answered=True) for part in held_out
        )

    def stream(
        self, left_out: LeftOut, *, seed: int, tubes: TubeSampler | None = None
    ) -> ExampleStream:
        """All of ``--data``, again and again; what is left out is counted in the first pass."""
        return ExampleStream(
            partial(self._pass, left_out),
            buffer_size=self._options.shuffle_buffer,
            seed=seed,
            loss_dropout=self._options.loss_dropout,
            tubes=tubes,
        )

    def fingerprint(self) -> str:
        """Tells whether two runs had the same data, of the same tokens.

        Some templates write the date, so it is by what the tokens are made of.
        """
        parts = (self.train, self.held_out, self.out_of_distribution)
        start, first = self._start, islice(self.train.samples, TOLD_BY)
        texts = (text for sample in first for text in _strings(sample))
        made_of = [
            {"template": start.tokenizer.chat_template, "max_positions": start.max_positions},
            asdict(start.example_format),
            *({"tokens": start.tokenizer.encode(text, verbose=False)} for text in texts),
        ]
        return data_fingerprint(*(part.samples for part in parts), made_of)

    def _part(
        self, located: list[LocatedSample], left_out: LeftOut, *, answered: bool = False
    ) -> Part:
        kept = list(ExampleMaker(self._options, self._start, left_out, answered).examples(located))
        if located and not kept:
            raise ValueError(f"all {len(located)} samples are too long, first {located[0].place}")
        return Part(kept)

    def _pass(
        self, left_out: LeftOut, worker: int, num_workers: int, first: bool
    ) -> Iterator[tuple[str, Example]]:
        """A worker's share of one pass over ``--data``."""
        left_out = left_out if first else LeftOut(silent=True)
        located = SampleReader(self._options, left_out).in_distribution((worker, num_workers))
        examples = ExampleMaker(self._options, self._start, left_out).examples(located)
        return ((made.located.place, made.example) for made in examples)
