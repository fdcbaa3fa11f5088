"""Readers on good and bad files, the datasets' recipes, and the tokenizer's round trip."""

import json

import datasets
import pytest
from transformers import AutoTokenizer

from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.chat import chat_example, chat_prompt
from llmjepa_kernels.data.samples import RECIPES, read_chats, train_tokenizer


def chat(user="ASK", assistant="ANS", **keys):
    turns = [("system", "SYS"), ("user", user), ("assistant", assistant)]
    return {"messages": [{"role": r, "content": c} for r, c in turns], **keys}


def write(path, *lines):
    path.write_text("".join(line if line[-1:] == "\n" else f"{line}\n" for line in lines))
    return path


def test_reads_what_was_written(tmp_path):
    samples = [chat("a", depth=2), chat("é 漢字\n"), {"messages": chat("c")["messages"][1:]}]
    first = write(tmp_path / "1.jsonl", *map(json.dumps, samples[:2]))
    second = write(tmp_path / "2.jsonl", "\n", json.dumps(samples[2]), "  \n")
    assert list(read_chats(first)) == samples[:2]
    assert list(read_chats(str(first))) == samples[:2]
    assert list(read_chats([first, str(second)])) == samples
    assert list(read_chats(iter(samples))) == samples
    assert list(read_chats([second, samples[0]])) == [samples[2], samples[0]]


def test_byte_order_mark_and_no_last_newline(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(chat("é"), ensure_ascii=False).encode())
    assert list(read_chats(path)) == [chat("é")]


def test_own_views_become_strings_and_the_source_is_left_alone():
    text = [{"role": "user", "content": "part"}]
    code = [{"role": "assistant", "content": "whole"}]
    row = chat(text=text, code=code)
    (sample,) = read_chats([row])
    assert sample == chat(text="part", code="whole")
    assert row == chat(text=text, code=code)
    assert list(read_chats([chat(text="part", code=None)])) == [chat(text="part")]


