"""How deep a regex nests and which operators it is made of, for splits by composition."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_LITERALS = re.compile(r"[^][().|&~*+?{}\\]+")
_CLASS = re.compile(r"\[\^?\]?[^\]]*\]")
_REPETITION = re.compile(r"[*+?]|\{\d+(?:,\d*)?\}")
_REPETITION_NAMES = {"*": "star", "+": "plus", "?": "optional", "{": "repeat"}

# The names of all operators that `structure` finds.
OPERATORS = (
    "or",
    "and",
    "not",
    "star",
    "plus",
    "optional",
    "repeat",
    "word",
    "concat",
    "starts_with",
    "ends_with",
    "contains",
    "followed_by",
)


@dataclass(frozen=True)
class Structure:
    """What a regex is made of.

    Attributes:
        depth: Operators on the longest way to a leaf; 0 for a character class or a string.
        operators: Every operator, with repetitions, the outer before the inner, left to right.
        operator_pairs: ``"outer>inner"`` for each operator directly inside another; sorted.
    """

    depth: int = 0
    operators: tuple[str, ...] = ()
    operator_pairs: tuple[str, ...] = ()


def structure(regex: str) -> Structure:
    r"""Reads the structure off a regex in the notation of NL-RX, with `&` and `~`.

    Operators are ``or``, ``and``, ``not``, ``star``, ``plus``, ``optional``, ``repeat`` (`{n,}` and
    its like), ``word`` (`\b`), ``concat`` and those that the gap `.*` makes, which is no operand:
    ``starts_with`` (`x.*`), ``ends_with`` (`.*x`), ``contains`` (`.*x.*`), ``followed_by``
    (`x.*y`). A chain such as `x|y|z` is one operator.

    Raises:
        ValueError: The regex is malformed; says where.
    """
    reader = _Reader(regex)
    result = reader.alternation()
    if reader.at < len(regex):
        reader.fail("expected its end")
    return result


class _Reader:
    """Recursive descent; `|` binds least, then `&`, concatenation, repetition and `~`."""

    def __init__(self, regex: str):
        self.regex = regex
        self.at = 0

    def fail(self, problem: str) -> None:
        raise ValueError(f"malformed regex {self.regex!r}: {problem} at column {self.at + 1}")

    def take(self, token: str | re.Pattern[str]) -> str:
        """Moves behind the token and returns it; the empty string if something else is there."""
        if isinstance(token, str):
            found = token if self.regex.startswith(token, self.at) else ""
        else:
            match = token.match(self.regex, self.at)
            found = match.group() if match else ""
        self.at += len(found)
        return found

    def alternation(self) -> Structure:
        return self.chain("or", "|", self.intersection)

    def intersection(self) -> Structure:
        return self.chain("and", "&", self.concatenation)

    def chain(self, name: str, symbol: str, operand: Callable[[], Structure]) -> Structure:
        operands = [operand()]
        while self.take(symbol):
            operands.append(operand())
        return _apply(name, operands) if len(operands) > 1 else operands[0]

    def concatenation(self) -> Structure:
        start = self.at
        items: list[Structure | None] = []  # None for a gap
        word = False
        while self.at < len(self.regex) and self.regex[self.at] not in "|&)":
            if self.take(r"\b"):
                word = True
            else:
                items.append(None if self.gap() else self.repetition())
        if self.at == start:
            self.fail("expected an expression")
        operands = [item for item in items if item is not None]
        if not operands:
            whole = Structure()
        elif len(operands) > 1:
            inner = items[items.index(operands[0]) : len(items) - items[::-1].index(operands[-1])]
            whole = _apply("followed_by" if None in inner else "concat", operands)
        elif len(items) > 1:
            before, after = items[0] is None, items[-1] is None
            names = {(True, True): "contains", (True, False): "ends_with"}
            whole = _apply(names.get((before, after), "starts_with"), operands)
        else:
            whole = operands[0]
        return _apply("word", [whole]) if word else whole

    def gap(self) -> bool:
        start = self.at
        found = self.take(".*") or self.take("(.*)")
        if found and not _REPETITION.match(self.regex, self.at):
            return True
        self.at = start
        return False

    def repetition(self) -> Structure:
        operand = self.atom()
        while symbol := self.take(_REPETITION):
            operand = _apply(_REPETITION_NAMES[symbol[0]], [operand])
        return operand

    def atom(self) -> Structure:
        if self.take("~"):
            return _apply("not", [self.atom()])
        if self.take("("):
            inner = self.alternation()
            if not self.take(")"):
                self.fail("expected ')'")
            return inner
        if self.take("\\"):
            if self.at == len(self.regex):
                self.fail("expected a character after '\\'")
            self.at += 1
        elif literals := self.take(_LITERALS):
            # A repetition takes the last character only.
            if len(literals) > 1 and _REPETITION.match(self.regex, self.at):
                self.at -= 1
        elif not (self.take(".") or self.take(_CLASS)):
            self.fail("expected an expression")
        return Structure()


def _apply(name: str, operands: Sequence[Structure]) -> Structure:
    pairs = {f"{name}>{operand.operators[0]}" for operand in operands if operand.operators}
    return Structure(
        depth=1 + max(operand.depth for operand in operands),
        operators=(name, *(inner for operand in operands for inner in operand.operators)),
        operator_pairs=tuple(sorted(pairs.union(*(o.operator_pairs for o in operands)))),
    )
