"""The format of a checkpoint's examples: what it makes of a sample, and its way through a file."""

import copy
import dataclasses
import json

import pytest
from huggingface_hub import constants
from tokenizers import processors

from llmjepa_kernels.data.chat import chat_example, chat_prompt, plain_example, plain_prompt
from llmjepa_kernels.data.example_format import FORMAT_FILE, ExampleFormat
from llmjepa_kernels.data.grammar import generate
from llmjepa_kernels.data.tokenizer import train_tokenizer
from tests.support.chats import CHAT, get_tokenizer

SAMPLE = {**generate(1)[0], "text": "lines", "code": "a.*b"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(generate(50), vocab_size=300)


def test_chat_and_plain_are_those_of_chat(tokenizer):
    options = {"pred_ids": (7, 8), "direction": "both", "pred_position": "prepend"}
    options["supervise"] = "all"
    views = {"text": SAMPLE["text"], "code": SAMPLE["code"]}
    messages = SAMPLE["messages"]

    chat = ExampleFormat(layout="official", **options)
    expected = chat_example(messages, tokenizer, layout="official", **views, **options)
    assert chat.example(SAMPLE, tokenizer) == expected != ExampleFormat().example(SAMPLE, tokenizer)
    assert chat.prompt(SAMPLE, tokenizer) == chat_prompt(messages, tokenizer)

    # A table has null where other rows have views.
    null = {**SAMPLE, "views": {"sql": None}}
    assert chat.example(null, tokenizer) == chat.example(SAMPLE, tokenizer)

    plain = ExampleFormat("plain", separator_id=5, **options)
    expected = plain_example(messages, tokenizer, separator_id=5, **views, **options)
    assert plain.example(SAMPLE, tokenizer) == expected
    assert plain.prompt(SAMPLE, tokenizer) == plain_prompt(messages, tokenizer, separator_id=5)


def test_template_options_reach_the_template(tokenizer):
    shout = "{% if shout %}!{% endif %}"
    loud = train_tokenizer(generate(50), vocab_size=300)
    loud.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", shout)
    quiet, shouting = ExampleFormat(), ExampleFormat(template_kwargs={"shout": True})
    mark = loud("!")["input_ids"]
    assert shouting.prompt(SAMPLE, loud) == mark + quiet.prompt(SAMPLE, loud)
    longer = shouting.example(SAMPLE, loud).segments[0].input_ids
    assert longer == mark + quiet.example(SAMPLE, loud).segments[0].input_ids


@pytest.mark.parametrize(
    "saved",
    [
        ExampleFormat(layout="official", pred_ids=(300, 301), template_kwargs={"thinking": False}),
        ExampleFormat("plain", separator_id=5, supervise="all", direction="code_to_text"),
    ],
)
def test_saved_and_loaded(tmp_path, saved):
    saved.save(tmp_path)
    assert ExampleFormat.load(tmp_path) == saved
    assert hash(ExampleFormat.load(tmp_path)) == hash(saved)


def test_a_checkpoint_without_the_file_is_asked_for_its_predictors(tmp_path, tokenizer):
    assert ExampleFormat.load(tmp_path, tokenizer) == ExampleFormat()
    more = train_tokenizer(generate(50), vocab_size=300)
    more.add_tokens(["<|predictor_1|>", "<|predictor_2|>", "<|predictor_4|>"], special_tokens=True)
    assert ExampleFormat.load(tmp_path) == ExampleFormat()  # enough for prompts
    with pytest.raises(ValueError, match=r"no .*llm_jepa\.json, but the tokenizer has 2 \[PRED\]"):
        ExampleFormat.load(tmp_path, more)
    # The authors' order: the last one first.
    for count, ids in ((0, ()), (1, (300,)), (2, (301, 300))):
        found = ExampleFormat.load(tmp_path, more, num_pred_tokens=count, layout="official")
        assert found == ExampleFormat(layout="official", pred_ids=ids)
    with pytest.raises(ValueError, match=r"num_pred_tokens of .* must be in 0 \.\. 2, .*got 3"):
        ExampleFormat.load(tmp_path, more, num_pred_tokens=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"template": "chat"', "Expecting"),
        ("[]", "expected an object, got list"),
        ('{"template": "chat", "views": 3}', r"unknown keys \['views'\]"),
        ('{"layout": "flat"}', "layout must be one of .*, got 'flat'"),
        ('{"pred_ids": 3}', "int"),
        ('{"pred_ids": [-3]}', "pred_ids must be token ids"),
        ('{"template_kwargs": 3}', "template_kwargs must be a mapping, got 3"),
    ],
)
def test_a_corrupt_file_is_named(tmp_path, text, message):
    (tmp_path / FORMAT_FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"{FORMAT_FILE} is no example format: .*{message}"):
        ExampleFormat.load(tmp_path)


