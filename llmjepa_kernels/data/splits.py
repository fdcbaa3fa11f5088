"""Out-of-distribution splits: samples deeper, longer or composed otherwise than those trained on.

A split is a pure function of the sample, so training leaves out exactly what evaluation reports
apart, on every machine, whatever else the data hold.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from llmjepa_kernels.data.regex_structure import OPERATORS, Structure, structure

KINDS = ("depth", "length", "pairs")
EXPECTED = (
    "depth:N (a regex nested deeper than N), length:N (an answer of more than N characters), "
    "pairs:F (one of the fraction F of all operator pairs, which is held out) or "
    "pairs:outer>inner,… (one of these)"
)


@dataclass(frozen=True)
class Split:
    """What counts as out of distribution.

    Attributes:
        kind: ``"depth"``, ``"length"`` or ``"pairs"``.
        value: The greatest depth or length in distribution; of pairs, the fraction held out or
            the ``"outer>inner"`` themselves.
    """

    kind: str
    value: int | float | tuple[str, ...]

    @classmethod
    def parse(cls, spec: str) -> Split:
        """Reads a split as it is written on a command line; ``str`` writes it.

        Args:
            spec: ``depth:2``, ``length:30``, ``pairs:0.1`` or ``pairs:or>and,star>not``.
        Raises:
            ValueError: It is none of these; says what was expected.
        """
        kind, _, value = spec.partition(":")
        if kind not in KINDS or not value:
            raise ValueError(f"split must be {EXPECTED}, got {spec!r}")
        if kind != "pairs":
            if not re.fullmatch(r"\d+", value, re.ASCII):
                raise ValueError(f"split {kind}:N expects N to be 0, 1, 2, …, got {value!r}")
            return cls(kind, int(value))
        if ">" in value or value[0].isalpha():
            return cls(kind, _listed_pairs(value))
        try:
            fraction = float(value)
        except ValueError:
            fraction = -1.0
        if not 0 < fraction < 1:
            raise ValueError(
                f"split pairs:F expects a fraction between 0 and 1 or outer>inner,…, got {value!r}"
            )
        return cls(kind, fraction)

    def __str__(self) -> str:
        value = ",".join(self.value) if isinstance(self.value, tuple) else self.value
        return f"{self.kind}:{value}"

    def is_out_of_distribution(self, sample: Mapping[str, Any]) -> bool:
        """Whether training must not see the sample.

        Args:
            sample: With ``messages``, the last of which is the answer.
        Raises:
            ValueError: Depth or operator pairs are asked of an answer that is no regex.
        """
        answer = sample["messages"][-1]["content"]
        if isinstance(self.value, int):
            size = len(answer) if self.kind == "length" else self._structure(answer).depth
            return size > self.value
        found = self._structure(answer)
        return not self.held_out_pairs.isdisjoint(found.operator_pairs)

    @cached_property
    def held_out_pairs(self) -> frozenset[str]:
        """The ``"outer>inner"`` that training never sees; none unless the kind is pairs.

        A fraction takes pairs along the diagonals of the square of all operators, put in an order
        of no meaning: every operator is about equally often held out as the outer and as the
        inner one, and stays in training as both.
        """
        if isinstance(self.value, tuple):
            return frozenset(self.value)
        if self.kind != "pairs":
            return frozenset()
        outer, inner = _shuffled("outer"), _shuffled("inner")
        n = len(OPERATORS)
        count = min(max(1, round(self.value * n * n)), n * (n - 1))
        diagonals = ((i, (i + d) % n) for d in range(n) for i in range(n))
        pairs = [f"{outer[i]}>{inner[j]}" for i, j in diagonals]
        return frozenset(pairs[:count])

    def _structure(self, answer: str) -> Structure:
        """Of an answer that can be a regex of NL-RX: no white space, no bare capitalised word."""
        try:
            if re.search(r"\s", answer) or re.fullmatch(r"\w*[^\W_a-z]\w*", answer):
                raise ValueError("it is plain text")
            return structure(answer)
        except ValueError as error:
            raise ValueError(
                f"split {self} needs answers that are regexes, got {answer[:200]!r}: {error}; "
                "length:N works for any answer"
            ) from error


def _listed_pairs(value: str) -> tuple[str, ...]:
    known = {f"{outer}>{inner}" for outer, inner in product(OPERATORS, repeat=2)}
    pairs = [pair.strip() for pair in value.split(",")]
    for pair in pairs:
        if pair not in known:
            raise ValueError(
                f"split pairs:outer>inner,… (in quotes for a shell) expects two of "
                f"{', '.join(OPERATORS)}, got {pair!r}"
            )
    return tuple(sorted(set(pairs)))


def _shuffled(role: str) -> list[str]:
    """The operators in an order that is the same everywhere, another one for each role."""
    return sorted(OPERATORS, key=lambda name: hashlib.blake2b(f"{role} {name}".encode()).digest())
