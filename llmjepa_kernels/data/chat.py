"""Chat messages → ``Example``: where Text and Code begin and end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from llmjepa_kernels.checks import check_whole
from llmjepa_kernels.data.messages import (
    PLACEHOLDER,
    Turn,
    check_content,
    check_views,
    checked_messages,
    learnt_answers,
    turns_of_views,
    with_placeholder_answer,
)
from llmjepa_kernels.data.template import Rendering, Tokens, render, token_span
from llmjepa_kernels.example import IGNORE, Example, Segment
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
    embedding_token: str | int = "content",
    max_length: int | None = None,
    add_special_tokens: bool = False,
    view_turn: int = -1,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Example:
    """The segments and view pairs of one chat.

    ``layout="shared"``: Text is the chat up to the end of its last user turn, the rest of the chat
    continues it, and [PRED] branches off it. ``layout="official"``: the chat, the last user turn
    alone and the last assistant turn alone are three separate sequences, each through the template.
    In both, Code is the last assistant turn alone through the template, including whatever header
    or default system prompt the template then writes; every further view likewise is a turn alone.
    Views stop at the token that is compared, as the tokens after it cannot change its state in a
    causal model. The chat's segments come first. The contents of the last user and the last
    assistant turn are the example's path.

    A template without a system role (Gemma) gets the system text, a blank line and the user text
    as the user content; one that refuses a lone assistant turn gets it under the user role.

    Args:
        messages: An optional system turn, a user turn and an assistant turn; further user,
            assistant and tool turns may stand before the last assistant turn. A content is a
            string or a list of parts of type text, which stand one after the other. An assistant
            turn with a ``weight`` of 0, or ``train`` false, is context only.
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
            the content of a copy of it, whose last content token then predicts; there the order of
            the tokens is the reverse, so that the same one stands next to the content.
        supervise: ``"assistant"``: the next-token loss is on the content of every assistant turn
            that is not context only and on the end of the turn, where the template ends it as it
            does the last one;
            ``"content"``: on the content alone, so the end of a turn is not learnt; ``"all"``: on
            every token of the chat but the first; ``"released"``: on those of them that are not
            the pad token, as in the authors' code, where that is the EOS token if the tokenizer
            has none: no end of a turn is learnt that is this token.
        embedding_token: The token of a view that is compared: ``"content"``, its last content token
            or the last [PRED]; or, in the official layout, an offset below 0 from the end of the
            whole turn, as ``last_token`` in the authors' code.
        max_length: The chat and every view are cut to so many tokens. [PRED] follow what is left of
            a content, but are cut off where an offset chooses the token, as in the authors' code.
        add_special_tokens: Let the tokenizer add its special tokens to what the template writes, as
            the authors' code does: with Llama's, a second begin-of-sequence token.
        view_turn: The assistant turn that is Code, and is asked by the Text, instead of the last
            one: 0 is the first of them.
        template_kwargs: Passed to ``apply_chat_template``, such as ``enable_thinking``.
    Raises:
        ValueError: The messages are malformed, an option is unknown, the tokenizer is not fast or
            has no chat template, the template does not keep each content in one piece, or a view
            would end before its content.
    """
    _check_options(
        layout=layout, direction=direction, pred_position=pred_position, supervise=supervise
    )
    check_embedding_token(embedding_token, layout)
    check_max_length(max_length)
    if supervise == "text":
        raise ValueError("supervise='text' is for the plain format, see plain_example")
    turns = checked_messages(messages)
    check_views(views, pairs)
    asked, answered = turns_of_views(turns, view_turn)
    view_turns = _view_turns(turns[asked], turns[answered], text, code, views or {})
    directed = _directed(pairs, view_turns, direction)
    chat = _render(tokenizer, turns, template_kwargs, add_special_tokens)
    ids = chat.tokens.cut(chat.input_ids, max_length)
    labels = chat.tokens.cut(_labels(tokenizer, chat, turns, supervise), max_length)
    limit = None if max_length is None else max_length - chat.tokens.num_behind
    preds = _Preds(list(pred_ids), pred_position, limit)

    segments = [Segment(ids, labels=labels)]
    end = _text_end(chat, asked, text) if layout == "shared" else None
    if end is not None:
        end = preds.room(end)
        segments = _split(ids, labels, end)
    path = _path(segments, [chat.spans[asked], chat.spans[answered]], limit)

    def view(name: str) -> _View:
        if name == "text" and end is not None:
            return _View(ids[:end], chat.spans[asked][0], segment=0)
        role, content = view_turns[name]
        turn = render(tokenizer, (role,), [content], template_kwargs, add_special_tokens)
        if isinstance(embedding_token, str):
            return _up_to_content(tokenizer, turn, preds, add_special_tokens)
        return _up_to_offset(
            tokenizer, turn, preds, add_special_tokens, embedding_token, max_length
        )

    return _link(segments, path, view, directed, preds)


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
    max_length: int | None = None,
    end_id: int | None = None,
) -> Example:
    """``chat_example`` without a chat template: BOS, user content, separator, assistant's, end.

    The system turn is not used. Text is everything before the separator, which the rest continues;
    every other view is BOS and its content. BOS is left out if the tokenizer has none.

    Args:
        separator_id: The token between Text and Code.
        messages, tokenizer, pred_ids, text, code, views, pairs, direction, pred_position,
            max_length: As in ``chat_example``; the tokenizer needs no chat template, and the role
            of a view does not matter.
        supervise: As in ``chat_example``; or ``"text"``: the end token follows the user content,
            and the next-token loss is on all of this but its first token. So the paper pretrains
            on paraphrases, each of which is a Text once and the Code of another.
        end_id: The token at the end. Default: EOS.
    Raises:
        ValueError: As in ``chat_example``, or there is no end token.
    """
    _check_options(direction=direction, pred_position=pred_position, supervise=supervise)
    check_max_length(max_length)
    turns = _one_question(checked_messages(messages))
    check_views(views, pairs)
    view_turns = _view_turns(turns[-2], turns[-1], text, code, views or {})
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

    preds = _Preds(list(pred_ids), pred_position, max_length)
    end = preds.room(end)

    def view(name: str) -> _View:
        if name == "text" and text is None:
            return _View(prompt[:end], len(bos), segment=0)
        ids = bos + _encode(tokenizer, view_turns[name][1])
        return _View(ids[: preds.room(len(ids))], len(bos))

    segments = _split(sequence[:max_length], labels[:max_length], end)
    return _link(segments, _path(segments, contents, max_length), view, directed, preds)


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_special_tokens: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens before the assistant content, as ``chat_example`` trains on them.

    Unlike ``add_generation_prompt=True`` this follows the template's rendering of a finished turn
    (Qwen3 puts an empty reasoning block there), leaves white space that belongs to the answer's
    first token to the answer, and folds the system text where that is needed.

    Args:
        messages: Turns up to an assistant's; an assistant turn at their end is ignored.
        tokenizer, add_special_tokens, template_kwargs: As in ``chat_example``.
    Raises:
        ValueError: As in ``chat_example``.
    """
    turns = with_placeholder_answer(messages)
    chat = _render(tokenizer, turns, template_kwargs, add_special_tokens)
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
    add_special_tokens: bool,
) -> Rendering:
    roles = tuple(turn["role"] for turn in turns)
    contents = [turn["content"] for turn in turns]
    return render(tokenizer, roles, contents, template_kwargs, add_special_tokens)


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


