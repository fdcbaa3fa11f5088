"""Chats as other training stacks write them become messages."""

import pytest

from llmjepa_kernels.data.samples import read_chats

ASKED = [{"role": "user", "content": "ASK"}, {"role": "assistant", "content": "ANS"}]
SYSTEM = {"role": "system", "content": "SYS"}
SHAREGPT = [{"from": "human", "value": "ASK"}, {"from": "gpt", "value": "ANS"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": SHAREGPT}, {"messages": ASKED}),
        ({"conversations": SHAREGPT, "system": "SYS"}, {"messages": [SYSTEM, *ASKED]}),
        ({"conversations": SHAREGPT, "system": None}, {"messages": ASKED}),
        (
            {"conversations": [{"from": "system", "value": "SYS"}, *SHAREGPT], "id": 7},
            {"messages": [SYSTEM, *ASKED], "id": 7},
        ),
        ({"conversations": ASKED}, {"messages": ASKED}),
        (
            {
                "conversations": [
                    *SHAREGPT,
                    {"from": "observation", "value": "7"},
                    {"from": "gpt", "value": "OK"},
                ]
            },
            {
                "messages": [
                    *ASKED,
                    {"role": "tool", "content": "7"},
                    {"role": "assistant", "content": "OK"},
                ]
            },
        ),
        ({"prompt": "ASK", "completion": "ANS"}, {"messages": ASKED}),
        (
            {"prompt": [SYSTEM, ASKED[0]], "completion": [ASKED[1]], "code": "NS"},
            {"messages": [SYSTEM, *ASKED], "code": "NS"},
        ),
        # A table of several kinds of rows has null where a row has no such key.
        ({"messages": None, "prompt": "ASK", "completion": "ANS"}, {"messages": ASKED}),
    ],
)
def test_other_forms(row, expected):
    assert list(read_chats([row])) == [expected]


def test_what_sharegpt_says_of_a_turn_counts():
    asked, answer = SHAREGPT
    again = [{"from": "human", "value": "AND"}, {"from": "gpt", "value": "YES"}]
    for context in ({"weight": 0}, {"train": False}):
        (read,) = read_chats([{"conversations": [asked, {**answer, **context}, *again]}])
        assert [turn.get("weight") for turn in read["messages"]] == [None, 0, None, None]
    called = {**answer, "tool_calls": [{"name": "f"}]}
    with pytest.raises(ValueError, match=r"messages\[1\] has tool_calls, which would be lost"):
        list(read_chats([{"conversations": [asked, called, *again]}]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": "hi"}, "conversations must be a list of turns, got str"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\] must have the keys from and"),
        (
            {"conversations": [{"from": "bing", "value": "x"}]},
            r"conversations\[0\] must be from one of system, human, .*, got 'bing'",
        ),
        ({"prompt": "ASK", "completion": ASKED}, "two strings or two lists of turns, got str and"),
        ({"prompt": "ASK", "completion": None}, r"expected the key messages, conversations"),
        ({"prompt": 1, "chosen": 2, "rejected": 3}, "give the chosen answer as completion"),
        ({"instruction": "x"}, r"a recipe that makes messages .* got the keys \['instruction'\]"),
        ({"messages": ASKED, "tools": [{"name": "f"}]}, r"row 0: tools would be lost: write them"),
    ],
)
def test_forms_that_are_none(row, message):
    with pytest.raises(ValueError, match=message):
        next(read_chats([row]))
