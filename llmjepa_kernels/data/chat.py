"""Chat messages and a tokenizer's chat template → ``Example``: where Text and Code begin and end.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llmjepa_kernels.packing import Example, Segment

LAYOUTS = ("shared", "official")
DIRECTIONS = ("text_to_code", "code_to_text", "both")
PRED_POSITIONS = ("append", "prepend")
SUPERVISE = ("assistant", "all")


def chat_example(
    messages: Sequence[Mapping[str, str]],
    tokenizer,
    *,
    layout: str = "shared",
    pred_ids: Sequence[int] = (),
    text: str | None = None,
    code: str | None = None,
    views: Mapping[str, str | Mapping[str, str]] | None = None,
    pairs: Sequence[Sequence[str]] | None = None,
    direction: str = "text_to_code",
    pred_position: str = "append",
    supervise: str = "assistant",
    template_kwargs: Mapping[str, Any] | None = None,
) -> Example:
    """The segments and view pairs of one chat.

    ``layout="shared"``: Text is the chat up to its last user token, the rest of the chat continues
    it, and [PRED] branches off it. ``layout="official"``: the chat, the user turn alone and the
    assistant turn alone are three separate sequences, each through the template. In both, Code is
    the assistant turn alone through the template, including whatever header or default system
    prompt the template then writes; every further view likewise is a turn alone. Views stop at
    their last content token: in a causal model the tokens after it cannot change its hidden state.
    The chat's segments come first.

    A template without a system role (Gemma) gets the system text, a blank line and the user text
    as the user content; one that refuses a lone assistant turn gets it under the user role.

    Args:
        messages: An optional system turn, a user turn and an assistant turn.
        tokenizer: A fast tokenizer with a chat template.
        layout: ``"shared"`` or ``"official"``.
        pred_ids: The k ≥ 0 [PRED] tokens; without any, a view's last content token predicts.
        text: Another Text than the user content. The shared layout branches off inside the user
            content if it starts with this text, and falls back to a user turn alone otherwise.
        code: Another Code than the assistant content.
        views: Further views by name: a content, which takes the assistant turn alone, as Code
            does; or a turn, whose ``role`` is "user" or "assistant".
        pairs: The (predictor, target) views to compare, by name; "text" and "code" are the two
            above. Default: Text with each of the others. A view in no pair costs nothing, and one
            that predicts several has [PRED] once. "infonce" takes the targets of all other pairs
            for negatives, also of the same chat.
        direction: ``"text_to_code"``: the pairs as they are; ``"code_to_text"``: each the other
            way round; ``"both"``: each in both ways.
        pred_position: ``"append"`` puts [PRED] behind a predicting view, ``"prepend"`` in front of
            the content of a copy of it, whose last content token then predicts.
        supervise: ``"assistant"``: the next-token loss is on the assistant content and the end of
            its turn; ``"all"``: on every token of the chat but the first.
        template_kwargs: Passed to ``apply_chat_template``, such as ``enable_thinking``.
    Raises:
        ValueError: The messages are malformed, an option is unknown, the tokenizer is not fast or
            has no chat template, or the template does not keep each content in one piece.
    """
    _check_options(
        layout=layout, direction=direction, pred_position=pred_position, supervise=supervise
    )
    check_messages(messages)
    check_views(views, pairs)
    turns = _view_turns(messages, text, code, views or {})
    directed = _directed(pairs, turns, direction)
    pred_ids = list(pred_ids)
    contents = [message["content"] for message in messages]
    roles = tuple(message["role"] for message in messages)
    chat = _turn(tokenizer, roles, contents, template_kwargs)
    labels = _labels(chat, supervise)

    segments = [Segment(chat.input_ids, labels=labels)]
    end = _text_end(chat, text) if layout == "shared" else None
    if end is not None:
        segments = _split(chat.input_ids, labels, end)
    appended = len(pred_ids) > 0 and pred_position == "append"

    def view(name: str) -> _View:
        if name == "text" and end is not None:
            return _View(chat.input_ids[:end], chat.spans[-2][0], segment=0)
        role, content = turns[name]
        turn = _turn(tokenizer, (role,), [content], template_kwargs)
        return _lone_view(tokenizer, turn, appended)

    return _link(segments, view, directed, pred_position, pred_ids)


def plain_example(
    messages: Sequence[Mapping[str, str]],
    tokenizer,
    *,
    separator_id: int,
    pred_ids: Sequence[int] = (),
    text: str | None = None,
    code: str | None = None,
    views: Mapping[str, str | Mapping[str, str]] | None = None,
    pairs: Sequence[Sequence[str]] | None = None,
    direction: str = "text_to_code",
    pred_position: str = "append",
    supervise: str = "assistant",
) -> Example:
    """``chat_example`` without a chat template: BOS, user content, separator, assistant's, EOS.

    The system turn is not used. Text is everything before the separator, which the rest continues;
    every other view is BOS and its content. BOS is left out if the tokenizer has none.

    Args:
        separator_id: The token between Text and Code.
        messages, tokenizer, pred_ids, text, code, views, pairs, direction, pred_position,
            supervise: As in ``chat_example``; the tokenizer needs an EOS token and no chat
            template, and the role of a view does not matter.
    Raises:
        ValueError: As in ``chat_example``, or the tokenizer has no EOS token.
    """
    _check_options(direction=direction, pred_position=pred_position, supervise=supervise)
    check_messages(messages)
    check_views(views, pairs)
    turns = _view_turns(messages, text, code, views or {})
    directed = _directed(pairs, turns, direction)
    prompt = plain_prompt(messages, tokenizer, separator_id=separator_id)
    if tokenizer.eos_token_id is None:
        raise ValueError("the plain format needs a tokenizer with an EOS token")
    bos = _bos(tokenizer)

    answer = [*_encode(tokenizer, messages[-1]["content"]), tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + answer
    if supervise == "all":
        labels = [-100, *(prompt + answer)[1:]]
    end = len(prompt) - 1

    def view(name: str) -> _View:
        if name == "text" and text is None:
            return _View(prompt[:end], len(bos), segment=0)
        _, content = turns[name]
        return _View(bos + _encode(tokenizer, content), len(bos))

    segments = _split(prompt + answer, labels, end)
    return _link(segments, view, directed, pred_position, list(pred_ids))


def chat_prompt(
    messages: Sequence[Mapping[str, str]],
    tokenizer,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens before the assistant content, as ``chat_example`` trains on them.

    Unlike ``add_generation_prompt=True`` this follows the template's rendering of a finished turn
    (Qwen3 puts an empty reasoning block there), leaves white space that belongs to the answer's
    first token to the answer, and folds the system text where that is needed.

    Args:
        messages: An optional system turn and a user turn; an assistant turn is ignored.
        tokenizer, template_kwargs: As in ``chat_example``.
    Raises:
        ValueError: As in ``chat_example``.
    """
    answered = _answered(messages)
    roles = tuple(message["role"] for message in answered)
    chat = _turn(tokenizer, roles, [m["content"] for m in answered], template_kwargs)
    return chat.input_ids[: chat.spans[-1][0]]


