"""When a model's answer counts as correct: one rule per kind of data, as in the LLM-JEPA paper."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from os import PathLike
from typing import Any

from llmjepa_kernels.evaluation.sql import SpiderDatabases

Sample = Mapping[str, Any]

RULES = ("exact", "startswith", "number", "sql", "any", "choice")
RULE_OF_RECIPE = {
    "gsm8k": "number",
    "hellaswag": "choice",
    "nq_open": "any",
    "rotten_tomatoes": "startswith",
    "spider": "sql",
    "yelp": "startswith",
}
CHOICES = ("A", "B", "C", "D")
_NUMBER = re.compile(
    r"####[ \t]*([-+\u2212]?)[ \t]*[$€£¥]?[ \t]*([-+\u2212]?)"
    r"(\d[\d,]*(?![\d,])(?:\.\d+(?!\d))?|\.\d+(?!\d))"
    r"(?![/:^_]|\.\d|[eE][-+]?\d|[ \t]*\*[ \t]*\d|[ \t]+\d)",  # all of it, or none
    re.ASCII,
)


@dataclass(frozen=True)
class Rule:
    """Judges completions.

    Attributes:
        name: One of ``RULES``.
        is_correct: Takes a completion and its sample.
        check: Raises a ValueError or OSError if a sample's own answer is none by this rule, so
            that it is found before anything is generated.
        choices: If any, the model does not write but picks the most likely of these.
    """

    name: str
    is_correct: Callable[[str, Sample], bool]
    check: Callable[[Sample], None]
    choices: tuple[str, ...] = ()


def default_rule(recipe: str | None, template: str = "chat") -> str:
    """The rule by which the paper judges this data.

    Args:
        recipe: One of ``RECIPES``, if any.
        template: Of the `ExampleFormat`; "plain" is that of the paper's pretraining.
    """
    return RULE_OF_RECIPE.get(recipe or "", "startswith" if template == "plain" else "exact")


def answer_rule(name: str = "exact", *, databases: str | PathLike[str] | None = None) -> Rule:
    """The rule of that name.

    - ``exact``: the answer to the letter, white space around it aside (NL-RX).
    - ``startswith``: it begins with the answer, whatever follows (Rotten Tomatoes, Yelp, and models
      pretrained in the plain format).
    - ``number``: the number after ``####``, whatever its notation (GSM8K). Of several markers the
      first with a number after it counts, so a model that goes on to another question keeps its
      answer to this one.
    - ``sql``: a query with the same result; see ``SpiderDatabases``.
    - ``any``: it contains one of the answers listed with ``"; "`` between them in whole words, both
      without case, punctuation and articles as is the custom for NQ-Open. So a completion that
      lists several answers, as the training data do, is right if one of them is. The authors'
      script asks the reverse, whether the completion is a part of the reference, which the empty
      string is.
    - ``choice``: the most likely of A, B, C and D (HellaSwag).

    Args:
        name: One of ``RULES``.
        databases: For ``sql``: the directory of ``db_id/db_id.sqlite``.
    Raises:
        ValueError: The name is unknown, or ``databases`` is missing or not for this rule.
        NotADirectoryError: There is no such directory.
    """
    if name not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {name!r}")
    if name == "sql":
        if databases is None:
            raise ValueError("rule sql needs databases, the directory of db_id/db_id.sqlite")
        spider = SpiderDatabases(databases)
        return Rule(name, spider.is_correct, spider.check)
    if databases is not None:
        raise ValueError(f"databases is for rule sql, got rule {name}")
    return _TEXT_RULES[name]


def answer_of(sample: Sample) -> str:
    """The reference: what the assistant says in the last turn."""
    return sample["messages"][-1]["content"]


def number_after_marker(text: str) -> Decimal | None:
    """The first number that follows a ``####``, without currency and thousands separators."""
    match = _NUMBER.search(text)
    if not match or (match[1] and match[2]):
        return None
    magnitude = Decimal(match[3].replace(",", ""))
    return -magnitude if match[1] + match[2] in ("-", "\u2212") else magnitude


def listed_answers(text: str) -> set[str]:
    """The answers between ``"; "``, in lower case, without punctuation and articles.

    An answer of nothing else, such as ``+``, stays as it is.

    Source: SQuAD's evaluation, arXiv:1606.05250, which NQ-Open's follows.
    """
    return _listed(text, "")


def _listed(text: str, in_place: str) -> set[str]:
    return {_normalized(part, in_place) for part in text.split("; ")} - {""}


def _normalized(text: str, in_place: str) -> str:
    """Without punctuation, with something else in its place."""
    plain = "".join(in_place if _is_punctuation(c) else c for c in _nfc(text).lower())
    words = re.sub(r"\b(a|an|the)\b", " ", plain).split()
    return " ".join(words) or text.lower().strip()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _nfc(text: str) -> str:
    """Without white space around it, in the form that many tokenizers give texts."""
    return unicodedata.normalize("NFC", text).strip()


def _matches(completion: str, sample: Sample) -> bool:
    return _nfc(completion) == _nfc(answer_of(sample))


def _accept(sample: Sample) -> None:
    """Any answer can be matched to the letter."""


def _has_the_number(completion: str, sample: Sample) -> bool:
    number = number_after_marker(completion)
    return number is not None and number == number_after_marker(answer_of(sample))


def _begins(completion: str, sample: Sample) -> bool:
    return _nfc(completion).startswith(_nfc(answer_of(sample)))


def _contains_a_listed_one(completion: str, sample: Sample) -> bool:
    # Punctuation may be a part of words, as in U.S., or between them.
    for in_place in ("", " "):
        written = f" {_normalized(completion, in_place)} "
        if any(f" {answer} " in written for answer in _listed(answer_of(sample), in_place)):
            return True
    return False


def _expect(test: Callable[[str], Any], expected: str, sample: Sample) -> None:
    if not test(answer_of(sample)):
        raise ValueError(f"expected {expected} as the answer, got {answer_of(sample)!r}")


_expect_number = partial(
    _expect, lambda text: number_after_marker(text) is not None, "a number after ####"
)
_expect_list = partial(_expect, listed_answers, 'answers separated by "; "')
_expect_choice = partial(_expect, lambda text: text.strip() in CHOICES, "A, B, C or D")

_TEXT_RULES = {
    "exact": Rule("exact", _matches, _accept),
    "startswith": Rule("startswith", _begins, _accept),
    "number": Rule("number", _has_the_number, _expect_number),
    "any": Rule("any", _contains_a_listed_one, _expect_list),
    "choice": Rule("choice", _matches, _expect_choice, CHOICES),
}
