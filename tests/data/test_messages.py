"""Messages that are malformed are named."""

import pytest

from llmjepa_kernels.data.chat import chat_example, plain_example
from llmjepa_kernels.data.messages import RENDERED_KEYS, checked_messages
from tests.support.chats import CHAT, get_tokenizer, turns


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list of turns, got str"),
        ([], r"roles \[system,\] user, assistant, .* before the last assistant, got \[\]"),
        (CHAT[:2], r"got \['system', 'user'\]"),
        (CHAT[::-1], r"got \['assistant', 'user', 'system'\]"),
        ([*CHAT, *CHAT], "roles .*got"),
        ([CHAT[0], CHAT[2]], r"got \['system', 'assistant'\]"),
        ([{"role": "critic", "content": "x"}, *CHAT[1:]], r"got \['critic', 'user', 'assistant'\]"),
        ([{"role": "user"}, CHAT[2]], r"messages\[0\] must have the keys role and content"),
        (["user", "assistant"], r"messages\[0\] must have the keys role and content"),
        (turns("ASK", None), r"content of messages\[1\] must be a string, got NoneType"),
        (turns(" \n", "ANS"), r"content of messages\[0\] must not be empty, got ' \\n'"),
        (turns("\ud800", "ANS"), r"content of messages\[0\] is not valid Unicode"),
    ],
)
def test_malformed_messages(messages, message):
    tokenizer = get_tokenizer()
    with pytest.raises(ValueError, match=message):
        chat_example(messages, tokenizer)
    with pytest.raises(ValueError, match=message):
        plain_example(messages, tokenizer, separator_id=3)


def test_contents_in_parts_and_turns_that_would_be_lost():
    parts = [{"type": "text", "text": "AS"}, {"type": "text", "text": "K?"}]
    asked = [CHAT[0], {"role": "user", "content": parts}, CHAT[2]]
    tokenizer = get_tokenizer()
    assert chat_example(asked, tokenizer) == chat_example(CHAT, tokenizer)
    image = [*parts, {"type": "image", "url": "cat.png"}]
    call = [{"function": {"name": "f", "arguments": "{}"}}]
    for message, expected in (
        ({"role": "user", "content": image}, r"messages\[0\] must be .*got a part of type image"),
        ({"role": "user", "content": ["ASK"]}, r"got a part of type str: 'ASK'"),
        ({"role": "user", "content": "ASK", "tool_calls": call}, r"messages\[0\] has tool_calls"),
        ({"role": "user", "tool_calls": call}, r"messages\[0\] has tool_calls, which would be"),
        ({"role": "user", "content": "A", "thinking": "hm"}, r"messages\[0\] has thinking, .*'hm'"),
    ):
        with pytest.raises(ValueError, match=expected):
            chat_example([message, CHAT[2]], tokenizer)
    null = {"role": "user", "content": "ASK?", "tool_calls": None, "thinking": None}
    assert chat_example([CHAT[0], null, CHAT[2]], tokenizer) == chat_example(CHAT, tokenizer)


@pytest.mark.parametrize("key", RENDERED_KEYS)
def test_keys_that_a_template_would_write_are_refused(key):
    assert len(RENDERED_KEYS) == 5
    with pytest.raises(ValueError, match=f"has {key}, which would be lost"):
        checked_messages([{"role": "user", "content": "a", key: "x"}, *turns("ANS")])
