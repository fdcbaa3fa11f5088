"""Chats of several turns: every answer is supervised, and the views are those of the last turns."""

from itertools import groupby

import pytest

from llmjepa_kernels import pack
from llmjepa_kernels.data.chat import chat_example, chat_prompt, plain_example
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.samples import read_chats
from llmjepa_kernels.evaluation.predict import stop_ids
from llmjepa_kernels.example import IGNORE, sequence_ids
from tests.support.chat_templates import KWARGS, QWEN25, SMOLLM2, SPANS
from tests.support.chats import CHAT, KINDS, decode, get_tokenizer, turns

LONG = [*turns("SYS", "FIRST?", "ONE"), *turns("THEN?", "TWO")]
TOOL = [
    *turns("SYS", "ASK?", "<call>"),
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "SEVEN"},
]


def supervised(tokenizer, example):
    """The text of every run of supervised tokens of the chat, without white space around it."""
    ids = [i for s in example.segments for i, _ in zip(s.input_ids, s.labels or (), strict=False)]
    labels = [y for s in example.segments for y in s.labels or ()]
    assert all(y in (IGNORE, i) for i, y in zip(ids, labels, strict=True))
    runs = (list(run) for given, run in groupby(labels, key=IGNORE.__ne__) if given)
    return [decode(tokenizer, run).strip() for run in runs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SPANS)
def test_every_answer_is_supervised(family, kind):
    tokenizer = get_tokenizer(SPANS[family][0], kind)
    kwargs = KWARGS.get(family, {})
    end = SPANS[family][3].strip().removeprefix("ANS")
    folded = [*turns("SYS\n\nFIRST?", "ONE"), *LONG[3:]]  # for a template without system turns
    written = folded if family == "gemma2" else LONG
    whole = tokenizer.apply_chat_template(written, **kwargs)["input_ids"]
    shared = chat_example(LONG, tokenizer, template_kwargs=kwargs)
    prompt, rest, code = shared.segments
    assert [*prompt.input_ids, *rest.input_ids] == whole
    assert decode(tokenizer, prompt.input_ids).rstrip().endswith("THEN?")
    assert supervised(tokenizer, shared) == [f"ONE{end}", f"TWO{end}"]
    official = chat_example(LONG, tokenizer, layout="official", template_kwargs=kwargs)
    assert official.segments[0].input_ids == whole
    assert supervised(tokenizer, official) == [f"ONE{end}", f"TWO{end}"]
    alone = chat_example(turns("THEN?", "TWO"), tokenizer, template_kwargs=kwargs)
    assert code == official.segments[2] == alone.segments[2]
    asked = chat_prompt(LONG, tokenizer, template_kwargs=kwargs)
    assert asked == chat_prompt(LONG[:-1], tokenizer, template_kwargs=kwargs)
    assert decode(tokenizer, whole[len(asked) :]).strip().startswith("TWO")
    labels = pack([shared])["labels"][0]
    assert decode(tokenizer, labels[labels != IGNORE].tolist()).count("ONE") == 1


def test_tool_turns_are_no_answers():
    tokenizer = get_tokenizer(SMOLLM2)
    example = chat_example(TOOL, tokenizer)
    prompt, rest, code = example.segments
    assert decode(tokenizer, prompt.input_ids).endswith("user\nASK?")
    assert decode(tokenizer, rest.input_ids) == (
        "<|im_end|>\n<|im_start|>assistant\n<call><|im_end|>\n<|im_start|>tool\n7<|im_end|>\n"
        "<|im_start|>assistant\nSEVEN<|im_end|>\n"
    )
    assert supervised(tokenizer, example) == ["<call><|im_end|>", "SEVEN<|im_end|>"]
    assert decode(tokenizer, code.input_ids).endswith("assistant\nSEVEN")
    with pytest.raises(ValueError, match=r"cannot render .*does not give every content once"):
        chat_example(TOOL, get_tokenizer(QWEN25))


def test_a_turn_ends_with_what_its_template_ends_the_last_one_with():
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if loop.last %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    )
    tokenizer = get_tokenizer(template)
    assert supervised(tokenizer, chat_example(LONG, tokenizer)) == ["ONE", "TWO</s>"]


def test_views_of_the_last_turns():
    tokenizer = get_tokenizer(SMOLLM2)
    own = chat_example(LONG, tokenizer, text="THE", code="2", layout="official")
    assert decode(tokenizer, own.segments[1].input_ids).endswith("<|im_start|>user\nTHE")
    assert decode(tokenizer, own.segments[2].input_ids).endswith("assistant\n2")
    assert stop_ids(tokenizer, [own]) == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }


def test_the_plain_format_has_no_place_for_them():
    tokenizer = get_tokenizer(None)
    for messages in (LONG, TOOL):
        with pytest.raises(ValueError, match=r"plain format takes the roles \[system,\] user, as"):
            plain_example(messages, tokenizer, separator_id=3)
    assert plain_example(CHAT, tokenizer, separator_id=3)


