"""What messages and views a sample may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_messages(messages: Any) -> None:
    """Raises ValueError unless messages are an optional system, a user and an assistant turn."""
    if not _is_list(messages):
        raise ValueError(f"messages must be a list of turns, got {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"messages[{i}] must have the keys role and content, got {message!r}")
        check_content(message["content"], f"the content of messages[{i}]")
    roles = [message["role"] for message in messages]
    if roles not in (["system", "user", "assistant"], ["user", "assistant"]):
        raise ValueError(f"messages must have the roles [system,] user, assistant, got {roles}")


def check_views(views: Any, pairs: Any) -> None:
    """Raises ValueError unless these are further views and pairs as ``chat_example`` takes them."""
    views = {} if views is None else views
    if not isinstance(views, Mapping):
        raise ValueError(f"views must map names to contents, got {type(views).__name__}")
    names = ["text", "code"]
    for name, view in views.items():
        if not isinstance(name, str) or name in names:
            raise ValueError(f"views must have names other than {names}, got {name!r}")
        if isinstance(view, Mapping):
            if view.get("role") not in ("user", "assistant") or "content" not in view:
                raise ValueError(
                    f"views[{name!r}] must be a string or a user or assistant turn, got {view!r}"
                )
            view = view["content"]
        check_content(view, f"views[{name!r}]")
    names += views
    if pairs is None:
        return
    if not _is_list(pairs):
        raise ValueError(f"pairs must be a list of pairs of views, got {pairs!r}")
    for i, pair in enumerate(pairs):
        if not _is_list(pair) or len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"pairs[{i}] must name two different views, got {pair!r}")
        for name in pair:
            if name not in names:
                raise ValueError(f"pairs[{i}] must name views out of {names}, got {name!r}")
        if list(pair) in map(list, pairs[:i]):
            raise ValueError(f"pairs must not repeat a pair, got {pair!r} twice")


def check_content(content: Any, name: str) -> None:
    """Raises ValueError unless content is a string with more than white space in it."""
    if not isinstance(content, str):
        raise ValueError(f"{name} must be a string, got {type(content).__name__}")
    if not content.strip():
        raise ValueError(f"{name} must not be empty, got {content!r}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None


def answered(messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The messages with some assistant turn in place of their own, checked."""
    asked = [m for m in messages if not (isinstance(m, Mapping) and m.get("role") == "assistant")]
    turns = [*asked, {"role": "assistant", "content": "x"}]
    check_messages(turns)
    return turns


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
