"""Chats as other training stacks write them → ``messages``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmjepa_kernels.data.messages import WEIGHT_KEYS, is_list

# What ShareGPT calls the roles; of each, those of `ROLES`.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
}
TRL_KEYS = ("prompt", "completion")


def messages_of(row: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """The messages of a row, not yet checked, and the keys that they were made of.

    Args:
        row: With one of

            - ``messages``: turns with ``role`` and ``content``;
            - ``conversations``: turns with ``from`` and ``value`` (ShareGPT), and maybe a
              ``system`` prompt beside them;
            - ``prompt`` and ``completion`` (TRL): a string each, which become the user's and the
              assistant's content; or lists of turns with ``role`` and ``content``, which follow
              one another, and of which the completion's are learnt.
    Raises:
        ValueError: It has none of these; says what to do.
    """
    for key in ("tools", "functions", "documents"):
        if row.get(key):
            raise ValueError(
                f"{key} would be lost: write them into the system turn, as the chat template "
                f"would, and leave the key out; got {row[key]!r}"
            )
    if row.get("chat_template_kwargs"):
        raise ValueError(
            "chat_template_kwargs of a row would be lost: give them for all rows, as "
            f"template_kwargs, and leave the key out; got {row['chat_template_kwargs']!r}"
        )
    if row.get("messages") is not None:
        return row["messages"], {"messages"}
    if row.get("conversations") is not None:
        turns = _sharegpt(row["conversations"])
        if row.get("system"):
            turns.insert(0, {"role": "system", "content": row["system"]})
        return turns, {"conversations", "system"}
    if all(row.get(key) is not None for key in TRL_KEYS):
        return _prompt_and_completion(*(row[key] for key in TRL_KEYS)), set(TRL_KEYS)
    hint = ""
    if {"chosen", "rejected"} <= row.keys():
        hint = ": of preferences, give the chosen answer as completion"
    raise ValueError(
        "expected the key messages, conversations (ShareGPT), or prompt and completion (TRL), or "
        f"a recipe that makes messages of other columns, got the keys {sorted(map(str, row))}{hint}"
    )


def _sharegpt(conversations: Any) -> list[Any]:
    if not is_list(conversations):
        raise ValueError(
            f"conversations must be a list of turns, got {type(conversations).__name__}"
        )
    turns = []
    for i, turn in enumerate(conversations):
        if isinstance(turn, Mapping) and {"role", "content"} <= turn.keys():
            turns.append(turn)
            continue
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"conversations[{i}] must have the keys from and value, got {turn!r}")
        role = SHAREGPT_ROLES.get(str(turn["from"]))
        if role is None:
            raise ValueError(
                f"conversations[{i}] must be from one of {', '.join(SHAREGPT_ROLES)}, got "
                f"{turn['from']!r}"
            )
        turns.append({**turn, "role": role, "content": turn["value"]})
    return turns


def _context(turn: Any) -> Any:
    """A turn of a prompt, whose answers are not learnt unless it says so."""
    if not isinstance(turn, Mapping) or turn.get("role") != "assistant":
        return turn
    says = any(turn.get(key) is not None for key in WEIGHT_KEYS)  # Arrow fills in None
    return turn if says else {**turn, "weight": 0}


def _prompt_and_completion(prompt: Any, completion: Any) -> list[Any]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
    if is_list(prompt) and is_list(completion):
        return [*(_context(turn) for turn in prompt), *completion]
    raise ValueError(
        "prompt and completion must be two strings or two lists of turns, got "
        f"{type(prompt).__name__} and {type(completion).__name__}"
    )
