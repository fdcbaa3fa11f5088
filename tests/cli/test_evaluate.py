"""`llmjepa evaluate` from its arguments to its table and files, interrupted and gone on with."""

from __future__ import annotations

import json
import shutil
from itertools import islice

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

from llmjepa_kernels.cli import held_out
from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.predictor_tokens import add_predictor_tokens
from llmjepa_kernels.data.splits import Split
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.evaluation import predict as evaluate
from llmjepa_kernels.hf import load as models
from tests.evaluation.test_predict import talkative_llama

COUNT = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model from random weights."""
    directory = tmp_path_factory.mktemp("model") / "random"
    tokenizer = train_tokenizer(grammar.generate(20))
    model = talkative_llama(tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(checkpoint, tmp_path_factory):
    """Every other answer is what the model says."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    samples = grammar.generate(COUNT, seed=5)
    for prediction in evaluate.evaluate(model, tokenizer, samples, max_new_tokens=4):
        if prediction.index % 2:
            samples[prediction.index]["messages"][-1]["content"] = prediction.completion
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


@pytest.fixture
def command(checkpoint, data, tmp_path, capsys):
    """Runs the command in batches of three; its exit status, what it printed, the output file."""

    def run(*options: object, checkpoints=(checkpoint,), data=data):
        output = tmp_path / "predictions.jsonl"
        arguments = ["evaluate", *checkpoints, "--data", data, "--output", output]
        arguments += ["--max-new-tokens", 4, "--batch-size", 3, *options]
        try:
            status = cli.main([*map(str, arguments)])
        except SystemExit as stopped:
            status = stopped.code
        return status, capsys.readouterr(), output

    return run


@pytest.fixture
def generations(monkeypatch):
    """The sizes of the batches generated; raises KeyboardInterrupt at batch `interrupt_at`."""
    generate, sizes = evaluate._generate, []

    def counted(model, tokenizer, prompts, **options):
        if len(sizes) == counted.interrupt_at:
            raise KeyboardInterrupt
        sizes.append(len(prompts))
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(evaluate, "_generate", counted)
    counted.sizes, counted.interrupt_at = sizes, None
    return counted


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_table_and_files(command, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)  # a long path would take several lines of the table
    name = checkpoint.name
    status, printed, output = command("--split", "length:1000", checkpoints=[name])
    assert status == 0
    rows = [line.split() for line in printed.out.splitlines()[:-1] if name in line.split()]
    assert printed.out.splitlines()[-1] == f"next: llmjepa generate {name}"
    # None of its answers ends by itself, but they are cut where the right ones end.
    right = ["76.3%", "5", "/", "10", "10"]
    assert [row[-5:] for row in rows] == [right, right, ["-", "0", "/", "0", "0"]]
    found = sorted(lines(output), key=lambda line: line["index"])
    assert [line["index"] for line in found] == list(range(COUNT))
    assert [line["correct"] for line in found] == [False, True] * 5
    assert not any(line["finished"] for line in found)
    assert {line["checkpoint"] for line in found} == {name}
    assert all(line["completion"] == line["answer"] for line in found[1::2])
    assert all(line["prompt"].endswith("<|assistant|>") for line in found)
    report = json.loads(output.with_suffix(".report.json").read_text())
    result = report["checkpoints"][name]
    assert result["split"] == "length:1000"
    assert result["accuracy"]["in_distribution"]["accuracy"] == 0.5
    assert result["accuracy"]["out_of_distribution"] == {
        "correct": 0,
        "total": 0,
        "unfinished": 0,
        "accuracy": None,
        "interval_95": [0.0, 1.0],
    }


