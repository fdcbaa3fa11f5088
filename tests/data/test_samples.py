"""Readers on good and bad files and data sets."""

import gzip
import io
import json
import sys

import datasets
import pytest
import torch

from llmjepa_kernels.data import grammar
from llmjepa_kernels.data import sources as sources_module
from llmjepa_kernels.data.samples import located_chats, read_chats


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
    ("[1, 2]", "expected an object, as .*, got list"),
    ('{"message": []}', r"expected the key messages, .* got the keys \['message'\]"),
    ('{"messages": "hi"}', "messages must be a list of turns, got str"),
    ('{"messages": []}', r"roles \[system,\] user, assistant, .*got \[\]"),
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


def test_pairs_of_lines_behind_a_byte_order_mark(tmp_path):
    for name, line in (("src", "the word"), ("targ", "dog")):
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + f"{line}\n".encode())
    (sample,) = read_chats(tmp_path, recipe="nl_rx")
    assert [turn["content"] for turn in sample["messages"]][-1] == "dog"
    assert "\ufeff" not in str(sample)


def test_saved_datasets(tmp_path):
    samples = grammar.generate(5)
    table = datasets.Dataset.from_list(samples)
    table.save_to_disk(tmp_path / "one")
    assert list(read_chats(tmp_path / "one")) == samples
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"several splits: give one, such as .*both/test"):
        read_chats(tmp_path / "both")
    assert list(read_chats(str(tmp_path / "both" / "test"))) == samples
    with pytest.raises(ValueError, match=r"neither of src.txt and targ.txt nor a saved dataset"):
        read_chats(tmp_path)


def test_datasets_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list([{"question": "1 + 1?", "answer": "2\n#### 2"}])

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


class EveryNth(torch.utils.data.IterableDataset):
    """Rows of the hub as `llmjepa train --streaming` reads them in a worker."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        shard = (info.id, info.num_workers)
        for place, sample in located_chats("hub:name:train", recipe="gsm8k", shard=shard):
            yield place, sample["messages"][1]["content"]


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_workers_divide_a_stream_of_the_hub_once(num_shards, monkeypatch):
    rows = [{"question": f"{i}?", "answer": f"{i}\n#### {i}"} for i in range(12)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    loader = torch.utils.data.DataLoader(
        EveryNth(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    found = map(tuple, loader)
    assert sorted(found) == sorted((f"hub:name:train row {i}", f"{i}?") for i in range(12))


def test_own_recipe_and_unknown_recipe(tmp_path):
    path = write(tmp_path / "pairs.jsonl", json.dumps({"en": "dog", "de": "Hund"}))
    samples = list(read_chats(path, recipe=lambda row: chat(row["en"], row["de"])))
    assert samples == [chat("dog", "Hund")]
    with pytest.raises(ValueError, match=r"recipe must be one of \['gsm8k', .*got 'glue'"):
        read_chats(path, recipe="glue")


def test_tables(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('\ufeffprompt,completion\n"a, ""b""\nc",1\né,NA\n', encoding="utf-8")
    rows = [('a, "b"\nc', "1"), ("é", "NA")]
    expected = [{"messages": chat(*row)["messages"][1:]} for row in rows]
    assert list(read_chats(path)) == expected
    write(tmp_path / "t.TSV", "text\tlabel", "fine\t1")
    (sample,) = read_chats(tmp_path / "t.TSV", recipe="rotten_tomatoes")
    assert sample["messages"][-1]["content"] == "Good"
    quoted = '"def f(x):\n\treturn x\n\n\tpass"'  # tabs and lines that are no rows
    write(tmp_path / "code.tsv", "prompt\tcompletion", f"write f\t{quoted}")
    (sample,) = read_chats(tmp_path / "code.tsv")
    assert sample["messages"][-1]["content"] == quoted.strip('"')
    table = datasets.Dataset.from_list([chat("b", text="x"), chat("a", text=None)])
    table.to_parquet(tmp_path / "t.parquet")
    assert list(read_chats([tmp_path / "t.parquet", path])) == [
        chat("b", text="x"),
        chat("a"),
        *expected,
    ]


def test_compressed_files_and_standard_input(tmp_path, monkeypatch):
    lines = "".join(json.dumps(chat(user)) + "\n" for user in "ab").encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "B.CSV.GZ").write_bytes(gzip.compress(b"prompt,completion\nq,1\n"))
    table = [{"messages": chat("q", "1")["messages"][1:]}]
    sources = [tmp_path / "a.jsonl.gz", tmp_path / "B.CSV.GZ"]
    assert list(read_chats(sources)) == [chat("a"), chat("b"), *table]

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    sources_module._standard_input.cache_clear()
    for _ in range(2):  # it is kept
        assert list(read_chats("-")) == [chat("a"), chat("b")]
    with pytest.raises(ValueError, match="-:1: expected"):
        next(read_chats("-", recipe="nl_rx"))
    sources_module._standard_input.cache_clear()


def test_quoted_lines_of_a_table_with_one_column(tmp_path):
    """No line of them is a whole row more than any other."""
    path = tmp_path / "a.tsv"
    path.write_text('text\n"first\nsecond"\n')
    (sample,) = read_chats(path, recipe=lambda row: chat(row["text"]))
    assert sample["messages"][1]["content"] == "first\nsecond"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"{}", r"a\.jsonl\.gz is no complete gzip file"),
        ("a.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "is no complete gzip file"),
        ("a.csv", b"prompt,completion\na\n", r"a\.csv:2: expected 2 values, for .*, got 1"),
        ("a.csv", b"prompt,completion\na,b,c\n", r"a\.csv:2: expected 2 values, for .*, got 3"),
        ("a.csv", b'prompt,completion\n"a"b,c\n', r"a\.csv: not CSV in UTF-8 after line \d"),
        ("a.csv", b"text,label,text\na,b,c\n", r"columns \['text'\] more than once"),
        (
            "a.tsv",
            b'text\tlabel\n"a first\t1\nb\tlast"\t1\n',
            "goes over whole rows, as behind",
        ),
        (
            "a.tsv",
            b'prompt\tcompletion\tnote\nq1\t"open\tn1\nq2\ta2\t\nq3\tclose"\tn3\n',
            "goes over whole rows, as behind",
        ),
        ("a.csv", b"prompt,completion\n\xff,b\n", r"a\.csv: not CSV in UTF-8 .*0xff"),
        ("a.parquet", b"PAR1 or not", r"a\.parquet is no Parquet file"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: it is nested too deeply"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 100_000, "too deeply"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_chats(tmp_path / name))


def test_a_recipe_that_fails_is_named():
    with pytest.raises(ValueError, match="row 0: the recipe failed with KeyError: 'x'"):
        list(read_chats([{}], recipe=lambda row: row["x"]))


@pytest.mark.parametrize("key", ["tools", "functions", "documents", "chat_template_kwargs"])
def test_what_a_template_would_be_given_is_not_lost(key):
    with pytest.raises(ValueError, match=f"{key}.* would be lost"):
        list(read_chats([chat(**{key: {"a": 1}})]))
    assert list(read_chats([chat(**{key: None})]))
