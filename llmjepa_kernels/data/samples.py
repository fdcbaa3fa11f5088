"""Samples from JSONL files and `datasets`, checked line by line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from llmjepa_kernels.data.chat_formats import messages_of
from llmjepa_kernels.data.messages import (
    check_views,
    checked_messages,
    content_text,
    turns_of_views,
)
from llmjepa_kernels.data.recipes import RECIPES, Recipe
from llmjepa_kernels.data.sources import Rows, Source, open_rows


def read_chats(
    source: Source,
    *,
    recipe: str | Recipe | None = None,
    on_error: Callable[[ValueError], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Streams checked samples; at no time is more than one in memory.

    A sample has ``messages``, see `chat_example`; other stacks' forms of a chat become such, see
    `messages_of`. It may have ``text`` and ``code``,
    its own views in place of the user's and the assistant's content, given as a string or as a list
    of one turn and yielded as a string; ``views``, further ones by name, each a string or a turn;
    ``pairs``, the names of the views that predict each other; and ``view_turn``, the answer of
    several that is Code: see `chat_example`. Keys of these
    whose value is null, as ``datasets`` fills gaps, are left out. Other keys are kept. Blank lines
    at the end of a file or between samples are no samples.

    Args:
        source: A JSONL path, a directory, a data set of the hub, or an iterable of paths and of
            mappings, such as a ``Dataset`` or ``IterableDataset``: see `open_rows`.
        recipe: Makes a sample, or a list of some, of a row with other columns: a key of
            ``RECIPES`` or a function.
        on_error: Called with the error of a bad sample, which is then left out. Default: raise.
    Yields:
        A new dictionary per sample, in order.
    Raises:
        ValueError: A sample is malformed; begins with file and line, or with the row's index.
        FileNotFoundError: A path does not exist; raised before anything is yielded if ``source``
            is a single path.
        ImportError: The package datasets is needed and missing.
    """
    return (sample for _, sample in located_chats(source, recipe=recipe, on_error=on_error))


def located_chats(
    source: Source,
    *,
    recipe: str | Recipe | None = None,
    on_error: Callable[[ValueError], None] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same, each sample behind the place that it is from: ``file:line`` or ``row index``.

    With a `shard` of (i, n) only every n-th row, from the i-th on, is looked at.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {sorted(RECIPES)}, got {recipe!r}")
        recipe = RECIPES[recipe]
    return _stream(islice(open_rows(source), shard[0], None, shard[1]), recipe, on_error)


def _stream(
    rows: Rows, recipe: Recipe | None, on_error: Callable[[ValueError], None] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, load in rows:
        try:
            row = load()
            if not isinstance(row, Mapping):
                found = type(row).__name__
                raise ValueError(f'expected an object, as {{"messages": …}}, got {found}')
            made = recipe(row) if recipe else row
            samples = [_sample(each) for each in ([made] if isinstance(made, Mapping) else made)]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            located = ValueError(f"{place}: {_reason(error)}")
            if on_error is None:
                raise located from error
            on_error(located)
        else:
            yield from ((place, sample) for sample in samples)


def _reason(error: Exception) -> str:
    """What is wrong with a row, in words that do not ask for knowledge of Python."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply to be read"
    if isinstance(error, ValueError):
        return str(error)
    return f"the recipe failed with {type(error).__name__}: {error}"


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    messages, made_of = messages_of(row)
    sample: dict[str, Any] = {"messages": checked_messages(messages)}
    sample |= {key: value for key, value in row.items() if key not in {*made_of, "messages"}}
    for name, role in (("text", "user"), ("code", "assistant")):
        view = sample.pop(name, None)
        if view is None:
            continue
        if isinstance(view, list):
            if len(view) != 1 or not isinstance(view[0], Mapping) or view[0].get("role") != role:
                raise ValueError(f"{name} must be a string or one {role} turn, got {view!r}")
            view = view[0].get("content")
        sample[name] = content_text(view, name)
    view_turn = sample.pop("view_turn", None)
    if view_turn is not None:
        turns_of_views(sample["messages"], view_turn)
        sample["view_turn"] = view_turn
    views, pairs = sample.pop("views", None), sample.pop("pairs", None)
    if isinstance(views, Mapping):
        views = {name: _only(view) for name, view in views.items() if view is not None}
    check_views(views, pairs)
    return sample | {k: v for k, v in (("views", views), ("pairs", pairs)) if v is not None}


def _only(view: Any) -> Any:
    """The turn, where a view is given as a list of one."""
    return view[0] if isinstance(view, list) and len(view) == 1 else view
