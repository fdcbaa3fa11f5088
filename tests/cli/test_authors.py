"""What someone who comes from the authors' scripts relies on: their recipe, and their split."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.cli.main import _parser
from llmjepa_kernels.cli.train_options import TrainOptions
from llmjepa_kernels.cli.training_arguments import training_arguments
from llmjepa_kernels.cli.training_data import LeftOut, SampleReader
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.example_format import ExampleFormat


def parsed(*options):
    return TrainOptions.of(*_parser().parse_known_args(["train", *map(str, options)]))


def arguments_of(options, directory):
    return training_arguments(options, directory, 1)


def test_the_preset_is_their_recipe(tmp_path):
    options = parsed("--preset", "authors", "--model", "x")
    assert (options.layout, options.supervise) == ("official", "released")
    assert (options.num_pred_tokens, options.jepa_weight, options.ntp_weight) == (0, 0.1, 1.0)
    assert (options.compared_token, options.add_special_tokens) == (-1, True)
    assert (options.max_sequence_length, options.max_length_policy) == (512, "truncate")
    assert (options.dtype, arguments_of(options, tmp_path).bf16) == ("bfloat16", True)
    arguments = arguments_of(options, tmp_path)
    assert arguments.learning_rate == 2e-5
    assert arguments.num_train_epochs == 3
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 16
    assert (arguments.lr_scheduler_type, arguments.get_warmup_steps(1000)) == ("linear", 0)
    assert arguments.dataloader_drop_last


def test_what_is_given_counts_more_than_the_preset(tmp_path):
    options = parsed("--preset", "authors", "--num-pred-tokens", 2, "--warmup-steps", 7)
    assert options.num_pred_tokens == 2
    assert options.layout == "official"
    assert arguments_of(options, tmp_path).get_warmup_steps(1000) == 7
    assert parsed().layout == "shared"


def test_the_preset_goes_with_objectives_that_take_less_of_it():
    options = parsed("--preset", "authors", "--model", "x", "--objective", "ntp")
    options.check()
    assert options.objectives == ["ntp"]


def test_what_the_preset_sets_can_be_taken_back():
    options = parsed("--preset", "authors", "--no-bf16", "--no-add-special-tokens")
    assert (options.bf16, options.add_special_tokens) == (False, False)
    plain = ["--format", "plain", "--layout", "shared", "--embedding-token", "content"]
    assert parsed("--preset", "authors", "--no-add-special-tokens", *plain).template == "plain"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in grammar.generate(23, seed=1)))
    return path


@pytest.mark.parametrize("options", [[0.2], [0.5, "--eval-split-seed", 7]])
def test_the_held_out_part_is_theirs(data, options):
    datasets = pytest.importorskip("datasets")
    reader = SampleReader(parsed("--data", data, "--eval-split", *options), LeftOut())
    whole = datasets.load_dataset("json", data_files=str(data), split="train")
    seed = options[-1] if len(options) > 1 else 42
    theirs = whole.train_test_split(test_size=options[0], seed=seed, shuffle=True)

    def asked(samples):
        return [sample["messages"][1]["content"] for sample in samples]

    assert asked(each.sample for each in reader.first()) == asked(theirs["train"])
    assert asked(each.sample for each in reader.held_out()[0]) == asked(theirs["test"])


def test_paraphrases_of_one_another_are_held_out_together(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"paraphrases": [f"{i} {word}" for word in ("one", "two", "three")]} for i in range(20)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", data, "--recipe", "paraphrase", "--eval-split", 0.25]
    reader = SampleReader(parsed(*options, "--train-samples", 1000), LeftOut())
    trained, (held_out, _) = reader.first(), reader.held_out()
    assert len(trained) + len(held_out) > 20
    assert not {each.place for each in trained} & {each.place for each in held_out}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--eval-split needs --data"),
        (["--data", "{data}", "--streaming", "--max-steps", 1], "--eval-split needs --data"),
        (["--data", "{data}", "--eval-data", "x"], "--eval-data is another"),
    ],
)
def test_what_cannot_be_split(data, options, message, capsys):
    options = [str(option).format(data=data) for option in options]
    assert cli.main(["train", "--eval-split", "0.2", *options]) == 2
    assert message in capsys.readouterr().err


def test_their_recipe_runs(data, tmp_path):
    pytest.importorskip("datasets")
    out = tmp_path / "out"
    options = ["--preset", "authors", "--data", data, "--eval-split", 0.3, "--max-steps", 2]
    options += ["--output-dir", out, "--hidden-size", 64, "--num-layers", 1]
    assert cli.main(["train", *map(str, options)]) == 0
    saved = ExampleFormat.load(out / "llm-jepa")
    assert (saved.layout, saved.supervise, saved.pred_ids) == ("official", "released", ())
    assert (saved.embedding_token, saved.add_special_tokens) == (-1, True)
    record = json.loads((out / "llm-jepa" / "run.json").read_text())["options"]
    assert record["jepa_weight"] == 0.1
    assert record["eval_split"] == 0.3
