"""More views than Text and Code: the pairs they give, and that one packed pass trains them."""

import json

import datasets
import pytest
import torch

from llmjepa_kernels import TubeSampler, pack
from llmjepa_kernels.data.chat import chat_example, plain_example
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.grammar import generate
from llmjepa_kernels.data.predictor_tokens import predictor_token
from llmjepa_kernels.data.samples import read_chats
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.example import with_tubes, without_views
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training.collator import LLMJEPACollator
from llmjepa_kernels.training.objective import llm_jepa_loss
from tests.hf.test_families import gradients, separate_passes
from tests.support.models import tiny_model


def turns(*contents):
    roles = ("system", "user", "assistant")
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]


CHAT = turns("SYS", "ASK", "ANS")
VIEWS = {"name": "vowel line", "question": {"role": "user", "content": "which lines?"}}
PAIRS = [["question", "code"], ["text", "name"], ["text", "code"], ["code", "name"]]
# What stands before the content of each view, and the content.
CONTENTS = {"text": "ASK", "code": "ANS", "name": "vowel line", "question": "which lines?"}
HEADERS = {
    "shared": {
        "text": "<|bos|><|system|>SYS<|eos|><|user|>",
        "code": "<|bos|><|assistant|>",
        "name": "<|bos|><|assistant|>",
        "question": "<|bos|><|user|>",
    },
    "plain": dict.fromkeys(CONTENTS, "<|bos|>"),
}
HEADERS["official"] = {**HEADERS["shared"], "text": "<|bos|><|user|>"}
PRED = predictor_token(1) + predictor_token(2)
IN_FRONT = "<|predictor_2|><|predictor_1|>"  # the nearest to the content is the same


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(generate(50), vocab_size=300)
    tokenizer.add_tokens([predictor_token(1), predictor_token(2)], special_tokens=True)
    return tokenizer


def make(kind, tokenizer, messages=CHAT, pred_ids=(300, 301), **options):
    """A chat example of a layout, or a plain one."""
    if kind == "plain":
        return plain_example(messages, tokenizer, separator_id=4, pred_ids=pred_ids, **options)
    return chat_example(messages, tokenizer, layout=kind, pred_ids=pred_ids, **options)


def pairs(example, tokenizer):
    """What the last tokens of each pair see."""

    def path(index):
        if index is None:
            return ""
        segment = example.segments[index]
        return path(segment.parent) + tokenizer.decode(segment.input_ids)

    return [(path(predictor), path(target)) for predictor, target in example.pairs]


@pytest.mark.parametrize("pred_position", ["append", "prepend"])
@pytest.mark.parametrize("kind", HEADERS)
def test_pairs(tokenizer, kind, pred_position):
    def expected(names):
        def predictor(name):
            if pred_position == "append":
                return HEADERS[kind][name] + CONTENTS[name] + PRED
            return HEADERS[kind][name] + IN_FRONT + CONTENTS[name]

        return [(predictor(p), HEADERS[kind][t] + CONTENTS[t]) for p, t in names]

    def found(**options):
        example = make(kind, tokenizer, views=VIEWS, pred_position=pred_position, **options)
        assert without_views(example) == without_views(make(kind, tokenizer))
        return pairs(example, tokenizer)

    every = [("text", "code"), ("text", "name"), ("text", "question")]
    back = [(t, p) for p, t in every]
    assert found() == expected(every)
    assert found(direction="code_to_text") == expected(back)
    assert found(direction="both") == expected(every + back)
    assert found(pairs=PAIRS) == expected(PAIRS)
    assert found(pairs=PAIRS, direction="code_to_text") == expected([p[::-1] for p in PAIRS])
    mutual = [("code", "name"), ("name", "code")]
    assert found(pairs=mutual, direction="both") == expected(mutual)  # neither is there twice
    assert found(pairs=[]) == []


@pytest.mark.parametrize("kind", HEADERS)
def test_every_view_and_every_prediction_is_there_once(tokenizer, kind):
    example = make(kind, tokenizer, views=VIEWS, pairs=PAIRS)
    decoded = [tokenizer.decode(segment.input_ids) for segment in example.segments]
    assert decoded.count(PRED) == 3  # of question, text and code
    for name in ("code", "name", "question"):
        assert decoded.count(HEADERS[kind][name] + CONTENTS[name]) == 1
    unused = make(kind, tokenizer, views=VIEWS, pairs=[("text", "name")])
    assert "which lines?" not in "".join(tokenizer.decode(s.input_ids) for s in unused.segments)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("pred_position", ["append", "prepend"])
