"""Chat templates that change, and those in which no content can be found again."""

import copy
import warnings
from unicodedata import normalize

import pytest
from tokenizers import AddedToken, normalizers

from llmjepa_kernels.data.chat import chat_example
from tests.support.chat_templates import QWEN3, SMOLLM2
from tests.support.chats import CHAT, decode, get_tokenizer, turns


def test_a_template_that_writes_something_else_later():
    tokenizer = get_tokenizer("{{ today }}" + SMOLLM2.replace("{{ '<|im", "{{ bos_token + '<|im"))
    first = chat_example(CHAT, tokenizer).segments[0]
    assert decode(tokenizer, first.input_ids).startswith("<s><|im_start|>system")
    tokenizer.bos_token = "</s>"
    try:
        second = chat_example(CHAT, tokenizer).segments[0]
        assert decode(tokenizer, second.input_ids).startswith("</s><|im_start|>system")
        other = chat_example(CHAT, tokenizer, template_kwargs={"today": "May"}).segments[0]
        assert decode(tokenizer, other.input_ids).startswith("May</s><|im_start|>system")
    finally:
        tokenizer.bos_token = "<s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"has no chat template: set tokenizer\.chat_template"),
        ("{{ messages[0]['content'] }}", r"cannot render .*Set tokenizer\.chat_template"),
        (
            "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
            "does not give every content once and in order",
        ),
        (
            "{% for m in messages[::-1] %}<{{ m['content'] }}>{% endfor %}",
            "does not give every content once and in order",
        ),
        ("{{ raise_exception('never') }}", "is refused with 'never'"),
        (
            "{% for m in messages %}{{ m['role'] + m['content'] | upper }}{% endfor %}",
            "does not keep a content in one piece: expected .*'ask'",
        ),
        (
            "{% for m in messages %}<{{ m['content'] | replace('k', 'kk') }}>{% endfor %}",
            "does not keep a content in one piece",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["shared", "official"])
def test_a_template_without_spans_is_refused(template, message, layout):
    tokenizer = get_tokenizer(template)
    with pytest.raises(ValueError, match=message):
        chat_example(turns("sys", "ask", "ans"), tokenizer, layout=layout)


def test_qwen3_reasoning_in_the_answer_is_refused():
    tokenizer = get_tokenizer(QWEN3)
    with pytest.raises(ValueError, match="does not keep a content in one piece"):
        chat_example(turns("SYS", "ASK", "<think>hm</think>ANS"), tokenizer)


@pytest.fixture
def composing():
    """A tokenizer that composes characters, as Qwen's; its offsets know the first of them."""
    tokenizer = copy.deepcopy(get_tokenizer(SMOLLM2))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


JOINED = "{{ messages | map(attribute='content') | join(' ') }}"


@pytest.mark.parametrize("template", [SMOLLM2, JOINED])
@pytest.mark.parametrize("position", ["append", "prepend"])
def test_contents_that_end_in_a_decomposed_character(composing, template, position):
    composing.chat_template = template
    options = {"pred_ids": [9], "pred_position": position, "supervise": "content"}
    chat = turns("re\u0301sume\u0301", "cafe\u0301")
    composed = [{**turn, "content": normalize("NFC", turn["content"])} for turn in chat]
    for turn, same in zip(chat, composed, strict=True):
        assert composing(turn["content"])["input_ids"] == composing(same["content"])["input_ids"]
    found, expected = (chat_example(each, composing, **options) for each in (chat, composed))
    assert found == expected


@pytest.mark.parametrize("answer", [" ANS", "\n ANS"])
def test_white_space_that_a_special_token_takes_in(answer):
    """As Phi-3's, which strip to the right."""
    tokenizer = copy.deepcopy(get_tokenizer(kind="byte_fallback"))
    tokenizer.add_tokens([AddedToken("<|says|>", rstrip=True, special=True)])
    turn = "m['role'] + '<|says|>' + m['content'] + '<|im_end|>'"
    tokenizer.chat_template = "{% for m in messages %}{{ " + turn + " }}{% endfor %}"
    example = chat_example(turns("ASK?", answer), tokenizer)
    labels = [label for segment in example.segments for label in segment.labels or ()]
    assert decode(tokenizer, labels).strip() == "ANS<|im_end|>"
    ids = [i for segment in example.segments[:2] for i in segment.input_ids]
    assert decode(tokenizer, ids[slice(*example.path.spans[1])]).strip() == "ANS"


def test_an_answer_that_begins_in_a_token_of_the_template_is_warned_of():
    template = "{% for m in messages %}{{ m['role'] + '?' + m['content'] + '\\n' }}{% endfor %}"
    tokenizer = get_tokenizer(template, "punctuation_newline")
    assert len(tokenizer("?\n")["input_ids"]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chat_example(turns("ASK", "ANS"), tokenizer)
    with pytest.warns(RuntimeWarning, match="a token that the chat template begins: "):
        chat_example(turns("ASK", "\nANS"), tokenizer)


def test_newlines_alone_are_trimmed():
    turn = "'<|im_start|>' + m['content'].strip('\\n')"
    tokenizer = get_tokenizer("{% for m in messages %}{{ " + turn + " }}{% endfor %}")
    example = chat_example(turns("\n ASK \n", "\n  ANS"), tokenizer)
    assert decode(tokenizer, example.segments[0].input_ids).endswith("ASK ")
