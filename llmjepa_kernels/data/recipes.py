"""Rows of well-known datasets → the chats of the LLM-JEPA authors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from llmjepa_kernels.data.grammar import SYSTEM_PROMPT as REGEX_PROMPT

Recipe = Callable[[Mapping[str, Any]], "Mapping[str, Any] | Sequence[Mapping[str, Any]]"]


def _chat(system: str, user: str, assistant: str, **views: str) -> dict[str, Any]:
    contents = zip(("system", "user", "assistant"), (system, user, assistant), strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in contents], **views}


def _label(row: Mapping[str, Any], num_labels: int) -> int:
    label = int(row["label"])
    if not 0 <= label < num_labels:
        raise ValueError(f"label must be in 0 .. {num_labels - 1}, got {row['label']!r}")
    return label


def _hellaswag(row: Mapping[str, Any]) -> dict[str, Any]:
    label, endings = _label(row, 4), row["endings"]
    options = [f"{letter}) {ending}" for letter, ending in zip("ABCD", endings, strict=True)]
    return _chat(
        "Which one of A), B), C), or D) is the best ending for the context? Answer A, B, C, or D.",
        "\n".join([row["ctx"], *options]),
        "ABCD"[label],
        text=row["ctx"],
        code=endings[label],
    )


def _sentiment(*labels: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    system = "Determine whether the comment is positive or negative"
    return lambda row: _chat(system, row["text"], labels[_label(row, len(labels))])


PARAPHRASE_COLUMNS = (
    ("sentence1", "sentence2"),  # GLUE's MRPC, PAWS
    ("question1", "question2"),  # Quora
    ("text", "paraphrase"),
)


def _paraphrases(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each paraphrase of a group followed by the next one, as in the paper; no system prompt."""
    group = row.get("paraphrases")
    if group is None:
        columns = next((pair for pair in PARAPHRASE_COLUMNS if row.keys() >= set(pair)), None)
        if columns is None:
            known = ["paraphrases", *map(" and ".join, PARAPHRASE_COLUMNS)]
            raise ValueError(f"expected the columns {' or '.join(known)}, got {sorted(row)}")
        group = [row[column] for column in columns]
    if row.get("label", 1) != 1:
        raise ValueError(f"its label says that these are no paraphrases: {row['label']!r}")
    if not isinstance(group, list) or len(group) < 2:
        raise ValueError(f"paraphrases must be a list of at least two, got {group!r}")
    return [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in pairwise(group)
    ]


# The columns of the datasets on the Hugging Face hub → the chats of the LLM-JEPA authors.
RECIPES: dict[str, Recipe] = {
    "gsm8k": lambda row: _chat(
        "Answer the math question, show steps.", row["question"], row["answer"]
    ),
    "hellaswag": _hellaswag,
    "nq_open": lambda row: _chat(
        "Answer the question below.", row["question"], "; ".join(row["answer"])
    ),
    "nl_rx": lambda row: _chat(REGEX_PROMPT, row["src"], row["targ"]),  # SYNTH and TURK
    "paraphrase": _paraphrases,
    "rotten_tomatoes": _sentiment("Bad", "Good"),
    "spider": lambda row: _chat(
        "Convert natural language to SQL.",
        f"For db_id:[{row['db_id']}]\n\n{row['question']}",
        row["query"],
    ),
    "yelp": _sentiment("Very Bad", "Bad", "Mediocre", "Good", "Very Good"),
}
