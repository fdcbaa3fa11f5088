"""Chat messages → ``Example``: where Text and Code begin and end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from llmjepa_kernels.data.messages import (
    Turn,
    check_content,
    check_views,
    checked_messages,
    last_user,
    with_placeholder_answer,
)
from llmjepa_kernels.data.template import Rendering, render, token_span
from llmjepa_kernels.packing import IGNORE, Example, Segment
from llmjepa_kernels.tubes import TokenPath

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUTS = ("shared", "official")
DIRECTIONS = ("text_to_code", "code_to_text", "both")
PRED_POSITIONS = ("append", "prepend")
# The last one in the plain format only
SUPERVISE = ("assistant", "content", "all", "released", "text")


def chat_example(
    messages: Sequence[Mapping[str, Any]],
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

    ``layout="shared"``: Text is the chat up to the end of its last user turn, the rest of the chat
    continues it, and [PRED] branches off it. ``layout="official"``: the chat, the last user turn
    alone and the last assistant turn alone are three separate sequences, each through the template.
    In both, Code is the last assistant turn alone through the template, including whatever header
    or default system prompt the template then writes; every further view likewise is a turn alone.
    Views stop at their last content token: in a causal model the tokens after it cannot change its
    hidden state. The chat's segments come first. The contents of the last user and the last
    assistant turn are the example's path.

    A template without a system role (Gemma) gets the system text, a blank line and the user text
    as the user content; one that refuses a lone assistant turn gets it under the user role.

    Args:
        messages: An optional system turn, a user turn and an assistant turn; further user,
            assistant and tool turns may stand before the last assistant turn. A content is a
            string or a list of parts of type text, which stand one after the other.
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
        supervise: ``"assistant"``: the next-token loss is on the content of every assistant turn
            and on the end of the turn, where the template ends it as it does the last one;
            ``"content"``: on the content alone, so the end of a turn is not learnt; ``"all"``: on
            every token of the chat but the first; ``"released"``: on those of them that are not
            the pad token, as in the authors' code, where that is the EOS token if the tokenizer
            has none: no end of a turn is learnt that is this token.
        template_kwargs: Passed to ``apply_chat_template``, such as ``enable_thinking``.
    Raises:
        ValueError: The messages are malformed, an option is unknown, the tokenizer is not fast or
            has no chat template, or the template does not keep each content in one piece.
    """
    _check_options(
        layout=layout, direction=direction, pred_position=pred_position, supervise=supervise
    )
    if supervise == "text":
        raise ValueError("supervise='text' is for the plain format, see plain_example")
    turns = checked_messages(messages)
    check_views(views, pairs)
    view_turns = _view_turns(turns, text, code, views or {})
    directed = _directed(pairs, view_turns, direction)
    pred_ids = list(pred_ids)
    chat = _render(tokenizer, turns, template_kwargs)
    asked = last_user(turns)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    labels = _labels(tokenizer, chat, answers, supervise)

    segments = [Segment(chat.input_ids, labels=labels)]
    end = _text_end(chat, asked, text) if layout == "shared" else None
    if end is not None:
        segments = _split(chat.input_ids, labels, end)
    path = TokenPath(len(segments) - 1, [chat.spans[asked], chat.spans[-1]])
    appended = len(pred_ids) > 0 and pred_position == "append"

    def view(name: str) -> _View:
        if name == "text" and end is not None:
            return _View(chat.input_ids[:end], chat.spans[asked][0], segment=0)
        role, content = view_turns[name]
        turn = render(tokenizer, (role,), [content], template_kwargs)
        return _lone_view(tokenizer, turn, appended)

    return _link(segments, path, view, directed, pred_position, pred_ids)


