"""Options from a YAML file."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.cli.config_file import read_config
from llmjepa_kernels.cli.evaluate_options import EvaluateOptions
from llmjepa_kernels.cli.main import _parser
from llmjepa_kernels.cli.train_options import TrainOptions
from llmjepa_kernels.cli.training_arguments import training_arguments


def options(path, *given, command=TrainOptions, name="train"):
    parsed, unknown = _parser().parse_known_args([name, *map(str, given)])
    return command.of(parsed, unknown, *read_config(str(path), command))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"

    def write(text):
        path.write_text(text)
        return path

    return write


def test_the_file_the_preset_and_the_command_line(config):
    path = config(
        "preset: authors\nlearning_rate: 1e-4\nnum-pred-tokens: 2\nobjective: [ntp, jepa]\n"
        "format: chat\nskip_bad_lines: true\nshare_prefixes: false\noutput_dir: out\n"
        "max_steps:\nweight_decay: 0.01\nwarmup_steps: 3\n"
    )
    found = options(path, "--num-pred-tokens", 1, "--warmup-steps", 7)
    given = ("--learning-rate", "1e-4", "--num-pred-tokens", "1", "--objective", "ntp", "jepa")
    more = ("--preset", "authors", "--skip-bad-lines", "--no-share-prefixes", "--output-dir", "out")
    other = ("--weight-decay", "0.01", "--warmup-steps", "3", "--warmup-steps", "7")
    parsed = _parser().parse_known_args(["train", *given, *more, *other])
    assert found == TrainOptions.of(*parsed)
    assert found.layout == "official"
    assert found.other[-2:] == ("--warmup-steps", "7")  # the last counts


def test_names_that_transformers_gives_options(config):
    path = config("num_train_epochs: 7\nper_device_train_batch_size: 3\n")
    assert (options(path).epochs, options(path).batch_size) == (7, 3)
    assert options(path, "--epochs", 2).epochs == 2
    found = options(config("preset: authors\n"), "--num-train-epochs", 2)
    assert (found.epochs, found.other.count("--num-train-epochs")) == (2, 0)


def test_what_is_negated(config):
    assert options(config("no_share_prefixes: true\n")).share_prefixes is False
    assert options(config("no_share_prefixes: false\n")).share_prefixes is True
    with pytest.raises(ValueError, match="no_compare is given twice, as compare too"):
        options(config("compare: true\nno_compare: true\n"))


def test_values_that_are_merged(config):
    path = config("<<: &more\n  weight_decay: 0.1\n  epochs: 1\nepochs: 3\n")
    assert options(path).other[-2:] == ("--weight-decay", "0.1")
    assert options(path).epochs == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must map options to values, got list"),
        ("a: [", "is no YAML: while parsing"),
        ("epochs: many", "epochs must be of type float, got 'many'"),
        ("batch_size: 2.5", "batch_size must be of type int, got 2.5"),
        ("batch_size: true", "batch_size must be of type int, got True"),
        ("streaming: 1", "streaming must be of type bool, got 1"),
        ("streaming: 'yes'", "streaming must be of type bool, got 'yes'"),
        ("epochs: [1, 2]", r"epochs must be one value, got \[1, 2\]"),
        ("seeds: 3", "seeds must be a list, got 3"),
        ("output_dir: 5", "output_dir must be of type Path, got 5"),
        ("jepa_weight: 1\njepa-weight: 2", "jepa-weight is given twice, as jepa_weight too"),
        ("model: {a: 1}", "model must be of type str, got {'a': 1}"),
        ("metric: manhattan", "--metric must be one of cosine, .*, got 'manhattan'"),
        ("epochs: -1", "--epochs must be more than 0, got -1.0"),
    ],
)
def test_mistakes_are_named(config, text, message):
    with pytest.raises(ValueError, match=message):
        options(config(text))


def test_commands_that_hand_nothing_on(config):
    path = config("samples: 3\ndtype: bfloat16\n")
    found = options(path, "x", "--samples", 4, command=EvaluateOptions, name="evaluate")
    assert (found.samples, found.dtype) == (4, "bfloat16")
    for text, message in (
        ("weight_decay: 1", "weight_decay is no option"),
        ("checkpoints: [a]", "checkpoints is to be given on the command line"),
    ):
        with pytest.raises(ValueError, match=message):
            options(config(text), "x", command=EvaluateOptions, name="evaluate")


def test_what_is_handed_on(config, tmp_path):
    path = config("lr_scheduler_kwargs: {min_lr: 0.1}\nhelp: true\n")
    found = options(path)
    assert found.other[:2] == ("--lr-scheduler-kwargs", '{"min_lr": 0.1}')
    with pytest.raises(ValueError, match="unknown options --help True"):
        training_arguments(found, tmp_path, 1)


def test_a_run_of_a_file(config, tmp_path, capsys):
    path = config(
        "train_samples: 20\neval_samples: 2\nmax_steps: 2\nhidden_size: 64\nnum_layers: 1\n"
        f"compare: false\nlogging_steps: 1\noutput_dir: {tmp_path / 'out'}\n"
    )
    assert cli.main(["train", "--config", str(path), "--max-steps", "1"]) == 0
    record = json.loads((tmp_path / "out" / "llm-jepa" / "run.json").read_text())["options"]
    assert (record["max_steps"], record["num_layers"]) == (1, 1)
    assert record["other"] == ["--logging-steps", "1"]
    assert cli.main(["train", "--config", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
