"""Sequences and compared tokens as the authors' scripts make them, which this file does their way.

A view is the rendering of a turn with [PRED] written into its content, tokenized with the special
tokens that the tokenizer adds, cut at the right; the token compared is counted from its end.
"""

import copy

import pytest
from jinja2 import TemplateError
from tokenizers import processors

from llmjepa_kernels import pack
from llmjepa_kernels.data.chat import chat_example, chat_prompt, plain_example
from llmjepa_kernels.example import sequence_ids
from tests.support.chat_templates import KWARGS, SPANS
from tests.support.chats import CHAT, KINDS, SPECIAL, get_tokenizer, turns

PREDS = [3 + SPECIAL.index("<|pred|>"), 3 + SPECIAL.index("<|sep|>")]


@pytest.fixture(params=KINDS)
def tokenizer(request):
    """Adds tokens of its own on both sides."""
    tokenizer = copy.deepcopy(get_tokenizer(kind=request.param))
    own = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    first = tokenizer.backend_tokenizer.post_processor
    both = own if first is None else processors.Sequence([first, own])
    tokenizer.backend_tokenizer.post_processor = both
    return tokenizer


def their_view(tokenizer, turn, k, position, kwargs, max_length):
    names = tokenizer.convert_ids_to_tokens(PREDS[:k])
    content = turn["content"]
    content = content + "".join(names) if position == "append" else "".join(names[::-1]) + content
    text = tokenizer.apply_chat_template([{**turn, "content": content}], tokenize=False, **kwargs)
    return tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]


@pytest.mark.parametrize("max_length", [None, 9])
@pytest.mark.parametrize(("k", "position"), [(0, "append"), (2, "append"), (2, "prepend")])
@pytest.mark.parametrize("offset", [-1, -4])
@pytest.mark.parametrize("family", SPANS)
def test_views_end_where_theirs_do(tokenizer, family, offset, k, position, max_length):
    tokenizer.chat_template = SPANS[family][0]
    kwargs = KWARGS.get(family, {})
    text = their_view(tokenizer, CHAT[1], k, position, kwargs, max_length)
    try:
        code = their_view(tokenizer, CHAT[2], 0, position, kwargs, max_length)
    except TemplateError:  # as Gemma's, for which theirs does the same
        turn = {**CHAT[2], "role": "user"}
        code = their_view(tokenizer, turn, 0, position, kwargs, max_length)
    options = {
        "layout": "official",
        "pred_ids": PREDS[:k],
        "pred_position": position,
        "embedding_token": offset,
        "max_length": max_length,
        "add_special_tokens": True,
        "template_kwargs": kwargs,
    }
    example = chat_example(CHAT, tokenizer, **options)
    assert [list(s.input_ids) for s in example.segments[1:]] == [
        text[: len(text) + offset + 1],
        code[: len(code) + offset + 1],
    ]
    batch = pack([example], share_prefixes=False)
    predictor, target = batch["view_pairs"][0, 0].tolist()
    assert batch["input_ids"][0, [predictor, target]].tolist() == [text[offset], code[offset]]
    both = chat_example(CHAT, tokenizer, direction="both", **options)
    assert pack([both])["view_pairs"].shape[1] == 2


@pytest.mark.parametrize("layout", ["shared", "official"])
@pytest.mark.parametrize("family", SPANS)
def test_special_tokens_around_the_chat(tokenizer, family, layout):
    tokenizer.chat_template = SPANS[family][0]
    options = {"layout": layout, "template_kwargs": KWARGS.get(family, {})}
    without = chat_example(CHAT, tokenizer, pred_ids=PREDS, **options)
    example = chat_example(CHAT, tokenizer, pred_ids=PREDS, add_special_tokens=True, **options)
    last = without.path.segment
    expected = sequence_ids(without, last)
    assert sequence_ids(example, last) == [1, *expected, 2]
    labels = [label for s in example.segments[: last + 1] for label in s.labels or ()]
    wanted = [label for s in without.segments[: last + 1] for label in s.labels or ()]
    assert [y for y in labels if y >= 0] == [y for y in wanted if y >= 0]
    moved = [(start + 1, stop + 1) for start, stop in without.path.spans]
    assert list(example.path.spans) == moved
    for one, other in zip(example.segments[last + 1 :], without.segments[last + 1 :], strict=True):
        root = [1] if other.parent is None else []
        assert list(one.input_ids) == [*root, *other.input_ids]
    prompt = chat_prompt(CHAT, tokenizer, template_kwargs=options["template_kwargs"])
    more = chat_prompt(
        CHAT, tokenizer, add_special_tokens=True, template_kwargs=options["template_kwargs"]
    )
    assert more == [1, *prompt]


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("position", ["append", "prepend"])
@pytest.mark.parametrize("make", ["shared", "official", "plain"])
def test_nothing_is_longer_than_the_limit(make, position, k):
    tokenizer = get_tokenizer(SPANS["llama3"][0])
    messages = turns("SYS", "ASK a question of many words? " * 3, "ANS in many words " * 3)
    options = {"pred_ids": PREDS[:k], "pred_position": position, "supervise": "all"}

    def example(max_length):
        if make == "plain":
            return plain_example(
                messages, tokenizer, separator_id=5, max_length=max_length, **options
            )
        return chat_example(messages, tokenizer, layout=make, max_length=max_length, **options)

    whole = example(None)
    assert example(10**6) == whole
    chat = sequence_ids(whole, whole.path.segment)
    least = 1
    while least < len(chat):
        try:
            example(least)
        except ValueError:
            least += 1
        else:
            break
    with pytest.raises(ValueError, match=r"the view '(text|code)' would end before its content"):
        example(least - 1)
    assert least < len(chat) - 3
    for limit in range(least, len(chat) + 1):
        cut = example(limit)
        lengths = [len(sequence_ids(cut, i)) for i in range(len(cut.segments))]
        assert max(lengths) <= limit
        assert sequence_ids(cut, cut.path.segment) == chat[:limit]
        for predictor, _ in cut.pairs:
            if k and position == "append":  # they are not what is cut off
                assert sequence_ids(cut, predictor)[-k:] == PREDS
        assert all(stop <= limit for _, stop in cut.path.spans)
        pack([cut])
