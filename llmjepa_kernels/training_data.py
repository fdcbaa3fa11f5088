"""What `llmjepa train` trains on and evaluates with: read, divided, tokenized, and all counted."""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from llmjepa_kernels import grammar
from llmjepa_kernels.data import located_chats
from llmjepa_kernels.example_format import ExampleFormat
from llmjepa_kernels.packing import Example, pack
from llmjepa_kernels.splits import Split
from llmjepa_kernels.training_options import TRAIN_SAMPLES


@dataclass
class Part:
    """Samples, where each is from, and once tokenized their examples."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    @classmethod
    def of(cls, located: Iterable[tuple[str, dict[str, Any]]]) -> Part:
        part = cls()
        for place, sample in located:
            part.places.append(place)
            part.samples.append(sample)
        return part


class TrainingData:
    """The three parts of the data: to train on, held out, and held out of distribution.

    Attributes:
        train, held_out, out_of_distribution: `Part`s; the last two may be empty.
        left_out: What was left out of them, and how often: samples that a split holds back, bad
            lines, and samples that are too long.

    Args:
        args: The options of ``llmjepa train``.

    Raises:
        ValueError: A sample is malformed, or a part that was asked for has none.
        FileNotFoundError: A file is not there.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.split = Split.parse(args.split) if args.split else None
        self.left_out: dict[str, int] = {}
        self.train = self._train_part()
        self.held_out, self.out_of_distribution = self._held_out_parts()

    def tokenize(self, example_format: ExampleFormat, tokenizer, max_positions: int | None) -> None:
        """Makes the examples of every part, once, before hours of training depend on them.

        Args:
            max_positions: Of the model.

        Raises:
            ValueError: A sample is malformed or too long; names its line.
        """
        for part in (self.train, self.held_out, self.out_of_distribution):
            kept = Part()
            for place, sample in zip(part.places, part.samples, strict=True):
                try:
                    example = example_format.example(sample, tokenizer)
                    reason = self._too_long(example, max_positions)
                    if reason and not self.args.skip_too_long:
                        raise ValueError(f"{reason}; --skip-too-long leaves such samples out")
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
                if reason:
                    self._count("too long", f"{place}: {reason}")
                    continue
                kept.samples.append(sample)
                kept.places.append(place)
                kept.examples.append(example)
            if part.samples and not kept.samples:
                raise ValueError(f"all {len(part)} samples are too long, first {part.places[0]}")
            part.samples, part.places, part.examples = kept.samples, kept.places, kept.examples

    def digest(self) -> str:
        """Tells whether two runs had the same data."""
        parts = [part.samples for part in (self.train, self.held_out, self.out_of_distribution)]
        return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()

    def _train_part(self) -> Part:
        args = self.args
        if args.data is None:
            count = args.train_samples or TRAIN_SAMPLES
            stream = self._built_in("train")
        else:
            count, stream = args.train_samples, self._read(args.data)
        part = Part.of(islice(self._in_distribution(stream), count))
        if not part.samples:
            held_back = f" in distribution of --split {self.split}" if self.split else ""
            raise ValueError(f"--data {args.data} has no samples{held_back}")
        return part

    def _in_distribution(self, located: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
        for place, sample in located:
            if self.split and self._is_out(place, sample):
                self._count(f"out of distribution, held back by --split {self.split}")
            else:
                yield place, sample

    def _held_out_parts(self) -> tuple[Part, Part]:
        args = self.args
        if args.eval_data is not None:
            stream = self._read(args.eval_data)
        elif args.data is None:
            stream = self._built_in("heldout")
        else:
            return Part(), Part()
        if self.split is None:
            return Part.of(islice(stream, args.eval_samples)), Part()
        divided: tuple[list, list] = ([], [])
        for place, sample in stream:
            some = divided[self._is_out(place, sample)]
            if len(some) < args.eval_samples:
                some.append((place, sample))
            if min(map(len, divided)) == args.eval_samples:
                break
        for some, name in zip(divided, ("in", "out of"), strict=True):
            if not some:
                raise ValueError(f"--split {self.split}: no held-out sample is {name} distribution")
        return Part.of(divided[0]), Part.of(divided[1])

    def _is_out(self, place: str, sample: dict[str, Any]) -> bool:
        try:
            return self.split.is_out_of_distribution(sample)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error

    def _read(self, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
        def skip(error: ValueError) -> None:
            self._count("bad lines", str(error))

        on_error = skip if self.args.skip_bad_lines else None
        return located_chats(source, recipe=self.args.recipe, on_error=on_error)

    def _built_in(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        deeper = self.split.value + 1 if self.split and self.split.kind == "depth" else 0
        stream = grammar.samples(seed=self.args.seed, split=split, max_depth=max(2, deeper))
        return ((f"built-in sample {index}", sample) for index, sample in enumerate(stream))

    def _count(self, kind: str, message: str | None = None) -> None:
        self.left_out[kind] = self.left_out.get(kind, 0) + 1
        if message and self.left_out[kind] <= 3:
            print(f"left out: {message}", file=sys.stderr)

    def _too_long(self, example: Example, max_positions: int | None) -> str | None:
        lengths = [len(segment.input_ids) for segment in example.segments]
        limit = self.args.max_length
        if limit and sum(lengths) > limit:
            row = pack([example], share_prefixes=self.args.share_prefixes)
            size = row["input_ids"].shape[1]
            if size > limit:
                return f"it takes {size} tokens, more than --max-length {limit}"
        ends: list[int] = []
        for segment, length in zip(example.segments, lengths, strict=True):
            ends.append(length + (0 if segment.parent is None else ends[segment.parent]))
        if max_positions and max(ends) > max_positions:
            return f"it is {max(ends)} tokens long, more than the {max_positions} of the model"
        return None