@pytest.mark.parametrize("layout", ["shared", "official"])
@pytest.mark.parametrize("family", SPANS)
def test_views_of_an_earlier_turn(family, layout):
    tokenizer = get_tokenizer(SPANS[family][0])
    options = {"layout": layout, "template_kwargs": KWARGS.get(family, {})}
    last = chat_example(LONG, tokenizer, **options)
    assert chat_example(LONG, tokenizer, view_turn=1, **options) == last
    first = chat_example(LONG, tokenizer, view_turn=-2, **options)
    assert chat_example(LONG, tokenizer, view_turn=0, **options) == first
    # The chat and what is supervised of it are the same; Text ends in its first question.
    chat = sequence_ids(last, last.path.segment)
    assert sequence_ids(first, first.path.segment) == chat
    assert supervised(tokenizer, first) == supervised(tokenizer, last)
    text, code = (first.segments[i].input_ids for i in first.pairs[0])
    assert decode(tokenizer, text).rstrip().endswith("FIRST?")
    assert decode(tokenizer, code).rstrip().endswith("ONE")
    contents = [decode(tokenizer, chat[slice(*span)]).strip() for span in first.path.spans]
    assert contents[0].endswith("FIRST?")
    assert contents[1] == "ONE"


def test_the_turn_of_a_sample():
    tokenizer = get_tokenizer()
    (sample,) = read_chats([{"messages": LONG, "view_turn": 0}])
    expected = chat_example(LONG, tokenizer, view_turn=0)
    assert ExampleFormat().example(sample, tokenizer) == expected
    assert read_one({"messages": LONG, "view_turn": None}) == {"messages": LONG}
    with pytest.raises(ValueError, match="view_turn must be an integer, from -2 to 1, got 2"):
        read_one({"messages": LONG, "view_turn": 2})
    greeted = [{"role": "assistant", "content": "HELLO"}, *CHAT[1:]]
    with pytest.raises(ValueError, match="view_turn=0 is an answer that no user turn is before"):
        read_one({"messages": greeted, "view_turn": 0})
    plain = ExampleFormat("plain", separator_id=5)
    with pytest.raises(ValueError, match="view_turn needs template='chat', got 0"):
        plain.example({"messages": CHAT, "view_turn": 0}, tokenizer)


def read_one(row):
    (sample,) = read_chats([row])
    return sample


@pytest.mark.parametrize("layout", ["shared", "official"])
@pytest.mark.parametrize("context", [{"weight": 0}, {"train": False}])
def test_answers_that_are_context_only(context, layout):
    tokenizer = get_tokenizer(SMOLLM2)
    chat = [{**turn, **context} if turn["content"] == "ONE" else turn for turn in LONG]
    assert supervised(tokenizer, chat_example(chat, tokenizer, layout=layout)) == ["TWO<|im_end|>"]
    (read,) = read_chats([{"messages": chat}])
    assert chat_example(read["messages"], tokenizer) == chat_example(chat, tokenizer)
    # Weights of 1 change nothing, nor do those of others than assistants.
    same = [{**turn, "weight": int(turn["role"] == "assistant")} for turn in LONG]
    assert chat_example(same, tokenizer) == chat_example(LONG, tokenizer)


def test_answers_in_a_prompt_are_context_only():
    tokenizer = get_tokenizer(SMOLLM2)
    for says, learnt in (({}, 1), ({"weight": None}, 1), ({"weight": 1}, 2), ({"train": True}, 2)):
        prompt = [{**turn, **says} if turn["role"] == "assistant" else turn for turn in LONG[:-1]]
        (read,) = read_chats([{"prompt": prompt, "completion": LONG[-1:]}])
        found = supervised(tokenizer, chat_example(read["messages"], tokenizer))
        assert found == ["ONE<|im_end|>", "TWO<|im_end|>"][-learnt:]
    for everything in ("all", "released"):
        example = chat_example(
            read_one({"prompt": LONG[:-1], "completion": LONG[-1:]})["messages"],
            tokenizer,
            supervise=everything,
        )
        found = " ".join(supervised(tokenizer, example))
        assert "TWO" in found
        assert "ONE" not in found


def test_weights_that_are_none():
    tokenizer = get_tokenizer(SMOLLM2)
    for weight in (0.5, "0", -1):
        chat = [*LONG[:-1], {**LONG[-1], "weight": weight}]
        with pytest.raises(ValueError, match=r"must have a weight of 0 or 1, got"):
            chat_example(chat, tokenizer)
    nothing = turns("ASK?", "ANS")
    nothing[1]["weight"] = 0
    with pytest.raises(ValueError, match="must have an assistant turn to learn"):
        read_one({"messages": nothing})  # where --skip-bad-lines leaves it out
    with pytest.raises(ValueError, match="must have an assistant turn to learn"):
        chat_example(nothing, tokenizer)
    with pytest.raises(ValueError, match="must have an assistant turn to learn"):
        plain_example(nothing, tokenizer, separator_id=5)