@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.usefixtures("one_thread")
def test_one_packed_pass_equals_separate_ones(tokenizer, kind, pred_position, k):
    examples = [
        make(
            kind,
            tokenizer,
            row["messages"],
            pred_ids=(300, 301)[:k],
            views={"name": f"line {i}", "question": {"role": "user", "content": "Which?"}},
            pairs=PAIRS if i else None,
            direction="both",
            pred_position=pred_position,
        )
        for i, row in enumerate(generate(2, seed=3))
    ]
    examples = [with_tubes(example, TubeSampler(count=2)) for example in examples]
    model = tiny_model("llama", vocab_size=len(tokenizer))
    _, ntp_loss, jepa_loss, stp_loss = separate_passes(model, examples)
    expected = gradients(model, ntp_loss + 0.7 * jepa_loss + 0.3 * stp_loss)
    batch = pack(examples)
    assert batch["input_ids"].numel() < sum(len(s.input_ids) for e in examples for s in e.segments)
    output = llm_jepa_loss(patch_model(model), batch, jepa_weight=0.7, stp_weight=0.3)
    assert output.num_pairs == 2 * 3 + 2 * len(PAIRS)
    torch.testing.assert_close(output.ntp_loss, ntp_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.jepa_loss, jepa_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.stp_loss, stp_loss, rtol=1e-5, atol=0)
    actual = gradients(model, output.loss)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def sample(**keys):
    return {"messages": CHAT, **keys}


def test_samples_keep_their_views(tmp_path, tokenizer):
    rows = [
        sample(views=VIEWS, pairs=PAIRS),
        sample(views={"name": "vowel line"}),
        sample(text="AS", pairs=[["code", "text"]]),
    ]
    path = tmp_path / "views.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_chats(path)) == rows
    as_list = {"question": [{"role": "user", "content": "which lines?"}], "name": "vowel line"}
    assert next(read_chats([sample(views=as_list)]))["views"] == VIEWS
    # A table has every column in every row, and null where a row has no such key.
    samples = list(read_chats(datasets.Dataset.from_list([rows[1], sample()])))
    assert samples == [rows[1], sample()]
    collator = LLMJEPACollator(tokenizer, ExampleFormat(pred_ids=(300, 301)))
    assert collator.example(rows[0]) == make("shared", tokenizer, views=VIEWS, pairs=PAIRS)
    dropped = collator.example({**rows[0], "without_views": True})
    assert dropped == without_views(make("shared", tokenizer))
    plain = ExampleFormat("plain", separator_id=4, pred_ids=(300, 301))
    assert plain.example(rows[0], tokenizer) == make("plain", tokenizer, views=VIEWS, pairs=PAIRS)


BAD = [
    ({"views": ["x"]}, "views must map names to contents, got list"),
    ({"views": {"code": "x"}}, r"views must have names other than \['text', 'code'\], got 'code'"),
    ({"views": {"a": " "}}, r"views\['a'\] must not be empty, got ' '"),
    ({"views": {"a": 3}}, r"views\['a'\] must be a string, got int"),
    ({"views": {"a": {"role": "system", "content": "x"}}}, r"views\['a'\] must be a string or a"),
    ({"views": {"a": {"role": "user"}}}, r"views\['a'\] must be a string or a user or assistant"),
    ({"views": {"a": {"role": "user", "content": ""}}}, r"views\['a'\] must not be empty"),
    ({"pairs": "text"}, "pairs must be a list of pairs of views, got 'text'"),
    ({"pairs": [["text", "code"], "ab"]}, r"pairs\[1\] must name two different views, got 'ab'"),
    ({"pairs": [["text"]]}, r"pairs\[0\] must name two different views, got \['text'\]"),
    ({"pairs": [["text", "text"]]}, r"pairs\[0\] must name two different views"),
    ({"pairs": [["text", ["a"]]]}, r"pairs\[0\] must name views out of .*got \['a'\]"),
    (
        {"views": {"a": "x"}, "pairs": [["text", "b"]]},
        r"pairs\[0\] must name views out of \['text', 'code', 'a'\], got 'b'",
    ),
    ({"pairs": [["text", "code"]] * 2}, r"pairs must not repeat a pair, got \['text', 'code'\]"),
]


@pytest.mark.parametrize(("keys", "message"), BAD)
def test_bad_views_and_pairs(tokenizer, keys, message):
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        next(read_chats([sample(**keys)]))
    for kind in HEADERS:
        with pytest.raises(ValueError, match=f"^{message}"):
            make(kind, tokenizer, **keys)
