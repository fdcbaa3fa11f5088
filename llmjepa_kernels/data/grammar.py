"""A built-in source of (natural language, regular expression) pairs that needs no download.

Every pair is rendered twice from one random expression tree: once as English, once as a regex in
the notation of NL-RX-SYNTH (`&` is intersection, `~` complement). Each operator opens with its own
words, so that a description has exactly one reading, and a synonym never changes the regex.

Source: the grammar of NL-RX-SYNTH, arXiv:1608.03000.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

from llmjepa_kernels.data.regex_structure import structure

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
    arity: int = 1
    idempotent: bool = False


OPERATORS = {
    "not": Operator(("not {0}", "anything but {0}"), "~({0})"),
    "starts_with": Operator(("text starting with {0}", "text beginning with {0}"), "({0})(.*)"),
    "ends_with": Operator(("text ending with {0}", "text finishing with {0}"), "(.*)({0})"),
    "contains": Operator(("text containing {0}", "text including {0}"), ".*({0}).*"),
    "word": Operator(("the word {0}",), r"\b({0})\b"),
    "star": Operator(("zero or more of {0}", "any number of {0}"), "({0})*"),
    "repeat": Operator(("{n} or more of {0}", "at least {n} of {0}"), "({0}){{{n},}}"),
    "or": Operator(("either {0} or {1}",), "({0})|({1})", arity=2, idempotent=True),
    "and": Operator(("both {0} and {1}",), "({0})&({1})", arity=2, idempotent=True),
    "followed_by": Operator(("first {0} then {1}", "first {0} before {1}"), "({0}).*({1})", 2),
}
_REPETITIONS = range(2, 8)


def random_expression(rng: random.Random, depth: int) -> tuple[str, str]:
    """Text and regex of a random tree of exactly this depth; all operators are equally likely."""
    if depth == 0:
        return rng.choice(list(_LEAVES.items()))
    operator = rng.choice(list(OPERATORS.values()))
    depths = [depth - 1, *(rng.randrange(depth) for _ in range(operator.arity - 1))]
    rng.shuffle(depths)
    operands = [random_expression(rng, operand_depth) for operand_depth in depths]
    texts, regexes = zip(*operands, strict=True)
    if operator.idempotent and regexes[0] == regexes[1]:
        return random_expression(rng, depth)
    n = rng.choice(_REPETITIONS)
    return rng.choice(operator.phrasings).format(*texts, n=n), operator.regex.format(*regexes, n=n)


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
        max_depth: Greatest nesting depth. Depths are drawn uniformly, as long as each has new
            texts.
    Yields:
        ``messages`` ([system, user, assistant], as in a JSONL line) and what ``structure`` says of
        the regex: ``depth``, ``operators``, ``operator_pairs``.
    Raises:
        ValueError: An argument is out of range, or the depths admit no further text.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if not 0 <= min_depth <= max_depth:
        raise ValueError(
            f"expected 0 <= min_depth <= max_depth, got min_depth={min_depth}, "
            f"max_depth={max_depth}"
        )
    return _stream(random.Random(seed), split, min_depth, max_depth)


def generate(
    count: int, *, seed: int = 0, split: str = "train", min_depth: int = 1, max_depth: int = 2
) -> list[dict]:
    """The first ``count`` of ``samples`` with the same arguments."""
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    stream = samples(seed=seed, split=split, min_depth=min_depth, max_depth=max_depth)
    return list(islice(stream, count))


def _stream(rng: random.Random, split: str, min_depth: int, max_depth: int) -> Iterator[dict]:
    seen: set[str] = set()
    misses = 0
    while misses < 100_000:
        expression, regex = random_expression(rng, rng.randint(min_depth, max_depth))
        text = f"{rng.choice(_OPENINGS)} {expression}"
        if text in seen or split_of(regex) != split:
            misses += 1
            continue
        misses = 0
        seen.add(text)
        turns = {"system": SYSTEM_PROMPT, "user": text, "assistant": regex}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        made_of = {k: v if k == "depth" else list(v) for k, v in asdict(structure(regex)).items()}
        yield {"messages": messages, **made_of}
    raise ValueError(
        f"depth {min_depth} to {max_depth} gives only about {len(seen)} different {split} texts: "
        "ask for fewer samples or a greater max_depth"
    )