def check_embedding_token(embedding_token: Any, layout: str) -> None:
    """Raises a ValueError unless `chat_example` can take it in this layout."""
    if embedding_token == "content":
        return
    if isinstance(embedding_token, bool) or not isinstance(embedding_token, int):
        raise ValueError(f"embedding_token must be 'content' or an int, got {embedding_token!r}")
    if embedding_token >= 0:
        raise ValueError(f"embedding_token must be below 0, got {embedding_token}")
    if layout != "official":
        raise ValueError(
            f"embedding_token={embedding_token} needs layout='official', where views are turns of "
            f"their own, got layout={layout!r}"
        )


def check_max_length(max_length: Any) -> None:
    """Raises a ValueError unless `chat_example` can take it."""
    if max_length is not None:
        check_whole("max_length", max_length, least=1)


@dataclass
class _View:
    """A view up to the token that is compared.

    Attributes:
        input_ids: Its tokens.
        content_start: Where its content begins.
        segment: One that already ends with it, if any.
        with_preds: Its tokens with [PRED], if those cannot just be added.
    """

    input_ids: list[int]
    content_start: int
    segment: int | None = None
    with_preds: list[int] | None = None


@dataclass
class _Preds:
    """The [PRED] tokens of an example, their place, and the tokens of a view at most."""

    ids: list[int]
    position: str
    max_length: int | None

    @property
    def appended(self) -> bool:
        return len(self.ids) > 0 and self.position == "append"

    def room(self, end: int) -> int:
        """Where a content that ends there is cut to leave them room."""
        if self.max_length is None:
            return end
        return min(end, max(self.max_length - self.appended * len(self.ids), 0))

    def in_front(self, view: _View) -> list[int]:
        """The tokens of a view with these in front of its content."""
        ids, start = view.input_ids, view.content_start
        return [*ids[:start], *reversed(self.ids), *ids[start:]][: self.max_length]