def plain_prompt(
    messages: Sequence[Mapping[str, str]], tokenizer, *, separator_id: int
) -> list[int]:
    """The tokens before the assistant content in ``plain_example``, separator included."""
    user = _answered(messages)[-2]["content"]
    return [*_bos(tokenizer), *_encode(tokenizer, user), separator_id]


def without_views(example: Example) -> Example:
    """The example for next-token loss alone: no pairs, and no segment without supervised tokens.

    A segment stays if a later one that stays continues it.
    """
    kept: set[int] = set()
    for i in reversed(range(len(example.segments))):
        segment = example.segments[i]
        supervised = segment.labels is not None and any(y != -100 for y in segment.labels)
        if supervised or i in kept:
            kept |= {i} if segment.parent is None else {i, segment.parent}
    if not kept:
        raise ValueError(
            "the example has no supervised token, so nothing is left without its views"
        )
    index = {old: new for new, old in enumerate(sorted(kept))}
    return Example(
        [
            Segment(s.input_ids, s.parent if s.parent is None else index[s.parent], s.labels)
            for s in (example.segments[i] for i in index)
        ]
    )


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


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


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


def _check_options(**options: str) -> None:
    allowed = {
        "layout": LAYOUTS,
        "direction": DIRECTIONS,
        "pred_position": PRED_POSITIONS,
        "supervise": SUPERVISE,
    }
    for name, value in options.items():
        if value not in allowed[name]:
            raise ValueError(f"{name} must be one of {allowed[name]}, got {value!r}")


@dataclass
class _View:
    """A view's tokens, where its content begins, and its segment if one already ends with it."""

    input_ids: list[int]
    content_start: int
    segment: int | None = None


def _split(input_ids: list[int], labels: list[int], end: int) -> list[Segment]:
    """A prompt of ``end`` tokens and what continues it."""
    supervised = any(label != -100 for label in labels[:end])
    return [
        Segment(input_ids[:end], labels=labels[:end] if supervised else None),
        Segment(input_ids[end:], parent=0, labels=labels[end:]),
    ]


def _view_turns(
    messages: Sequence[Mapping[str, str]],
    text: str | None,
    code: str | None,
    views: Mapping[str, str | Mapping[str, str]],
) -> dict[str, tuple[str, str]]:
    """Role and content of every view, by name."""
    turns = {}
    for name, own, message in (("text", text, messages[-2]), ("code", code, messages[-1])):
        if own is not None:
            check_content(own, name)
        turns[name] = message["role"], message["content"] if own is None else own
    for name, view in views.items():
        turns[name] = (
            (view["role"], view["content"]) if isinstance(view, Mapping) else ("assistant", view)
        )
    return turns