def plain_example(
    messages: Sequence[Mapping[str, Any]],
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
    end_id: int | None = None,
) -> Example:
    """``chat_example`` without a chat template: BOS, user content, separator, assistant's, end.

    The system turn is not used. Text is everything before the separator, which the rest continues;
    every other view is BOS and its content. BOS is left out if the tokenizer has none.

    Args:
        separator_id: The token between Text and Code.
        messages, tokenizer, pred_ids, text, code, views, pairs, direction, pred_position: As in
            ``chat_example``; the tokenizer needs no chat template, and the role of a view does not
            matter.
        supervise: As in ``chat_example``; or ``"text"``: the end token follows the user content,
            and the next-token loss is on all of this but its first token. So the paper pretrains
            on paraphrases, each of which is a Text once and the Code of another.
        end_id: The token at the end. Default: EOS.
    Raises:
        ValueError: As in ``chat_example``, or there is no end token.
    """
    _check_options(direction=direction, pred_position=pred_position, supervise=supervise)
    turns = _one_question(checked_messages(messages))
    check_views(views, pairs)
    view_turns = _view_turns(turns, text, code, views or {})
    directed = _directed(pairs, view_turns, direction)
    prompt = plain_prompt(turns, tokenizer, separator_id=separator_id)
    end_id = tokenizer.eos_token_id if end_id is None else end_id
    if end_id is None:
        raise ValueError("the plain format needs a tokenizer with an EOS token, or end_id")
    bos = _bos(tokenizer)

    end = len(prompt) - 1
    answer = _encode(tokenizer, turns[-1]["content"])
    sequence, contents = [*prompt, *answer, end_id], [(len(bos), end)]
    if supervise == "text":
        sequence = [*prompt[:end], end_id]
    else:
        contents.append((len(prompt), len(prompt) + len(answer)))
    if supervise in ("assistant", "content"):
        labels = [IGNORE] * len(prompt) + sequence[len(prompt) :]
        if supervise == "content":
            labels[-1] = IGNORE
    else:
        labels = _labels_of_all(tokenizer, sequence, supervise)

    def view(name: str) -> _View:
        if name == "text" and text is None:
            return _View(prompt[:end], len(bos), segment=0)
        _, content = view_turns[name]
        return _View(bos + _encode(tokenizer, content), len(bos))

    segments = _split(sequence, labels, end)
    path = TokenPath(1, contents)
    return _link(segments, path, view, directed, pred_position, list(pred_ids))


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens before the assistant content, as ``chat_example`` trains on them.

    Unlike ``add_generation_prompt=True`` this follows the template's rendering of a finished turn
    (Qwen3 puts an empty reasoning block there), leaves white space that belongs to the answer's
    first token to the answer, and folds the system text where that is needed.

    Args:
        messages: Turns up to an assistant's; an assistant turn at their end is ignored.
        tokenizer, template_kwargs: As in ``chat_example``.
    Raises:
        ValueError: As in ``chat_example``.
    """
    chat = _render(tokenizer, with_placeholder_answer(messages), template_kwargs)
    return chat.input_ids[: chat.spans[-1][0]]


def plain_prompt(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, separator_id: int
) -> list[int]:
    """The tokens before the assistant content in ``plain_example``, separator included."""
    user = _one_question(with_placeholder_answer(messages))[-2]["content"]
    return [*_bos(tokenizer), *_encode(tokenizer, user), separator_id]


def _render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    template_kwargs: Mapping[str, Any] | None,
) -> Rendering:
    roles = tuple(turn["role"] for turn in turns)
    return render(tokenizer, roles, [turn["content"] for turn in turns], template_kwargs)


def _one_question(turns: list[Turn]) -> list[Turn]:
    """The turns, if they are all that the plain format has a place for."""
    roles = [turn["role"] for turn in turns]
    if roles[-2:] != ["user", "assistant"] or len(roles) > 2 + (roles[0] == "system"):
        raise ValueError(
            f"the plain format takes the roles [system,] user, assistant only, got {roles}"
        )
    return turns


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
    turns: Sequence[Turn],
    text: str | None,
    code: str | None,
    views: Mapping[str, str | Mapping[str, str]],
) -> dict[str, tuple[str, str]]:
    """Role and content of every view, by name."""
    contents = {}
    for name, own, turn in (("text", text, turns[last_user(turns)]), ("code", code, turns[-1])):
        if own is not None:
            check_content(own, name)
        contents[name] = turn["role"], turn["content"] if own is None else own
    for name, view in views.items():
        contents[name] = (
            (view["role"], view["content"]) if isinstance(view, Mapping) else ("assistant", view)
        )
    return contents


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
    path: TokenPath,
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
    return Example(segments, linked, path)


def _labels(
    tokenizer: PreTrainedTokenizerBase, chat: Rendering, answers: Iterable[int], supervise: str
) -> list[int]:
    """Of the tokens of a chat whose contents `answers` are the assistant's."""
    ids = chat.input_ids
    if supervise in ("all", "released"):
        return _labels_of_all(tokenizer, ids, supervise)
    labels = [IGNORE] * len(ids)
    # The end of a turn is what the template writes after the last one, white space excepted.
    end_of_turn = chat.text[chat.char_spans[-1][1] :].rstrip()
    for i in answers:
        start, stop = chat.spans[i]
        content_end = chat.char_spans[i][1]
        if supervise == "assistant" and chat.text.startswith(end_of_turn, content_end):
            end = content_end + len(end_of_turn)
            stop = max(stop, token_span(chat.offsets, 0, end)[1])
        labels[start:stop] = ids[start:stop]
    return labels


def _labels_of_all(tokenizer: PreTrainedTokenizerBase, ids: list[int], supervise: str) -> list[int]:
    """Of all tokens that have one before them, without the pad token if "released"."""
    left_out = None
    if supervise == "released":
        padding = tokenizer.pad_token_id
        left_out = tokenizer.eos_token_id if padding is None else padding
    return [IGNORE, *(IGNORE if token == left_out else token for token in ids[1:])]


def _text_end(chat: Rendering, asked: int, text: str | None) -> int | None:
    """How many of the chat's tokens Text takes; None if it is no prefix of the user content."""
    if text is None:
        return chat.spans[asked][1]
    check_content(text, "text")
    start, stop = chat.char_spans[asked]
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