BAD = [
    ('{"messages": [', r"not JSON: Expecting value at column 15"),
    ("[1, 2]", "expected an object with the key messages, got list"),
    ('{"message": []}', r"expected the key messages, got the keys \['message'\]"),
    ('{"messages": "hi"}', "messages must be a list of turns, got str"),
    ('{"messages": []}', r"roles \[system,\] user, assistant, got \[\]"),
    (json.dumps({"messages": chat()["messages"][:2]}), r"got \['system', 'user'\]"),
    (json.dumps(chat(assistant=" \n ")), r"messages\[2\] must not be empty"),
    (json.dumps(chat(user=None)), r"messages\[1\] must be a string, got NoneType"),
    (json.dumps(chat(user="\ud800")), r"messages\[1\] is not valid Unicode"),
    ('{"messages": [{"role": "user"}]}', r"messages\[0\] must have the keys role and content"),
    (json.dumps(chat(text="")), "text must not be empty"),
    (json.dumps(chat(code=[])), "code must be a string or one assistant turn"),
    (
        json.dumps(chat(code=[{"role": "user", "content": "x"}])),
        "code must be a string or one assistant turn",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_line_is_named_by_its_number(tmp_path, line, message):
    good = json.dumps(chat())
    path = write(tmp_path / "bad.jsonl", good, "\n", line, good)
    stream = read_chats(path)
    assert next(stream) == chat()
    with pytest.raises(ValueError, match=rf"bad\.jsonl:3: .*{message}"):
        next(stream)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(chat()).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: .*codec can't decode byte 0xff"):
        list(read_chats(path))


def test_bad_lines_can_be_counted_and_left_out(tmp_path):
    good = [chat(str(i)) for i in range(3)]
    lines = [json.dumps(good[0]), *(line for line, _ in BAD), *map(json.dumps, good[1:])]
    errors = []
    assert list(read_chats(write(tmp_path / "b.jsonl", *lines), on_error=errors.append)) == good
    assert [str(error).split(": ")[0] for error in errors] == [
        f"{tmp_path / 'b.jsonl'}:{number}" for number in range(2, len(BAD) + 2)
    ]


def test_bad_row_is_named_by_its_index():
    with pytest.raises(ValueError, match=r"row 1: messages must have the roles"):
        list(read_chats([chat(), {"messages": []}]))


def test_a_missing_file_is_an_error_before_the_first_sample(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_chats(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        list(read_chats([tmp_path / "none.jsonl"]))


def test_reads_lazily():
    def rows():
        yield chat()
        raise AssertionError("read too far")

    assert next(read_chats(rows())) == chat()


def test_datasets_in_and_out(tmp_path):
    samples = grammar.generate(20)
    path = write(tmp_path / "g.jsonl", *map(json.dumps, samples))
    table = datasets.Dataset.from_list(samples)
    assert list(read_chats(table)) == samples
    streamed = datasets.IterableDataset.from_generator(read_chats, gen_kwargs={"source": path})
    assert list(read_chats(streamed)) == samples
    with pytest.raises(ValueError, match=r"one split .* got all of \['train'\]"):
        read_chats(datasets.DatasetDict(train=table))


ROWS = {
    "gsm8k": ({"question": "1 + 1?", "answer": "2\n#### 2"}, "1 + 1?", "2\n#### 2"),
    "nq_open": ({"question": "who", "answer": ["A. B.", "B"]}, "who", "A. B.; B"),
    "nl_rx": ({"src": "lines with a vowel", "targ": "[aeiou]"}, "lines with a vowel", "[aeiou]"),
    "spider": (
        {"db_id": "store", "question": "How many?", "query": "SELECT 1"},
        "For db_id:[store]\n\nHow many?",
        "SELECT 1",
    ),
    "rotten_tomatoes": ({"text": "fine .", "label": 1}, "fine .", "Good"),
    "yelp": ({"text": "so so", "label": 2}, "so so", "Mediocre"),
    "hellaswag": (
        {"ctx": "A dog", "endings": ["runs", "sits", "eats", "flies"], "label": "1"},
        "A dog\nA) runs\nB) sits\nC) eats\nD) flies",
        "B",
    ),
}


def test_every_recipe_is_tested():
    assert ROWS.keys() | {"paraphrase"} == RECIPES.keys()


@pytest.mark.parametrize("name", ROWS)
def test_recipes(name):
    row, user, assistant = ROWS[name]
    (sample,) = read_chats([row], recipe=name)
    assert [turn["content"] for turn in sample["messages"][1:]] == [user, assistant]
    views = {"text": "A dog", "code": "sits"} if name == "hellaswag" else {}
    assert {key: value for key, value in sample.items() if key != "messages"} == views
    missing = next(iter(row))
    with pytest.raises(ValueError, match=rf"row 0: expected the column '{missing}', got"):
        list(read_chats([{k: v for k, v in row.items() if k != missing}], recipe=name))


def test_paraphrases():
    def contents(row):
        samples = read_chats([row], recipe="paraphrase")
        return [[turn["content"] for turn in sample["messages"]] for sample in samples]

    assert contents({"paraphrases": ["a", "b", "c"]}) == [["a", "b"], ["b", "c"]]
    assert contents({"sentence1": "a", "sentence2": "b", "label": 1}) == [["a", "b"]]
    assert contents({"text": "a", "paraphrase": "b"}) == [["a", "b"]]
    for row, message in (
        ({"sentence1": "a", "sentence2": "b", "label": 0}, "these are no paraphrases: 0"),
        ({"paraphrases": ["a"]}, "must be a list of at least two"),
        ({"paraphrases": ["a", " "]}, "must not be empty"),
        ({"question1": "a"}, r"expected the columns paraphrases or sentence1 and sentence2"),
    ):
        with pytest.raises(ValueError, match=f"row 0: .*{message}"):
            contents(row)


def test_pairs_of_lines(tmp_path):
    write(tmp_path / "src.txt", "lines with a vowel", "é")
    write(tmp_path / "targ.txt", r".*[aeiou].*", r"\b(é)\b")
    samples = list(read_chats(tmp_path, recipe="nl_rx"))
    turns = [[turn["content"] for turn in sample["messages"]] for sample in samples]
    assert turns == [
        [grammar.SYSTEM_PROMPT, "lines with a vowel", ".*[aeiou].*"],
        [grammar.SYSTEM_PROMPT, "é", r"\b(é)\b"],
    ]
    write(tmp_path / "targ.txt", ".")
    with pytest.raises(ValueError, match=r":2: src.txt and targ.txt must have equally many lines"):
        list(read_chats(tmp_path, recipe="nl_rx"))


def test_saved_datasets(tmp_path):
    samples = grammar.generate(5)
    table = datasets.Dataset.from_list(samples)
    table.save_to_disk(tmp_path / "one")
    assert list(read_chats(tmp_path / "one")) == samples
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"several splits: give one, such as .*both/train"):
        read_chats(tmp_path / "both")
    assert list(read_chats(str(tmp_path / "both" / "test"))) == samples
    with pytest.raises(ValueError, match=r"neither of src.txt and targ.txt nor a saved dataset"):
        read_chats(tmp_path)


def test_datasets_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list([ROWS["gsm8k"][0]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (sample,) = read_chats("hub:openai/gsm8k:main:test", recipe="gsm8k")
    assert sample["messages"][1]["content"] == "1 + 1?"
    list(read_chats("hub:nq_open:train", recipe="gsm8k"))
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "test", "streaming": True}),
        (("nq_open",), {"split": "train", "streaming": True}),
    ]
    with pytest.raises(ValueError, match=r"expected hub:NAME:SPLIT .*, got 'hub:nq_open'"):
        read_chats("hub:nq_open")


@pytest.mark.parametrize("name", ["rotten_tomatoes", "yelp", "hellaswag"])
@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_that_is_none_is_refused(name, label):
    row = {**ROWS[name][0], "label": label}
    with pytest.raises(ValueError, match=rf"row 0: label must be in 0 \.\. \d, got {label}"):
        list(read_chats([row], recipe=name))


def test_own_recipe_and_unknown_recipe(tmp_path):
    path = write(tmp_path / "pairs.jsonl", json.dumps({"en": "dog", "de": "Hund"}))
    samples = list(read_chats(path, recipe=lambda row: chat(row["en"], row["de"])))
    assert samples == [chat("dog", "Hund")]
    with pytest.raises(ValueError, match=r"recipe must be one of \['gsm8k', .*got 'glue'"):
        read_chats(path, recipe="glue")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(grammar.generate(500), vocab_size=400)


def test_tokenizer_encodes_everything_and_round_trips(tokenizer, tmp_path):
    assert len(tokenizer) == 400
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    for key, value in special.items():
        assert getattr(loaded, key) == getattr(tokenizer, key) == value
    for text in (" lines  with\n\ta vowel", "é 漢字 🦜 \x00", r"\b(~([A-Z])){2,}\b & it 's"):
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == loaded.decode(ids) == text
    messages = chat("é🦜")["messages"]
    assert chat_example(messages, loaded) == chat_example(messages, tokenizer)


def test_tokenizer_template(tokenizer):
    example = chat_example(chat()["messages"], tokenizer)
    decoded = [tokenizer.decode(segment.input_ids) for segment in example.segments]
    assert decoded == [
        "<|bos|><|system|>SYS<|eos|><|user|>ASK",
        "<|eos|><|assistant|>ANS<|eos|>",
        "<|bos|><|assistant|>ANS",
    ]
    labels = example.segments[1].labels
    assert labels[:2] == [-100, -100]
    assert labels[-1] == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(chat()["messages"][:2], add_generation_prompt=True)
    assert prompt["input_ids"] == chat_prompt(chat()["messages"], tokenizer)


def test_tokenizer_is_the_same_every_time(tokenizer):
    again = train_tokenizer(iter(grammar.generate(500)), vocab_size=400)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_tokenizer_needs_room_for_every_byte():
    with pytest.raises(ValueError, match="vocab_size must be at least 262, got 261"):
        train_tokenizer(grammar.generate(5), vocab_size=261)
    assert len(train_tokenizer(grammar.generate(5), vocab_size=262)) == 262
