"""Chat messages → ``Example``: where Text and Code begin and end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from llmjepa_kernels.data.messages import answered, check_content, check_messages, check_views
from llmjepa_kernels.data.template import Rendering, render, token_span
from llmjepa_kernels.packing import IGNORE, Example, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUTS = ("shared", "official")
DIRECTIONS = ("text_to_code", "code_to_text", "both")
PRED_POSITIONS = ("append", "prepend")
SUPERVISE = ("assistant", "all")


def chat_example(
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
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
    chat = render(tokenizer, roles, contents, template_kwargs)
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
        turn = render(tokenizer, (role,), [content], template_kwargs)
        return _lone_view(tokenizer, turn, appended)

    return _link(segments, view, directed, pred_position, pred_ids)


def plain_example(
    messages: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
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
    labels = [IGNORE] * len(prompt) + answer
    if supervise == "all":
        labels = [IGNORE, *(prompt + answer)[1:]]
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
    tokenizer: PreTrainedTokenizerBase,
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
    turns = answered(messages)
    roles = tuple(message["role"] for message in turns)
    chat = render(tokenizer, roles, [m["content"] for m in turns], template_kwargs)
    return chat.input_ids[: chat.spans[-1][0]]


def plain_prompt(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, *, separator_id: int
) -> list[int]:
    """The tokens before the assistant content in ``plain_example``, separator included."""
    user = answered(messages)[-2]["content"]
    return [*_bos(tokenizer), *_encode(tokenizer, user), separator_id]


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
    supervised = any(label != IGNORE for label in labels[:end])
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


def _labels(chat: Rendering, supervise: str) -> list[int]:
    ids = chat.input_ids
    if supervise == "all":
        return [IGNORE, *ids[1:]]
    start = chat.spans[-1][0]
    # The end of the turn is what the template writes after it, white space excepted.
    stop = max(chat.spans[-1][1], token_span(chat.offsets, 0, len(chat.text.rstrip()))[1])
    return [IGNORE] * start + ids[start:stop] + [IGNORE] * (len(ids) - stop)


def _text_end(chat: Rendering, text: str | None) -> int | None:
    """How many of the chat's tokens Text takes; None if it is no prefix of the user content."""
    if text is None:
        return chat.spans[-2][1]
    check_content(text, "text")
    start, stop = chat.char_spans[-2]
    end = start + len(text.strip())
    last = token_span(chat.offsets, start, end)[1]
    beyond = chat.text[end : min(chat.offsets[last - 1][1], stop)]
    return last if chat.text[start:end] == text.strip() and not beyond.strip() else None


def _lone_view(tokenizer: PreTrainedTokenizerBase, turn: Rendering, pred_follows: bool) -> _View:
    """A turn alone, up to its last content token.

    A [PRED] written right behind the content would keep what the template writes there out of the
    content's last token, so it is kept out here too.
    """
    (start, stop), end = turn.spans[0], turn.char_spans[0][1]
    if pred_follows and turn.offsets[stop - 1][1] > end:
        return _View(_encode(tokenizer, turn.text[:end]), start)
    return _View(turn.input_ids[:stop], start)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
