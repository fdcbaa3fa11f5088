"""A built-in source of (natural language, regular expression) pairs that needs no download.

Every pair is rendered twice from one random expression tree: once as English, once as a regex in
the notation of NL-RX-SYNTH (``&`` is intersection, ``~`` complement). Each operator opens with its
own words, so that a description has exactly one reading, and a synonym never changes the regex.

Source: the grammar of NL-RX-SYNTH, arXiv:1608.03000.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

SYSTEM_PROMPT = "Convert natural language to regular expression."
SPLITS = ("train", "heldout")

_OPENINGS = ("lines with", "lines having")
_LEAVES = {
    "a number": "[0-9]",
    "a letter": "[A-Za-z]",
    "a capital letter": "[A-Z]",
    "a lower-case letter": "[a-z]",
    "a vowel": "[AEIOUaeiou]",
    "a character": ".",
    "the string 'dog'": "dog",
    "the string 'truck'": "truck",
    "the string 'ring'": "ring",
    "the string 'lake'": "lake",
}


@dataclass(frozen=True)
class Operator:
    """One operator: its English phrasings and its regex, with a slot per operand.

    ``{n}`` is a repetition count. An idempotent operator never gets the same operand twice.
    """

    phrasings: tuple[str, ...]
    regex: str
    arity: int
    idempotent: bool = False


OPERATORS = {
    "not": Operator(("not {0}", "anything but {0}"), "~({0})", 1),
    "starts_with": Operator(("text starting with {0}", "text beginning with {0}"), "({0})(.*)", 1),
    "ends_with": Operator(("text ending with {0}", "text finishing with {0}"), "(.*)({0})", 1),
    "contains": Operator(("text containing {0}", "text including {0}"), ".*({0}).*", 1),
    "word": Operator(("the word {0}",), r"\b({0})\b", 1),
    "star": Operator(("zero or more of {0}", "any number of {0}"), "({0})*", 1),
    "at_least": Operator(("{n} or more of {0}", "at least {n} of {0}"), "({0}){{{n},}}", 1),
    "or": Operator(("either {0} or {1}",), "({0})|({1})", 2, idempotent=True),
    "and": Operator(("both {0} and {1}",), "({0})&({1})", 2, idempotent=True),
    "followed_by": Operator(("first {0} then {1}", "first {0} before {1}"), "({0}).*({1})", 2),
}
_REPETITIONS = range(2, 8)


@dataclass(frozen=True)
class Expression:
    """A node of an expression tree; a leaf has no operator.

    Attributes:
        text: The English of the whole subtree.
        regex: The regular expression of the whole subtree.
        operator: A key of ``OPERATORS``, or None for a character class or a string.
        operands: The subtrees, in reading order.
    """

    text: str
    regex: str
    operator: str | None = None
    operands: tuple[Expression, ...] = ()

    @property
    def depth(self) -> int:
        """Operators on the longest way to a leaf; 0 for a leaf."""
        return 1 + max(child.depth for child in self.operands) if self.operator else 0

    def operators(self) -> list[str]:
        """Every operator of the tree, with repetitions, in reading order."""
        own = [self.operator] if self.operator else []
        return own + [name for child in self.operands for name in child.operators()]

    def operator_pairs(self) -> set[str]:
        """``"outer>inner"`` for every operator that is directly inside another one."""
        pairs = {f"{self.operator}>{child.operator}" for child in self.operands if child.operator}
        return pairs.union(*(child.operator_pairs() for child in self.operands))


def random_expression(rng: random.Random, depth: int) -> Expression:
    """Draws a tree of exactly the given depth: a uniform operator at every inner node."""
    if depth == 0:
        text = rng.choice(list(_LEAVES))
        return Expression(text, _LEAVES[text])
    name = rng.choice(list(OPERATORS))
    operator = OPERATORS[name]
    depths = [depth - 1, *(rng.randrange(depth) for _ in range(operator.arity - 1))]
    rng.shuffle(depths)
    operands = tuple(random_expression(rng, operand_depth) for operand_depth in depths)
    if operator.idempotent and operands[0].regex == operands[1].regex:
        return random_expression(rng, depth)
    n = rng.choice(_REPETITIONS)
    text = rng.choice(operator.phrasings).format(*(child.text for child in operands), n=n)
    regex = operator.regex.format(*(child.regex for child in operands), n=n)
    return Expression(text, regex, name, operands)


def split_of(regex: str) -> str:
    """The split an expression belongs to: one regex in ten is held out.

    A fixed function of the regex, so no held-out expression, in whatever wording, is ever in a
    training set of any seed, size or depth.
    """
    digest = hashlib.blake2b(regex.encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") % 10 == 0]


def samples(
    *, seed: int = 0, split: str = "train", min_depth: int = 1, max_depth: int = 2
) -> Iterator[dict]:
    """An endless stream of samples of one split, without repeated texts.

    Args:
        seed: Equal seeds give equal streams, on every machine.
        split: ``"train"`` or ``"heldout"``; see ``split_of``.
        min_depth: Least nesting depth; 0 is a bare character class or string.
        max_depth: Greatest nesting depth. Depths are drawn uniformly, as long as a
            depth has new texts.
    Yields:
        ``messages`` ([system, user, assistant], as in a JSONL line), ``depth`` (int), ``operators``
        (list of names) and ``operator_pairs`` (sorted list of ``"outer>inner"``).
    Raises:
        ValueError: An argument is out of range, or the stream has run dry because the depth admits
            no further text.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if not 0 <= min_depth <= max_depth:
        raise ValueError(
            f"expected 0 <= min_depth <= max_depth, got min_depth={min_depth}, "
            f"max_depth={max_depth}"
        )
    return _stream(random.Random(seed), split, min_depth, max_depth)


def _stream(rng: random.Random, split: str, min_depth: int, max_depth: int) -> Iterator[dict]:
    seen: set[str] = set()
    misses = 0
    while misses < 100_000:
        expression = random_expression(rng, rng.randint(min_depth, max_depth))
        text = f"{rng.choice(_OPENINGS)} {expression.text}"
        if text in seen or split_of(expression.regex) != split:
            misses += 1
            continue
        misses = 0
        seen.add(text)
        yield {
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": text},
                {"role": "assistant", "content": expression.regex},
            ],
            "depth": expression.depth,
            "operators": expression.operators(),
            "operator_pairs": sorted(expression.operator_pairs()),
        }
    raise ValueError(
        f"depth {min_depth} to {max_depth} gives only about {len(seen)} different {split} texts: "
        "ask for fewer samples or a greater max_depth"
    )


def generate(
    count: int, *, seed: int = 0, split: str = "train", min_depth: int = 1, max_depth: int = 2
) -> list[dict]:
    """The first ``count`` elements of ``samples`` with the same arguments."""
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    stream = samples(seed=seed, split=split, min_depth=min_depth, max_depth=max_depth)
    return [next(stream) for _ in range(count)]
