"""A tokenizer's chat template, and where it puts the contents of a conversation.

A template is a program, so spans are neither guessed from its source nor searched for in its
output. It is rendered once around placeholders, which gives the literals it puts before, between
and after the contents; every real rendering must then be exactly those literals around the real
contents. That rendering is tokenized once, so its tokens are those of
``tokenizer.apply_chat_template``.

A content ends with the last token that holds a character of it: where a tokenizer merges "?" and
the template's newline into one token, that token is the content's last.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """A tokenized text.

    Attributes:
        input_ids: Its tokens.
        offsets: The characters of each.
        num_behind: Tokens that the tokenizer has added behind the text.
        add_special_tokens: Whether it was asked for such.
    """

    input_ids: list[int]
    offsets: list[tuple[int, int]]
    num_behind: int
    add_special_tokens: bool

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False
    ) -> Tokens:
        encoded = tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=add_special_tokens,
        )
        offsets, behind = encoded["offset_mapping"], 0
        if add_special_tokens:  # those behind the text are said to be at its beginning, too
            mask = encoded["special_tokens_mask"]
            behind = next((n for n, own in enumerate(reversed(mask)) if not own), 0)
            offsets[len(offsets) - behind :] = [(len(text), len(text))] * behind
        return cls(encoded["input_ids"], offsets, behind, add_special_tokens)

    def cut(self, items: list[T], length: int | None) -> list[T]:
        """Items of each token, without those at the end of a text that is too long."""
        if length is None or len(items) <= length:
            return items
        behind = len(items) - self.num_behind
        return [*items[: max(length - self.num_behind, 0)], *items[behind:]]


@dataclass(frozen=True)
class Rendering:
    """A tokenized rendering: its tokens, and the tokens and characters of each content."""

    tokens: Tokens
    spans: list[tuple[int, int]]
    text: str
    char_spans: list[tuple[int, int]]

    @property
    def input_ids(self) -> list[int]:
        return self.tokens.input_ids

    @property
    def offsets(self) -> list[tuple[int, int]]:
        return self.tokens.offsets


def render(
    tokenizer: PreTrainedTokenizerBase,
    roles: tuple[str, ...],
    contents: Sequence[str],
    template_kwargs: Mapping[str, Any] | None,
    add_special_tokens: bool = False,
) -> Rendering:
    """Renders and tokenizes one conversation."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenizer must be a fast one, which knows the characters of a token, got "
            f"{type(tokenizer).__name__}"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: set tokenizer.chat_template, or use the plain "
            "format (plain_example)"
        )
    kwargs = template_kwargs or {}
    frames = _frames.setdefault(tokenizer, {})
    key = (str(tokenizer.chat_template), roles, repr(sorted(kwargs.items())))
    stale = frames.get(key)
    text, char_spans = stale.render(tokenizer, contents, kwargs) if stale else ("", None)
    if char_spans is None:
        # Also after a success: a template may write the date, and special tokens may be replaced.
        frames[key] = frame = _Frame.of(tokenizer, roles, kwargs)
        text, char_spans = frame.render(tokenizer, contents, kwargs)
    if char_spans is None:
        raise ValueError(
            "the chat template does not keep a content in one piece: expected "
            f"{list(contents)} between {list(frame.literals)}, got {text!r}"
        )
    tokens = Tokens.of(tokenizer, text, add_special_tokens)
    spans = [_content_span(tokenizer, tokens, text, *span) for span in char_spans]
    return Rendering(tokens, spans, text, char_spans)


def _content_span(
    tokenizer: PreTrainedTokenizerBase, tokens: Tokens, text: str, start: int, end: int
) -> tuple[int, int]:
    """The tokens of a content, without one of the template's that strips its white space."""
    offsets = tokens.offsets[: len(tokens.offsets) - tokens.num_behind]
    first, stop = token_span(offsets, start, end)
    begins_before = first < stop and offsets[first][0] < start
    if begins_before and tokens.input_ids[first] in tokenizer.added_tokens_decoder:
        first = token_span(offsets, end - len(text[start:end].lstrip()), end)[0]
    return first, stop


