"""What messages and views a sample may have, and their contents as strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmjepa_kernels.checks import check_whole

Turn = dict[str, Any]  # role and content, and a weight of 0 if it is context only

ROLES = ("system", "user", "assistant", "tool")
PLACEHOLDER = "x"  # an answer that is like most
# Keys of a turn that chat templates write beside its content, which would be dropped here.
RENDERED_KEYS = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking")
# Of an assistant turn; 0 or false if it is context, and not to be learnt.
WEIGHT_KEYS = ("weight", "train")


def checked_messages(messages: Any) -> list[Turn]:
    """The turns of a chat, each with its role, its content as a string, and a weight if that is 0.

    Args:
        messages: An optional system turn, then user, assistant and tool turns, the last of which
            is an assistant's, with a user's before it.
    Raises:
        ValueError: They are something else, or a content is no text, or no answer is to be learnt.
    """
    if not is_list(messages):
        raise ValueError(f"messages must be a list of turns, got {type(messages).__name__}")
    turns = []
    for i, message in enumerate(messages):
        for key in RENDERED_KEYS if isinstance(message, Mapping) else ():
            if message.get(key) not in (None, [], ""):
                raise ValueError(
                    f"messages[{i}] has {key}, which would be lost: write it into the content, "
                    f"as the chat template would, and leave the key out; got {message[key]!r}"
                )
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"messages[{i}] must have the keys role and content, got {message!r}")
        content = content_text(message["content"], f"the content of messages[{i}]")
        turn = {"role": message["role"], "content": content}
        for key in WEIGHT_KEYS:
            if message.get(key) not in (None, 0, 1):
                raise ValueError(f"messages[{i}] must have a {key} of 0 or 1, got {message[key]!r}")
            if message.get(key) == 0 and turn["role"] == "assistant":
                turn["weight"] = 0
        turns.append(turn)
    roles = [turn["role"] for turn in turns]
    if (
        not all(role in ROLES for role in roles)
        or "system" in roles[1:]
        or "user" not in roles
        or roles[-1] != "assistant"
    ):
        raise ValueError(
            "messages must have the roles [system,] user, assistant, with further user, assistant "
            f"and tool turns before the last assistant, got {roles}"
        )
    if not learnt_answers(turns):
        raise ValueError("messages must have an assistant turn to learn, all have a weight of 0")
    return turns


def learnt_answers(turns: Sequence[Turn]) -> list[int]:
    """The indices of the assistant turns of `checked_messages` that are not context only."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    return [i for i in answers if "weight" not in turns[i]]


def turns_of_views(turns: Sequence[Mapping[str, str]], view_turn: Any = -1) -> tuple[int, int]:
    """The indices of the turns that are Text and Code.

    Args:
        turns: From `checked_messages`.
        view_turn: Which of the assistant's turns is Code: 0 the first, −1 the last one. Text is the
            last user turn before it.
    Raises:
        ValueError: There is none.
    """
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    check_whole("view_turn", view_turn, least=-len(answers), most=len(answers) - 1)
    code = answers[view_turn]
    asked = [i for i, turn in enumerate(turns[:code]) if turn["role"] == "user"]
    if not asked:
        raise ValueError(f"view_turn={view_turn} is an answer that no user turn is before")
    return asked[-1], code


def with_placeholder_answer(messages: Any) -> list[Turn]:
    """The turns with some assistant turn at their end, in place of their own if they have one."""
    asked = list(messages) if is_list(messages) else messages
    if isinstance(asked, list):
        if asked and isinstance(asked[-1], Mapping) and asked[-1].get("role") == "assistant":
            asked.pop()
        asked.append({"role": "assistant", "content": PLACEHOLDER})
    return checked_messages(asked)


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
    if not is_list(pairs):
        raise ValueError(f"pairs must be a list of pairs of views, got {pairs!r}")
    for i, pair in enumerate(pairs):
        if not is_list(pair) or len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"pairs[{i}] must name two different views, got {pair!r}")
        for name in pair:
            if name not in names:
                raise ValueError(f"pairs[{i}] must name views out of {names}, got {name!r}")
        if list(pair) in map(list, pairs[:i]):
            raise ValueError(f"pairs must not repeat a pair, got {pair!r} twice")


def content_text(content: Any, name: str) -> str:
    """The content as a string, the texts of a list of parts one after the other.

    Raises:
        ValueError: It has parts other than text, or is no string with more than white space in it.
    """
    if is_list(content):
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"{name} must be a string or a list of parts of type text, as "
                    f'{{"type": "text", "text": …}}, got a part of type {kind}: {part!r}'
                )
        content = "".join(part["text"] for part in content)
    check_content(content, name)
    return content


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


def is_list(value: Any) -> bool:
    """Whether it is a sequence of something other than characters."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
