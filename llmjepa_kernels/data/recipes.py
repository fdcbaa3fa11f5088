"""Rows of well-known datasets → the chats of the LLM-JEPA authors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from llmjepa_kernels.data.grammar import SYSTEM_PROMPT as REGEX_PROMPT
from llmjepa_kernels.data.messages import is_list

Row = Mapping[str, Any]
Recipe = Callable[[Row], "Row | Sequence[Row]"]


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"expected the column {name!r}, got {sorted(map(str, row))}")
    return row[name]


def _text(row: Row, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r}")
    return value


def _texts(row: Row, name: str, least: int, most: int | None = None) -> list[str]:
    """A list of so many strings."""
    value = _column(row, name)
    if (
        not is_list(value)
        or not least <= len(value) <= (most or len(value))
        or not all(isinstance(text, str) for text in value)
    ):
        number = least if most == least else f"{least} or more"
        raise ValueError(f"{name} must be a list of {number} strings, got {value!r}")
    return list(value)


def _label(row: Row, num_labels: int, name: str = "label") -> int:
    """An integer or its digits; neither 1.9 nor true, which are somebody's mistake."""
    value = _column(row, name)
    digits = isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip())
    label = int(value) if digits or type(value) is int else -1
    if not 0 <= label < num_labels:
        raise ValueError(f"{name} must be an integer in 0 .. {num_labels - 1}, got {value!r}")
    return label


def _chat(system: str, user: str, assistant: str, **views: str) -> dict[str, Any]:
    contents = zip(("system", "user", "assistant"), (system, user, assistant), strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in contents], **views}


def _gsm8k(row: Row) -> Row:
    system = "Answer the math question, show steps."
    return _chat(system, _text(row, "question"), _text(row, "answer"))


def _hellaswag(row: Row) -> Row:
    context, label = _text(row, "ctx"), _label(row, 4)
    endings = _texts(row, "endings", 4, 4)
    options = [f"{letter}) {ending}" for letter, ending in zip("ABCD", endings, strict=True)]
    return _chat(
        "Which one of A), B), C), or D) is the best ending for the context? Answer A, B, C, or D.",
        "\n".join([context, *options]),
        "ABCD"[label],
        text=context,
        code=endings[label],
    )


def _nl_rx(row: Row) -> Row:
    """SYNTH and TURK."""
    return _chat(REGEX_PROMPT, _text(row, "src"), _text(row, "targ"))


def _nq_open(row: Row) -> Row:
    """A string stands for one answer."""
    question, answer = _text(row, "question"), _column(row, "answer")
    if not isinstance(answer, str):
        answer = "; ".join(_texts(row, "answer", 1))
    return _chat("Answer the question below.", question, answer)


def _spider(row: Row) -> Row:
    question = f"For db_id:[{_text(row, 'db_id')}]\n\n{_text(row, 'question')}"
    return _chat("Convert natural language to SQL.", question, _text(row, "query"))


def _sentiment(*labels: str) -> Recipe:
    system = "Determine whether the comment is positive or negative"
    return lambda row: _chat(system, _text(row, "text"), labels[_label(row, len(labels))])


PARAPHRASE_COLUMNS = (
    ("sentence1", "sentence2"),  # GLUE's MRPC, PAWS
    ("question1", "question2"),  # Quora
    ("text", "paraphrase"),
)


def _paraphrases(row: Row) -> list[Row]:
    """Each paraphrase of a group followed by the next one, as in the paper; no system prompt."""
    for name in ("label", "is_duplicate"):
        if row.get(name) is not None and not _says_yes(row, name):
            raise ValueError(
                f"{name} says that these are no paraphrases, got {row[name]!r}: give pairs with "
                f"{name} 1 only, or leave bad rows out"
            )
    if row.get("paraphrases") is not None:
        group = _texts(row, "paraphrases", 2)
    else:
        columns = next((pair for pair in PARAPHRASE_COLUMNS if row.keys() >= set(pair)), None)
        if columns is None:
            known = ["paraphrases", *map(" and ".join, PARAPHRASE_COLUMNS)]
            raise ValueError(
                f"expected the columns {' or '.join(known)}, got {sorted(map(str, row))}"
            )
        group = [_text(row, column) for column in columns]
    return [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in pairwise(group)
    ]


def _says_yes(row: Row, name: str) -> bool:
    """Quora's is_duplicate is true or false, which other labels must not be."""
    value = row[name]
    if name == "is_duplicate" and isinstance(value, bool):
        return value
    return _label(row, 2, name) == 1


# By the name of the dataset, whose columns are those on the Hugging Face hub.
RECIPES: dict[str, Recipe] = {
    "gsm8k": _gsm8k,
    "hellaswag": _hellaswag,
    "nl_rx": _nl_rx,
    "nq_open": _nq_open,
    "paraphrase": _paraphrases,
    "rotten_tomatoes": _sentiment("Bad", "Good"),
    "spider": _spider,
    "yelp": _sentiment("Very Bad", "Bad", "Mediocre", "Good", "Very Good"),
}