def token_span(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens that hold the characters start..end, as (first, last + 1).

    Several tokens may share the offsets of one character, and a token of white space may have
    empty ones, so the search goes by where tokens end and then takes in all that begin earlier.
    Where the tokenizer composes characters, none may end there.
    """
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    stop = bisect_left(offsets, end, lo=first, key=lambda offset: offset[1])
    if stop < len(offsets) and (offsets[stop][0] < end or offsets[stop] == (end, end)):
        stop += 1
    while stop < len(offsets) and offsets[stop][0] < end:
        stop += 1
    return first, min(max(stop, first + 1), len(offsets))


@dataclass(frozen=True)
class _Frame:
    """What a template puts around the contents of a conversation.

    Attributes:
        roles: The roles handed to the template.
        folded: The system content goes in front of the user content.
        literals: The text before each content, and after the last.
    """

    roles: tuple[str, ...]
    folded: bool = False
    literals: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...], kwargs: Mapping[str, Any]
    ) -> _Frame:
        """Renders placeholders in the first of the possible ways that the template accepts."""
        from jinja2 import TemplateError

        ways = [cls(roles)]
        if roles[0] == "system":
            ways.append(cls(roles[1:], folded=True))
        elif roles == ("assistant",):
            ways.append(cls(("user",)))
        placeholders = [f"\ue000{i}\ue001" for i in range(len(roles))]
        refusals = []
        for way in ways:
            try:
                rest = way._apply(tokenizer, placeholders, kwargs)
            except (TemplateError, OverflowError) as error:  # of an endless loop
                refusals.append(f"{list(way.roles)} is refused with {str(error)!r}")
                continue
            literals = []
            for placeholder in placeholders:
                before, _, rest = rest.partition(placeholder)
                literals.append(before)
            literals.append(rest)
            frame = cls(way.roles, way.folded, tuple(literals))
            # A content that is missing, repeated or out of order does not survive this.
            if (
                all("\ue000" not in literal for literal in literals)
                and frame.render(tokenizer, placeholders, kwargs)[1]
            ):
                return frame
            refusals.append(f"{list(way.roles)} does not give every content once and in order")
        raise ValueError(
            f"the chat template cannot render {list(roles)}: {'; '.join(refusals)}. Set "
            "tokenizer.chat_template to one that can, or use the plain format (plain_example)"
        )

    def _apply(
        self, tokenizer: PreTrainedTokenizerBase, contents: Sequence[str], kwargs: Mapping[str, Any]
    ) -> str:
        if self.folded:
            contents = [f"{contents[0]}\n\n{contents[1]}", *contents[2:]]
        messages = [
            {"role": role, "content": text} for role, text in zip(self.roles, contents, strict=True)
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        return cast(str, text)

    def render(
        self, tokenizer: PreTrainedTokenizerBase, contents: Sequence[str], kwargs: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The rendering and the characters of each content; None if it is not the literals'."""
        text = self._apply(tokenizer, contents, kwargs)
        end = len(self.literals[0])
        spans = []
        for content, literal in zip(contents, self.literals[1:], strict=True):
            kept = next((c for c in _trims(content) if text.startswith(c + literal, end)), None)
            if kept is None:
                return text, None
            spans.append((end, end + len(kept)))
            end += len(kept) + len(literal)
        return text, spans if text.startswith(self.literals[0]) and end == len(text) else None


_frames: weakref.WeakKeyDictionary[Any, dict[Any, _Frame]] = weakref.WeakKeyDictionary()


def _trims(content: str) -> Iterator[str]:
    """The content as templates write it: whole, or without the white space at its ends."""
    yield content
    if content != content.strip():
        for characters in (None, "\n"):
            yield content.lstrip(characters)
            yield content.rstrip(characters)
            yield content.strip(characters)
