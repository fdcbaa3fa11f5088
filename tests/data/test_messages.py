"""Messages that are malformed are named."""

import pytest

from llmjepa_kernels.data.chat import chat_example, plain_example
from tests.support.chats import CHAT, get_tokenizer, turns


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list of turns, got str"),
        ([], r"roles \[system,\] user, assistant, got \[\]"),
        (CHAT[:2], r"got \['system', 'user'\]"),
        (CHAT[::-1], r"got \['assistant', 'user', 'system'\]"),
        ([*CHAT, *CHAT[1:]], "roles .*got"),
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