def test_what_a_checkpoint_says_is_not_asked_for(tmp_path):
    ExampleFormat().save(tmp_path)
    for options in ({"layout": "official"}, {"num_pred_tokens": 0}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} is for checkpoints that do not say so"):
            ExampleFormat.load(tmp_path, **options)


def test_every_field_is_saved(tmp_path):
    ExampleFormat().save(tmp_path)
    names = {field.name for field in dataclasses.fields(ExampleFormat)}
    assert json.loads((tmp_path / FORMAT_FILE).read_text()).keys() == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "html"}, "template must be one of .*, got 'html'"),
        ({"template": "plain"}, "needs a token id as separator_id, got None"),
        ({"separator_id": 3}, "separator_id needs template='plain', got 3"),
        ({"end_id": 3}, "end_id needs template='plain', got 3"),
        ({"supervise": "text"}, "supervise='text' needs template='plain'"),
        ({"template": "plain", "separator_id": 3, "end_id": "x"}, "end_id must be a token id"),
        ({"template": "plain", "separator_id": 3, "layout": "official"}, "layout='official'"),
        ({"template": "plain", "separator_id": 3, "template_kwargs": {"a": 1}}, "{'a': 1}"),
        ({"template": "plain", "separator_id": 3, "embedding_token": -1}, "embedding_token=-1"),
        ({"template": "plain", "separator_id": 3, "add_special_tokens": True}, "=True"),
        ({"embedding_token": -1}, "embedding_token=-1 needs layout='official'"),
        ({"embedding_token": 0, "layout": "official"}, "below 0, got 0"),
        ({"embedding_token": "-2", "layout": "official"}, "'content' or an int, got '-2'"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        ExampleFormat(**options)


def test_format_of_a_model_of_the_hub(tmp_path, monkeypatch):
    """As a cache of the hub lays it out."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    saved = ExampleFormat("plain", separator_id=7, pred_ids=(5, 6))
    for name in ("with", "without"):
        model = tmp_path / f"models--some--{name}"
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(commit)
    saved.save(tmp_path / "models--some--with" / "snapshots" / commit)
    assert ExampleFormat.load("some/with") == saved
    assert ExampleFormat.load("some/without") == ExampleFormat()


@pytest.fixture
def with_bos():
    """A tokenizer that begins every text with <s>."""
    tokenizer = copy.deepcopy(get_tokenizer())
    backend = tokenizer.backend_tokenizer
    begin = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.post_processor = processors.Sequence([backend.post_processor, begin])
    return tokenizer


@pytest.mark.parametrize("options", [{"embedding_token": -1}, {"add_special_tokens": True}])
def test_options_of_the_authors_reach_the_example(with_bos, options):
    official = {"layout": "official"}
    example = ExampleFormat(**official, **options).example({"messages": CHAT}, with_bos)
    assert example == chat_example(CHAT, with_bos, **official, **options)
    assert example != chat_example(CHAT, with_bos, **official)


def test_prompts_have_the_special_tokens_of_training(with_bos):
    example_format = ExampleFormat(add_special_tokens=True, layout="official")
    chat = example_format.example({"messages": CHAT}, with_bos).segments[0]
    start = next(i for i, label in enumerate(chat.labels) if label != -100)
    assert example_format.prompt({"messages": CHAT}, with_bos) == chat.input_ids[:start]