def _split(input_ids: list[int], labels: list[int], end: int) -> list[Segment]:
    """A prompt of ``end`` tokens and what continues it, if anything does."""
    if not end:  # cut so short that there is no place for [PRED]
        return [Segment(input_ids, labels=labels)]
    supervised = any(label != IGNORE for label in labels[:end])
    segments = [Segment(input_ids[:end], labels=labels[:end] if supervised else None)]
    if end < len(input_ids):
        segments.append(Segment(input_ids[end:], parent=0, labels=labels[end:]))
    return segments


def _path(
    segments: Sequence[Segment], spans: Sequence[tuple[int, int]], max_length: int | None
) -> TokenPath:
    """What is left of the spans, in the sequence that ends with the last of the segments."""
    limit = spans[-1][1] if max_length is None else max_length
    kept = [(start, min(stop, limit)) for start, stop in spans if start < limit]
    return TokenPath(len(segments) - 1, kept)


def _view_turns(
    asked: Turn,
    answer: Turn,
    text: str | None,
    code: str | None,
    views: Mapping[str, str | Mapping[str, str]],
) -> dict[str, tuple[str, str]]:
    """Role and content of every view, by name."""
    contents = {}
    for name, own, turn in (("text", text, asked), ("code", code, answer)):
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
    preds: _Preds,
) -> Example:
    """Adds the views and [PRED] segments that the pairs need, each once, to those of the chat."""

    @cache
    def found(name: str) -> _View:
        one = view(name)
        if len(one.input_ids) <= one.content_start:
            raise ValueError(f"the view {name!r} would end before its content")
        return one

    def add(input_ids: Sequence[int], parent: int | None = None) -> int:
        segments.append(Segment(input_ids, parent))
        return len(segments) - 1

    @cache
    def target(name: str) -> int:
        segment = found(name).segment
        return add(found(name).input_ids) if segment is None else segment

    @cache
    def predictor(name: str) -> int:
        if not preds.ids:
            return target(name)
        whole = found(name).with_preds
        if whole is None and preds.appended:
            return add(preds.ids, target(name))
        return add(whole or preds.in_front(found(name)))

    linked = [(predictor(source), target(name)) for source, name in pairs]
    return Example(segments, linked, path)


