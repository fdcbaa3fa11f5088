"""Tubes of Semantic Tube Prediction: stretches of a path of tokens, drawn anew every epoch."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmjepa_kernels.checks import check_whole

Step = tuple[int, int]
Tube = tuple[Sequence[Step], Sequence[Step]]

FORMS = ("released", "paper", "turns")
MAX_SPANS = 2  # of a path whose rest about a span has no more steps than a tube


@dataclass(frozen=True)
class TokenPath:
    """Contents of a sequence as one path of tokens, whose steps skip what stands between them.

    Attributes:
        segment: Of the example; the sequence is this segment and those above it.
        spans: (start, stop) of each content, token indices within the sequence, ascending. A first
            token of the sequence has no state before it to step from, so it is left out.
    """

    segment: int
    spans: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class TubeSampler:
    """Draws the tubes of an example: a pure function of the seed, the epoch and the tokens.

    So the draws are the same after a resume, in any worker, and on any number of processes.

    Attributes:
        form: "released", as the authors' code: a random span of the path against the rest of it,
            ``1 - cos(rest, span)``; "paper": three random tokens r < s < t of the path,
            ``1 - cos(h_t - h_s, h_s - h_r)``; "turns": the first content against the second.
        count: Tubes per example and epoch; of "turns" there is one.
        max_length: Tokens of a span, or between r and t, at most.
        seed: Of the draws.

    Raises:
        ValueError: An option is none of these.

    Source: Semantic Tube Prediction, arXiv:2602.22617, and its code at galilai-group/llm-jepa.
    """

    form: str = "released"
    count: int = 1
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {self.form!r}")
        check_whole("count", self.count, least=1)
        if self.max_length is not None:
            check_whole("max_length", self.max_length, least=2 if self.form == "paper" else 1)

    def draw(self, path: TokenPath, input_ids: Sequence[int], epoch: int = 0) -> list[Tube]:
        """The tubes of one example in one epoch; none where its path is too short.

        Args:
            path: Of the example.
            input_ids: The tokens of its sequence.
        """
        spans = [(max(start, 1), stop) for start, stop in path.spans if stop > max(start, 1)]
        if self.form == "turns":
            return [([_step(spans[0])], [_step(spans[1])])] if len(spans) > 1 else []
        tokens = hashlib.blake2b(array("q", input_ids).tobytes(), digest_size=8).hexdigest()
        rng = random.Random(f"{self.seed},{epoch},{tokens}")
        if self.form == "paper":
            return list(self._triples(spans, rng))
        if len(spans) > MAX_SPANS:
            raise ValueError(
                f"tubes of form 'released' are of a path of at most {MAX_SPANS} spans, got "
                f"{len(spans)}"
            )
        return list(self._spans(spans, rng))

    def _spans(self, spans: list[tuple[int, int]], rng: random.Random) -> Iterator[Tube]:
        length = sum(stop - start for start, stop in spans)
        if length < 2:
            return
        for _ in range(self.count):
            start = rng.randrange(length)
            # The whole path would leave no rest to compare with.
            last = length - 1 if start == 0 else length
            if self.max_length is not None:
                last = min(last, start + self.max_length)
            stop = rng.randint(start + 1, last)
            rest = [*_steps(spans, 0, start), *_steps(spans, stop, length)]
            yield rest, list(_steps(spans, start, stop))

    def _triples(self, spans: list[tuple[int, int]], rng: random.Random) -> Iterator[Tube]:
        tokens = [i for start, stop in spans for i in range(start, stop)]
        if len(tokens) < 3:
            return
        width = len(tokens) if self.max_length is None else min(len(tokens), self.max_length + 1)
        for _ in range(self.count):
            first = rng.randrange(len(tokens) - width + 1)
            r, s, t = sorted(rng.sample(tokens[first : first + width], 3))
            yield [(s, t)], [(r, s)]


def _step(span: tuple[int, int]) -> Step:
    """From the state before a span to that of its last token."""
    start, stop = span
    return start - 1, stop - 1


def _steps(spans: list[tuple[int, int]], begin: int, end: int) -> Iterator[Step]:
    """The steps along the path from offset `begin` to `end`: one for each content it touches."""
    for start, stop in spans:
        low, high = max(begin, 0), min(end, stop - start)
        if low < high:
            yield _step((start + low, start + high))
        begin, end = begin - (stop - start), end - (stop - start)