def _directed(
    pairs: Sequence[Sequence[str]] | None, names: Iterable[str], direction: str
) -> list[tuple[str, str]]:
    """The (predictor, target) names in order, none of them twice."""
    if pairs is None:
        pairs = [("text", name) for name in names if name != "text"]
    forward = [(predictor, target) for predictor, target in pairs]
    backward = [(target, predictor) for predictor, target in pairs]
    chosen = {"text_to_code": forward, "code_to_text": backward, "both": forward + backward}
    return list(dict.fromkeys(chosen[direction]))


def _link(
    segments: list[Segment],
    view: Callable[[str], _View],
    pairs: Sequence[tuple[str, str]],
    pred_position: str,
    pred_ids: list[int],
) -> Example:
    """Adds the views and [PRED] segments that the pairs need, each once, to those of the chat."""
    view = cache(view)

    def add(input_ids: Sequence[int], parent: int | None = None) -> int:
        segments.append(Segment(input_ids, parent))
        return len(segments) - 1

    @cache
    def target(name: str) -> int:
        found = view(name)
        return add(found.input_ids) if found.segment is None else found.segment

    @cache
    def predictor(name: str) -> int:
        if not pred_ids:
            return target(name)
        if pred_position == "append":
            return add(pred_ids, target(name))
        ids, start = view(name).input_ids, view(name).content_start
        return add([*ids[:start], *pred_ids, *ids[start:]])

    linked = [(predictor(source), target(name)) for source, name in pairs]
    return Example(segments, linked)


@dataclass(frozen=True)
class _Turn:
    """A tokenized rendering: its tokens, and the tokens and characters of each content."""

    input_ids: list[int]
    offsets: list[tuple[int, int]]
    spans: list[tuple[int, int]]
    text: str
    char_spans: list[tuple[int, int]]


def _turn(
    tokenizer,
    roles: tuple[str, ...],
    contents: Sequence[str],
    template_kwargs: Mapping[str, Any] | None,
) -> _Turn:
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
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    spans = [_token_span(offsets, *span) for span in char_spans]
    return _Turn(encoded["input_ids"], offsets, spans, text, char_spans)


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
    def of(cls, tokenizer, roles: tuple[str, ...], kwargs: Mapping[str, Any]) -> _Frame:
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
            except TemplateError as error:
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

    def _apply(self, tokenizer, contents: Sequence[str], kwargs: Mapping[str, Any]) -> str:
        if self.folded:
            contents = [f"{contents[0]}\n\n{contents[1]}", *contents[2:]]
        messages = [
            {"role": role, "content": text} for role, text in zip(self.roles, contents, strict=True)
        ]
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    def render(
        self, tokenizer, contents: Sequence[str], kwargs: Mapping[str, Any]
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


def _token_span(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens that hold the characters start..end, as (first, last + 1).

    Several tokens may share the offsets of one character, and a token of white space may have
    empty ones, so the search goes by where tokens end and then takes in all that begin earlier.
    """
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    stop = bisect_left(offsets, end, lo=first, key=lambda offset: offset[1]) + 1
    while stop < len(offsets) and offsets[stop][0] < end:
        stop += 1
    return first, stop


def _labels(chat: _Turn, supervise: str) -> list[int]:
    ids = chat.input_ids
    if supervise == "all":
        return [-100, *ids[1:]]
    start = chat.spans[-1][0]
    # The end of the turn is what the template writes after it, white space excepted.
    stop = max(chat.spans[-1][1], _token_span(chat.offsets, 0, len(chat.text.rstrip()))[1])
    return [-100] * start + ids[start:stop] + [-100] * (len(ids) - stop)


def _text_end(chat: _Turn, text: str | None) -> int | None:
    """How many of the chat's tokens Text takes; None if it is no prefix of the user content."""
    if text is None:
        return chat.spans[-2][1]
    check_content(text, "text")
    start, stop = chat.char_spans[-2]
    end = start + len(text.strip())
    last = _token_span(chat.offsets, start, end)[1]
    beyond = chat.text[end : min(chat.offsets[last - 1][1], stop)]
    return last if chat.text[start:end] == text.strip() and not beyond.strip() else None


def _lone_view(tokenizer, turn: _Turn, pred_follows: bool) -> _View:
    """A turn alone, up to its last content token.

    A [PRED] written right behind the content would keep what the template writes there out of the
    content's last token, so it is kept out here too.
    """
    (start, stop), end = turn.spans[0], turn.char_spans[0][1]
    if pred_follows and turn.offsets[stop - 1][1] > end:
        return _View(_encode(tokenizer, turn.text[:end]), start)
    return _View(turn.input_ids[:stop], start)


def _answered(messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The messages with some assistant turn."""
    asked = [m for m in messages if not (isinstance(m, Mapping) and m.get("role") == "assistant")]
    answered = [*asked, {"role": "assistant", "content": "x"}]
    check_messages(answered)
    return answered


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _bos(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