def _labels(
    tokenizer: PreTrainedTokenizerBase, chat: Rendering, turns: Sequence[Turn], supervise: str
) -> list[int]:
    """Of the tokens of a chat of these turns."""
    ids, learnt = chat.input_ids, learnt_answers(turns)
    if supervise in ("all", "released"):
        labels = _labels_of_all(tokenizer, ids, supervise)
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant" and i not in learnt:
                start, stop = chat.spans[i]
                labels[start:stop] = [IGNORE] * (stop - start)
        return labels
    labels = [IGNORE] * len(ids)
    # The end of a turn is what the template writes after the last one, white space excepted.
    end_of_turn = chat.text[chat.char_spans[-1][1] :].rstrip()
    for i in learnt:
        start, stop = chat.spans[i]
        content_start, content_end = chat.char_spans[i]
        begins_before = start < stop and chat.offsets[start][0] < content_start
        if begins_before or chat.text[:content_start].endswith(" "):
            start = min(start, _end_of_prompt(tokenizer, chat, content_start))
        if supervise == "assistant" and chat.text.startswith(end_of_turn, content_end):
            end = content_end + len(end_of_turn)
            stop = max(stop, token_span(chat.offsets, 0, end)[1])
        labels[start:stop] = ids[start:stop]
    return labels


def _end_of_prompt(tokenizer: PreTrainedTokenizerBase, chat: Rendering, start: int) -> int:
    """The tokens before an answer at this character, as `chat_prompt` counts them.

    A space that the template writes there belongs to the first token of most answers. Where it is a
    token of its own, before a digit for example, it has to be learnt like any of the answer.
    """
    text = chat.text[:start] + PLACEHOLDER
    tokens = Tokens.of(tokenizer, text, chat.tokens.add_special_tokens)
    end = token_span(tokens.offsets, start, len(text))[0]
    if tokens.input_ids[:end] != chat.input_ids[:end]:
        warnings.warn(
            "some answers begin in a token that the chat template begins: what is generated behind "
            "the prompt cannot begin so. A template that ends the prompt with a special token "
            "avoids it",
            RuntimeWarning,
            stacklevel=4,
        )
    return end


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
    if end > stop or chat.text[start:end] != text.strip():
        return None
    last = token_span(chat.offsets, start, end)[1]
    beyond = chat.text[end : min(chat.offsets[last - 1][1], stop)]
    return None if beyond.strip() else last


def _up_to_content(
    tokenizer: PreTrainedTokenizerBase, turn: Rendering, preds: _Preds, add_special_tokens: bool
) -> _View:
    """A turn alone, up to its last content token.

    A [PRED] written right behind the content would keep what the template writes there out of the
    content's last token, so it is kept out here too.
    """
    (start, stop), (_, end) = turn.spans[0], turn.char_spans[0]
    ids = turn.input_ids
    if preds.appended and turn.offsets[stop - 1][1] > end:
        tokens = Tokens.of(tokenizer, turn.text[:end], add_special_tokens)
        ids, stop = tokens.input_ids, len(tokens.input_ids) - tokens.num_behind
    return _View(ids[: preds.room(stop)], start)


def _up_to_offset(
    tokenizer: PreTrainedTokenizerBase,
    turn: Rendering,
    preds: _Preds,
    add_special_tokens: bool,
    offset: int,
    max_length: int | None,
) -> _View:
    """A turn alone, up to the token at an offset from its end; [PRED] are written as content."""

    def cut(tokens: Tokens) -> list[int]:
        ids = tokens.cut(tokens.input_ids, max_length)
        return ids[: max(len(ids) + offset + 1, 0)]

    view = _View(cut(turn.tokens), content_start=0)
    if preds.ids:
        start, end = turn.char_spans[0]
        ids, at = (preds.ids, end) if preds.appended else (preds.ids[::-1], start)
        written = "".join(cast(list[str], tokenizer.convert_ids_to_tokens(ids)))
        text = turn.text[:at] + written + turn.text[at:]
        tokens = Tokens.of(tokenizer, text, add_special_tokens)
        first, stop = token_span(tokens.offsets, at, at + len(written))
        if tokens.input_ids[first:stop] != ids:
            raise ValueError(f"pred_ids must be tokens wherever they are written, got {ids}")
        view.with_preds = cut(tokens)
    return view


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
