"""What `llmjepa train` trains on and evaluates with: read, divided, tokenized, and all counted."""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import get_worker_info

from llmjepa_kernels.cli.options import TRAIN_SAMPLES
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.samples import located_chats
from llmjepa_kernels.data.splits import Split
from llmjepa_kernels.packing import Example, pack
from llmjepa_kernels.training.streaming import ExampleStream

Located = Iterator[tuple[str, dict[str, Any]]]
HEAD = 1000  # samples of a stream that are looked at before training


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


class LeftOut:
    """Counts what is left out, by kind, also in the workers of a DataLoader."""

    KINDS = ("out of distribution", "malformed", "too long")
    SHOWN = 3  # messages per kind

    def __init__(self):
        # A row per worker, which nobody else writes.
        self._counts = torch.zeros(256, len(self.KINDS), dtype=torch.int64).share_memory_()

    def add(self, kind: str, message: str | None = None) -> None:
        info = get_worker_info()
        row = self._counts[info.id % 256 if info else 0]
        row[self.KINDS.index(kind)] += 1
        if message and row[self.KINDS.index(kind)] <= self.SHOWN:
            print(f"left out: {message}", file=sys.stderr)

    def counts(self) -> dict[str, int]:
        """Those that are not zero."""
        counts = dict(zip(self.KINDS, self._counts.sum(dim=0).tolist(), strict=True))
        return {kind: count for kind, count in counts.items() if count}


class TrainingData:
    """The three parts of the data: to train on, held out, and held out of distribution.

    Of a stream, the part to train on is its beginning only, which is checked like all others.

    Attributes:
        train, held_out, out_of_distribution: `Part`s; the last two may be empty.
        left_out: What was left out of them: samples out of distribution that a split keeps from
            training, malformed ones, and too long ones.

    Args:
        args: The options of ``llmjepa train``.

    Raises:
        ValueError: A sample is malformed, or a part that was asked for has none.
        OSError: A file is not there.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.split = Split.parse(args.split) if args.split else None
        self.left_out = LeftOut()
        self.train = self._train_part()
        self.held_out, self.out_of_distribution = self._held_out_parts()

    def tokenize(self, example_format: ExampleFormat, tokenizer, max_positions: int | None) -> None:
        """Makes the examples of every part, once, before hours of training depend on them.

        Args:
            max_positions: Of the model.

        Raises:
            ValueError: A sample is malformed or too long; names its line.
        """
        self._tokenizing = (example_format, tokenizer, max_positions)
        for part in (self.train, self.held_out, self.out_of_distribution):
            located = zip(part.places, part.samples, strict=True)
            left_out = LeftOut() if part is self.train and self.args.streaming else self.left_out
            kept = list(self._tokenized(located, left_out))
            if part.samples and not kept:
                raise ValueError(f"all {len(part)} samples are too long, first {part.places[0]}")
            part.places = [place for place, _, _ in kept]
            part.samples = [sample for _, sample, _ in kept]
            part.examples = [example for _, _, example in kept]

    def stream(self, *, seed: int) -> ExampleStream:
        """All of ``--data``, after `tokenize`; what is left out is counted in the first pass."""
        self.left_out = LeftOut()
        return ExampleStream(
            partial(self._pass, self.left_out),
            buffer_size=self.args.shuffle_buffer,
            seed=seed,
            loss_dropout=self.args.loss_dropout,
        )

    def digest(self) -> str:
        """Tells whether two runs had the same data."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.held_out, self.out_of_distribution):
            for sample in part.samples:
                digest.update(json.dumps(sample, default=str).encode() + b"\n")
            digest.update(b"\n")
        return digest.hexdigest()

    def _pass(
        self, left_out: LeftOut, worker: int, num_workers: int, first: bool
    ) -> Iterator[tuple[str, Example]]:
        """A worker's share of one pass over ``--data``."""
        left_out = left_out if first else LeftOut()
        located = self._read(self.args.data, left_out, shard=(worker, num_workers))
        located = self._in_distribution(located, left_out)
        return ((place, example) for place, _, example in self._tokenized(located, left_out))

    def _train_part(self) -> Part:
        args = self.args
        if args.streaming:
            left_out, count = LeftOut(), HEAD
        else:
            left_out, count = self.left_out, args.train_samples
        if args.data is None:
            count = count or TRAIN_SAMPLES
            located = self._built_in("train")
        else:
            located = self._read(args.data, left_out)
        part = Part.of(islice(self._in_distribution(located, left_out), count))
        if not part.samples:
            held_back = f" in distribution of --split {self.split}" if self.split else ""
            raise ValueError(f"--data {args.data} has no samples{held_back}")
        return part

    def _in_distribution(self, located: Located, left_out: LeftOut) -> Located:
        for place, sample in located:
            if self.split and self._is_out(place, sample):
                left_out.add("out of distribution")
            else:
                yield place, sample

    def _held_out_parts(self) -> tuple[Part, Part]:
        args = self.args
        if args.eval_data is not None:
            stream = self._read(args.eval_data, self.left_out)
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

    def _read(self, source: str, left_out: LeftOut, shard: tuple[int, int] = (0, 1)) -> Located:
        def skip(error: ValueError) -> None:
            left_out.add("malformed", str(error))

        on_error = skip if self.args.skip_bad_lines else None
        return located_chats(source, recipe=self.args.recipe, on_error=on_error, shard=shard)

    def _built_in(self, split: str) -> Located:
        deeper = self.split.value + 1 if self.split and self.split.kind == "depth" else 0
        stream = grammar.samples(seed=self.args.seed, split=split, max_depth=max(2, deeper))
        return ((f"built-in sample {index}", sample) for index, sample in enumerate(stream))

    def _tokenized(
        self, located: Iterable[tuple[str, dict[str, Any]]], left_out: LeftOut
    ) -> Iterator[tuple[str, dict[str, Any], Example]]:
        example_format, tokenizer, max_positions = self._tokenizing
        for place, sample in located:
            try:
                example = example_format.example(sample, tokenizer)
                reason = self._too_long(example, max_positions)
                if reason and not self.args.skip_too_long:
                    raise ValueError(f"{reason}; --skip-too-long leaves such samples out")
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            if reason:
                left_out.add("too long", f"{place}: {reason}")
            else:
                yield place, sample, example

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
