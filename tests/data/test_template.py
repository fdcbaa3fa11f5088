"""Chat templates that change, and those in which no content can be found again."""

import pytest

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