def test_a_sample_that_is_too_long_is_named_by_its_line(command, tmp_path):
    data = tmp_path / "long.jsonl"
    rows = [{"prompt": "a", "completion": "b" * n} for n in (1, 5000)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, printed, _ = command(data=data)
    assert status == 2
    assert f"{data}:2: it is" in printed.err
    assert "more than the" in printed.err


def test_built_in_data_reach_what_a_split_asks_for(checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parent)
    options = ["--split", "depth:2", "--samples", "30", "--max-new-tokens", "1"]
    assert cli.main(["evaluate", checkpoint.name, *options]) == 0
    counts = [int(line.split()[-2]) for line in capsys.readouterr().out.splitlines()[2:-2]]
    assert counts[0] == 30 == counts[1] + counts[2]
    assert min(counts) > 5


def test_a_split_that_built_in_data_cannot_fill(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(held_out, "MOST", 50)
    options = ["train", "--split", "length:500", "--output-dir", str(tmp_path / "out")]
    assert cli.main(options) == 2
    assert "--split length:500: of 50 built-in pairs in a row none" in capsys.readouterr().err


def test_a_split_may_take_many_samples(monkeypatch):
    """The limit is on those in a row that are on one side."""
    monkeypatch.setattr(held_out, "MOST", 50)
    samples = held_out.built_in_samples("train", seed=1, split=Split.parse("depth:2"))
    assert len(list(islice(samples, 500))) == 500


def test_goes_on_where_it_was_interrupted(command, generations, tmp_path):
    generations.interrupt_at = 2
    status, printed, output = command()
    assert status == 130
    assert "interrupted after 6 of 10" in printed.err
    assert "the same command goes on" in printed.err
    before = output.read_bytes()
    assert len(before.splitlines()) == 6
    with open(output, "ab") as file:
        file.write(before[:57])  # as a killed process leaves it
    generations.interrupt_at = None
    generations.sizes.clear()
    status, printed, _ = command()
    assert status == 0
    assert "5 / 10" in printed.out
    assert generations.sizes == [3, 1]  # nothing twice
    assert output.read_bytes().startswith(before)
    assert sorted(line["index"] for line in lines(output)) == list(range(COUNT))
    # Once more, with another split: nothing is left to generate.
    generations.sizes.clear()
    status, printed, _ = command("--split", "length:5")
    assert (status, generations.sizes) == (0, [])
    assert "out of distribution" in printed.out


def test_refuses_predictions_of_something_else(command, checkpoint, data, tmp_path):
    _, _, output = command()
    written = output.read_bytes()
    other_data = tmp_path / "other.jsonl"
    other_data.write_text(data.read_text().replace("lines", "rows", 1))
    cases = [
        (("--max-new-tokens", 7), {}, r"its max_new_tokens is 4, not 7"),
        (("--rule", "any"), {}, r"its rule is 'exact', not 'any'"),
        (("--samples", 5), {}, r"its data is"),
        (("--dtype", "bfloat16"), {}, r"its dtype is 'float32', not 'bfloat16'"),
        ((), {"data": other_data}, r"its data is"),
    ]
    for options, changed, expected in cases:
        status, printed, _ = command(*options, **changed)
        assert status == 2
        assert "belongs to another evaluation" in printed.err
        assert expected in printed.err
    assert output.read_bytes() == written


def test_refuses_a_checkpoint_trained_further(command, checkpoint, tmp_path):
    changing = tmp_path / "changing"
    shutil.copytree(checkpoint, changing)
    assert command(checkpoints=[changing])[0] == 0
    model = AutoModelForCausalLM.from_pretrained(changing)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(changing)
    status, printed, _ = command(checkpoints=[changing])
    assert status == 2
    assert f"{changing}: its weights is" in printed.err
    # Another checkpoint goes into the same file.
    status, printed, output = command(checkpoints=[checkpoint])
    assert status == 0
    assert len(lines(output)) == 2 * COUNT


def test_corrupt_files_are_named(command):
    _, _, output = command()
    good = output.read_text().splitlines(keepends=True)
    output.write_text("".join([good[0], '{"index": 3\n', *good[2:]]))
    status, printed, _ = command()
    assert status == 2
    assert f"{output}:2 is no prediction" in printed.err
    output.write_text("".join(good))
    report = output.with_suffix(".report.json")
    settings = json.loads(report.read_text())
    for damage in ("[1, 2", "[]", None):
        report.unlink() if damage is None else report.write_text(damage)
        status, printed, _ = command()
        assert status == 2
        assert f"{report} is missing or does not say" in printed.err
    report.write_text(json.dumps(settings | {"checkpoints": {}}))
    status, printed, _ = command()
    assert status == 2
    assert f"{output}:1 is a prediction of" in printed.err
    assert output.read_text() == "".join(good)


def test_a_lora_adapter_answers_as_the_model_it_is_merged_into(checkpoint, tmp_path, data, capsys):
    model, tokenizer = models.load_pretrained(str(checkpoint))
    pred_ids = add_predictor_tokens(model, tokenizer, 2)
    model = models.add_lora(model, 4, new_ids=pred_ids)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    for directory in ("adapter", "merged"):
        tokenizer.save_pretrained(tmp_path / directory)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    output = tmp_path / "p.jsonl"
    names = [str(tmp_path / "adapter"), str(tmp_path / "merged")]
    options = ["--data", str(data), "--output", str(output), "--max-new-tokens", "4"]
    assert cli.main(["evaluate", *names, *options]) == 0
    completions = {name: {} for name in names}
    for line in lines(output):
        completions[line["checkpoint"]][line["index"]] = line["completion"]
    adapter, merged = completions.values()
    assert len(adapter) == COUNT
    assert adapter == merged
    assert adapter[1] != json.loads(data.read_text().splitlines()[1])["messages"][-1]["content"]


def test_a_model_that_the_hub_does_not_give_is_named(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(models, "model_info", refuse)
    assert cli.main(["evaluate", "some/model"]) == 2
    assert "the hub did not give it (no connection): give a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--split", "depth"], "split must be depth:N"),
        (["--recipe", "gsm8k"], "--recipe gsm8k needs --data"),
        (["--rule", "sql"], "rule sql needs databases"),
        (["--output", "p.json"], "must end in .jsonl, got 'p.json'"),
        (["--data", "none.jsonl"], "no file 'none.jsonl'"),
        (["--rule", "choice"], "built-in sample 0: expected A, B, C or D"),
        (["none.gguf"], "no file 'none.gguf'"),
        (["out/train/none"], "no directory 'out/train/none', which cannot be"),
        ([__file__], f"expected a directory or a .gguf file, got {__file__!r}"),
        (["same", "same"], "checkpoints must differ, got same more than once"),
        (["--device", "toaster"], "--device toaster cannot be used: Expected one of cpu, cuda"),
        (["--nonsense"], "unknown options --nonsense"),
    ],
)
def test_mistakes_are_named(options, expected, capsys):
    assert cli.main(["evaluate", *options, *["none.gguf"][: options[0].startswith("-")]]) == 2
    assert expected in capsys.readouterr().err
