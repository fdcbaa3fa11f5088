"""`llmjepa train` from its arguments to the files it leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from statistics import mean, stdev

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.cli import training_run
from llmjepa_kernels.cli.starting_point import starting_point
from llmjepa_kernels.cli.train_options import TrainOptions
from llmjepa_kernels.cli.training_run import TrainingRun
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.predictor_tokens import add_tokens
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.evaluation.predict import Accuracy, evaluate
from llmjepa_kernels.hf.load import small_llama
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training.checkpoints import checkpoints, why_incomplete

MINIATURE = ["--train-samples", "40", "--eval-samples", "6", "--batch-size", "8"]


def run(*options: object) -> int:
    return cli.main(["train", *map(str, options)])


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The default run in small: both models, table, picture, checkpoints."""
    directory = tmp_path_factory.mktemp("run")
    assert run(*MINIATURE, "--max-steps", 3, "--output-dir", directory) == 0
    return directory


def report(directory) -> dict[str, dict]:
    runs = json.loads((directory / "report.json").read_text())["runs"]
    return {run["name"]: run for run in runs}


def losses(run: dict) -> list[float]:
    return [log["loss"] for log in run["history"] if "loss" in log]


def test_default_run_reports_both_models(miniature):
    runs = report(miniature)
    assert list(runs) == ["NTP only", "LLM-JEPA"]
    table = (miniature / "report.txt").read_text()
    assert table.split()[:4] == ["NTP", "only", "LLM-JEPA", "difference"]
    assert (miniature / "report.png").read_bytes().startswith(b"\x89PNG")
    for name, cost in (("NTP only", 1.0), ("LLM-JEPA", None)):
        metrics = runs[name]["metrics"]
        assert losses(runs[name])[-1] == metrics["loss"] < losses(runs[name])[0]
        assert metrics["accuracy"] == 0.0  # after three updates
        cosines = runs[name]["cosines"]
        assert len(cosines) == 6
        assert metrics["pair_cosine"] == pytest.approx(sum(cosines) / 6) != metrics["view_cosine"]
        assert metrics["relative_cost"] == pytest.approx(cost or metrics["relative_cost"])
        assert metrics["seconds_per_example"] > 0
        assert f"{metrics['eval_ntp_loss']:.4f}" in table
    evaluated = runs["LLM-JEPA"]["history"][-1]["eval_cosine"]
    assert runs["LLM-JEPA"]["metrics"]["pair_cosine"] == pytest.approx(evaluated, abs=1e-5)
    # The same weights and the same first batch: only the objective and the packing differ.
    first = [run["history"][0]["ntp_loss"] for run in runs.values()]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert runs["LLM-JEPA"]["metrics"]["relative_cost"] < 1


def test_objectives_are_trained_side_by_side_and_logged_apart(tmp_path):
    options = ["--objective", "stp", "jepa+stp", "--tube-count", 2, "--stp-weight", 0.5]
    options += ["--ntp-weight", 0.9, "--max-steps", 2, "--output-dir", tmp_path]
    assert run(*MINIATURE, *options, "--no-compare") == 0
    runs = report(tmp_path)
    assert list(runs) == ["STP", "LLM-JEPA + STP"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"stp", "llm-jepa-stp"}
    for name, each in runs.items():
        first = each["history"][0]
        assert ("jepa_loss" in first) == (name != "STP")
        terms = first.get("jepa_loss", 0) + 0.5 * first["stp_loss"]
        assert first["loss"] == pytest.approx(0.9 * first["ntp_loss"] + terms, rel=1e-4)
    tubes = [each["history"][0]["stp_loss"] for each in runs.values()]
    assert tubes[0] == pytest.approx(tubes[1], rel=1e-4)  # the same draws of the same weights
    # Shared prefixes and no further tokens: cheaper than plain fine-tuning.
    assert runs["STP"]["metrics"]["relative_cost"] < 1


def test_terms_against_collapse_and_trained_heads(tmp_path, capsys):
    options = ["--objective", "jepa+sigreg", "jepa+vicreg", "jepa+stp", "--linear-predictor"]
    options += ["--projector-size", 16, "--sigreg-weight", 0.2, "--vicreg-weight", 0.3]
    options += ["--max-steps", 2, "--output-dir", tmp_path, "--no-compare"]
    assert run(*MINIATURE, *options) == 0
    runs = report(tmp_path)
    for name, own in (("SIGReg", "sigreg"), ("VICReg", "vicreg"), ("STP", "stp")):
        first = runs[f"LLM-JEPA + {name}"]["history"][0]
        assert {"sigreg_loss", "vicreg_loss", "stp_loss"} & first.keys() == {f"{own}_loss"}
        weight = {"sigreg": 0.2, "vicreg": 0.3, "stp": 0.02}[own]
        terms = first["jepa_loss"] + weight * first[f"{own}_loss"]
        assert first["loss"] == pytest.approx(first["ntp_loss"] + terms, rel=1e-4)
        metrics = runs[f"LLM-JEPA + {name}"]["metrics"]
        assert f"eval_{own}_loss" in metrics
        # Predicted as in training, behind the head.
        evaluated = runs[f"LLM-JEPA + {name}"]["history"][-1]["eval_cosine"]
        assert metrics["pair_cosine"] == pytest.approx(evaluated, abs=1e-5)
        head = load_file(tmp_path / f"llm-jepa-{own}" / "view_head.safetensors")
        assert len(head["predictor.weight"]) == 16
        assert ("tube_predictor.weight" in head) == (own == "stp")
    found = analyze_pairs(tmp_path / "llm-jepa-vicreg")
    expected = runs["LLM-JEPA + VICReg"]["metrics"]["pair_cosine"]
    assert found == pytest.approx(expected, abs=1e-5)


def analyze_pairs(checkpoint):
    directory = checkpoint / "analysis"
    options = [checkpoint, "--samples", 6, "--output-dir", directory]
    assert cli.main(["analyze", *map(str, options)]) == 0
    analysis = json.loads((directory / "analysis.json").read_text())
    return analysis["checkpoints"][0]["pred_code_cosine"]


def test_equal_tokens(tmp_path, capsys):
    """Objectives that take fewer tokens a step make more of them."""
    options = ["--objective", "ntp", "stp", "--output-dir", tmp_path, "--match", "tokens"]
    assert run(*MINIATURE, *options, "--epochs", 4) == 0
    runs = report(tmp_path)
    ntp, stp = (runs[name]["metrics"] for name in ("NTP only", "STP"))
    assert ntp["epoch"] == 4 < stp["epoch"]
    assert stp["tokens"] == pytest.approx(ntp["tokens"], rel=0.15)  # to a whole update
    assert stp["flops_per_step"] < ntp["flops_per_step"]
    assert "tokens in all" in (tmp_path / "report.txt").read_text()
    capsys.readouterr()
    assert run(*MINIATURE, *options, "--max-steps", 8, "--dry-run") == 0
    updates = re.findall(r"(\d+) updates", capsys.readouterr().out)
    assert int(updates[0]) == 8 < int(updates[1])


@pytest.mark.parametrize("name", ["ntp-only", "llm-jepa"])
def test_checkpoint_loads_and_generates_patched_as_unpatched(miniature, name):
    model = AutoModelForCausalLM.from_pretrained(miniature / name)
    tokenizer = AutoTokenizer.from_pretrained(miniature / name)
    assert tokenizer.convert_tokens_to_ids("<|predictor_1|>") == len(tokenizer) - 1
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.use_cache
    assert ExampleFormat.load(miniature / name) == ExampleFormat(pred_ids=(len(tokenizer) - 1,))
    texts = ("lines with a vowel", "not", "a b c d e")
    answer = {"role": "assistant", "content": "x"}
    samples = [{"messages": [{"role": "user", "content": text}, answer]} for text in texts]
    options = {"max_new_tokens": 8}
    expected = [evaluate(model, tokenizer, [sample], **options)[0].completion for sample in samples]
    patched = evaluate(patch_model(model), tokenizer, samples, **options)
    assert [prediction.completion for prediction in patched] == expected


def test_same_seed_same_numbers(miniature, tmp_path):
    assert run(*MINIATURE, "--max-steps", 3, "--no-compare", "--output-dir", tmp_path) == 0
    again = report(tmp_path)
    assert list(again) == ["LLM-JEPA"]
    assert losses(again["LLM-JEPA"]) == losses(report(miniature)["LLM-JEPA"])


@pytest.mark.slow
def test_killed_and_resumed_it_ends_where_the_uninterrupted_run_ends(tmp_path, capsys):
    options = [*MINIATURE, "--no-compare", "--max-steps", 12]
    options += [
        "--loss-dropout",
        0.5,
        "--loss-dropout-per",
        "step",
        "--lr-scheduler-type",
        "linear",
    ]
    options += ["--hidden-size", 64, "--num-layers", 1, "--save-strategy", "steps"]
    options += ["--save-steps", 1, "--logging-steps", 1, "--batch-size", 16]  # 3 updates an epoch
    assert run(*options, "--output-dir", tmp_path / "whole") == 0
    killed = [*options, "--output-dir", tmp_path / "killed"]
    command = [sys.executable, "-m", "llmjepa_kernels", "train", *map(str, killed)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "llm-jepa"
    while process.poll() is None and not (checkpoint / "checkpoint-5" / "complete.json").exists():
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert json.loads((checkpoint / "run.json").read_text())["result"] is None
    assert run(*killed) == 2
    assert "holds an earlier run (run.json): go on with it by" in capsys.readouterr().err

    last = next(path for path in checkpoints(checkpoint) if why_incomplete(path) is None)
    with open(last / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    assert run(*killed, "--resume") == 0
    output = capsys.readouterr().out
    assert f"{last} is incomplete: optimizer.pt has 1000 bytes instead of" in output
    before = int(last.name.split("-")[1]) - 1
    assert f"resuming from {last.with_name(f'checkpoint-{before}')}" in output
    whole, resumed = tmp_path / "whole", tmp_path / "killed"
    weights = [(path / "llm-jepa/model.safetensors").read_bytes() for path in (whole, resumed)]
    assert weights[0] == weights[1]
    assert losses(report(whole)["LLM-JEPA"]) == losses(report(resumed)["LLM-JEPA"])


def test_a_checkpoint_that_is_trained_further_keeps_the_roles_of_its_predictors(
    miniature, tmp_path
):
    checkpoint = miniature / "llm-jepa"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    first, second = add_tokens(model, tokenizer, ["<|predictor_1|>", "<|predictor_2|>"])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    options = TrainOptions(model=str(tmp_path), num_pred_tokens=2)
    start = starting_point(options, [], seed=0)
    assert start.example_format.pred_ids == (second, first)
    ExampleFormat(pred_ids=(first, second)).save(tmp_path)
    start = starting_point(options, [], seed=0)
    assert start.example_format.pred_ids == (first, second)


def test_lora_from_a_directory_on_jsonl(miniature, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = grammar.generate(8, seed=5)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", miniature / "llm-jepa", "--data", data, "--eval-data", data]
    options += [
        "--lora-rank",
        4,
        "--max-steps",
        2,
        "--learning-rate",
        "1e-2",
        "--layout",
        "official",
    ]
    options += ["--metric", "infonce", "--jepa-weight", 0.5, "--num-pred-tokens", 2, "--bf16"]
    options += ["--weight-decay", 0.1, "--max-length", 400]
    options += ["--direction", "both", "--pred-position", "prepend", "--detach-target"]
    assert run(*options, "--output-dir", tmp_path / "out") == 0
    assert list(report(tmp_path / "out")) == ["LLM-JEPA"]

    checkpoint = tmp_path / "out" / "llm-jepa"
    saved = ExampleFormat.load(checkpoint)
    assert (saved.layout, saved.direction, saved.pred_position) == ("official", "both", "prepend")
    assert len(saved.pred_ids) == 2
    assert ExampleFormat.load(checkpoint / "adapter") == saved
    arguments = torch.load(checkpoint / "adapter" / "training_args.bin", weights_only=False)
    assert (arguments.weight_decay, arguments.learning_rate) == (0.1, 0.01)
    before = AutoModelForCausalLM.from_pretrained(miniature / "llm-jepa").state_dict()
    after = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert before.keys() == after.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])
    old, new = (state["model.embed_tokens.weight"] for state in (before, after))
    assert len(new) == len(old) + 1  # one [PRED] token was there, one is new
    assert torch.equal(new[: len(old) - 1], old[:-1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "data.jsonl:2: "),
        ('{"messages": []}', r"data.jsonl:2: messages must have the roles"),
    ],
)
def test_malformed_data_is_named_by_line(tmp_path, capsys, line, message):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(grammar.generate(1)[0]) + "\n" + line + "\n")
    assert run("--data", data, "--output-dir", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_without_chat_template_points_to_the_plain_format(miniature, tmp_path, capsys):
    model = shutil.copytree(miniature / "llm-jepa", tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    options = ["--model", model, "--train-samples", 8, "--max-steps", 1, "--no-compare"]
    options += ["--eval-samples", 2, "--output-dir", tmp_path / "out"]
    assert run(*options) == 2
    assert "has no chat template: train with --format plain" in capsys.readouterr().err
    assert run(*options, "--format", "plain", "--separator", "<|user|>") == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    saved = ExampleFormat.load(tmp_path / "out" / "llm-jepa")
    assert saved.separator_id == tokenizer.convert_tokens_to_ids("<|user|>")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "llm-jepa")) == len(tokenizer)


def test_overlong_example_is_named_by_line(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    long, short = (json.dumps(row) for row in grammar.generate(2))
    row = json.loads(long)
    row["messages"][1]["content"] *= 40
    data.write_text(f"{short}\n\n{short}\n{json.dumps(row)}\n")
    assert run("--data", data, "--max-length", 150, "--output-dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert "data.jsonl:4: it takes " in error
    assert "more than --max-length 150" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", "20"], "built-in sample 0: it takes "),
        (["--max-length", "0"], "--max-length must be at least 1, got 0"),
        (["--num-pred-tokens", "-1"], "--num-pred-tokens must be at least 0, got -1"),
        (["--data", "none.jsonl"], "no file 'none.jsonl'"),
        (["--model", "none.gguf"], "no file 'none.gguf'"),
        (["--loss-dropout", "2"], "--loss-dropout must be at least 0, at most 1, got 2.0"),
        (["--resume-from-checkpoint", "x"], "use --resume"),
        (["--weight-decay", "much"], "--weight-decay: invalid float value: 'much'"),
        (["--weight-decoy", "1"], "unknown options --weight-decoy 1"),
        (["--from-scratch"], "--from-scratch needs --model, whose architecture it takes"),
        (["--model", "x", "--hidden-size", "64"], "--hidden-size is for the small Llama"),
        (["--model", "x", "--vocab-size", "300"], "--vocab-size is for a model --from-scratch"),
        (["--lora-rank", "4"], "--lora-rank adapts a trained --model, not random weights"),
        (["--format", "plain", "--layout", "official"], "has the shared --layout only"),
        (["--separator", ";"], "--separator is for --format plain"),
        (["--streaming"], "--streaming needs --data"),
        (["--streaming", "--data", "x"], "--streaming needs --max-steps"),
        (["--objective", "ntp", "--linear-predictor"], "needs an --objective with jepa or stp"),
        (["--objective", "stp", "--projector-size", 8], "--projector-size needs an --objective"),
        (["--sigreg-weight", 2], "--sigreg-weight needs an --objective with sigreg, got ntp jepa"),
        (
            ["--objective", "stp", "--jepa-weight", 2],
            "--jepa-weight needs an --objective with jepa",
        ),
        (["--objective", "ntp", "--weight-warmup", 0.1], "with jepa or stp, got ntp"),
        (["--tube-count", 2], "--tube-count needs an --objective with stp, got ntp jepa"),
        (
            ["--streaming", "--data", "x", "--max-steps", 1, "--match", "tokens"],
            "--match tokens does not go with --streaming",
        ),
        (["--shuffle-buffer", "0"], "--shuffle-buffer must be at least 1, got 0"),
        (["--shuffle-buffer", "9"], "--shuffle-buffer says nothing without --streaming"),
        (["--temperature", "0.1"], "--temperature says nothing without --metric infonce"),
        (["--no-gather-negatives"], "--no-gather-negatives says nothing without --metric infonce"),
        (["--loss-dropout-per", "step"], "--loss-dropout-per says nothing without --loss-dropout"),
        (["--eval-split-seed", "1"], "--eval-split-seed says nothing without --eval-split"),
        (
            ["--objective", "stp", "--tube-form", "turns", "--tube-count", 2],
            "--tube-count says nothing without another --tube-form",
        ),
        (["--seeds", "1", "2", "1"], "--seeds must differ, got [1, 2, 1]"),
        (["--split", "depth"], "split must be depth:N"),
    ],
)
def test_mistakes_are_named_before_training(tmp_path, capsys, options, message):
    assert run(*options, "--train-samples", 3, "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("llmjepa train: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_only_one_model_is_kept_in_memory(tmp_path, monkeypatch):
    models, alive, run_of = [], [], TrainingRun.run

    def watched(self):
        alive.append(sum(model() is not None for model in models))
        models.append(weakref.ref(self.start.model))
        return run_of(self)

    monkeypatch.setattr(TrainingRun, "run", watched)
    options = [*MINIATURE, "--max-steps", 1, "--hidden-size", 64, "--num-layers", 1]
    assert run(*options, "--seeds", 1, 2, "--output-dir", tmp_path) == 0
    assert alive == [0] * 4


def test_a_sharded_model_is_not_asked_by_one_process(tmp_path, monkeypatch, capsys):
    """It would wait for the others for ever."""
    small = [*MINIATURE, "--max-steps", 1, "--no-compare"]
    first = [*small, "--hidden-size", 64, "--num-layers", 1, "--output-dir", tmp_path / "first"]
    assert run(*first) == 0
    monkeypatch.setattr(training_run, "_is_sharded", lambda trainer: True)
    options = ["--model", tmp_path / "first" / "llm-jepa", "--lora-rank", 2]
    assert run(*small, *options, "--output-dir", tmp_path / "second") == 0
    metrics = report(tmp_path / "second")["LLM-JEPA"]["metrics"]
    assert "eval_ntp_loss" in metrics
    assert not {"accuracy", "pair_cosine"} & metrics.keys()
    directory = tmp_path / "second" / "llm-jepa"
    assert f"llmjepa evaluate {directory}" in capsys.readouterr().out
    assert cli.main(["evaluate", str(directory), "--samples", "2"]) == 0


def test_a_run_without_a_log_is_reported(tmp_path):
    options = [*MINIATURE, "--max-steps", 2, "--hidden-size", 64, "--num-layers", 1]
    assert run(*options, "--logging-steps", 50, "--output-dir", tmp_path) == 0
    for found in report(tmp_path).values():
        assert {"accuracy", "eval_ntp_loss"} <= found["metrics"].keys()


def test_seeds_and_a_split(tmp_path):
    """Three times in one directory: to the end, resumed for a third seed, and with changes."""
    options = [*MINIATURE, "--max-steps", 2, "--split", "depth:1", "--hidden-size", 64]
    options += ["--num-layers", 1, "--output-dir", tmp_path]
    assert run(*options, "--seeds", 1, 2) == 0
    full = json.loads((tmp_path / "report.json").read_text())
    names = [(r["seed"], r["name"]) for r in full["runs"]]
    assert names == [(1, "NTP only"), (1, "LLM-JEPA"), (2, "NTP only"), (2, "LLM-JEPA")]
    ntp_1, jepa_1, ntp_2, jepa_2 = (r["metrics"] for r in full["runs"])
    assert ntp_1["eval_ntp_loss"] != ntp_2["eval_ntp_loss"]
    assert {"ood_ntp_loss", "ood_accuracy", "accuracy"} <= ntp_1.keys()
    found = full["summary"]["LLM-JEPA"]["ood_ntp_loss"]
    values = [jepa_1["ood_ntp_loss"], jepa_2["ood_ntp_loss"]]
    assert found == {"mean": mean(values), "std": stdev(values), "seeds": 2}
    differences = [b["loss"] - a["loss"] for a, b in ((ntp_1, jepa_1), (ntp_2, jepa_2))]
    assert full["summary"]["difference"]["loss"]["mean"] == pytest.approx(mean(differences))
    assert f"{mean(values):.4f} ± {stdev(values):.4f}" in (tmp_path / "report.txt").read_text()
    # The same first batch for both objectives of a seed.
    first = [r["history"][0]["ntp_loss"] for r in full["runs"]]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert first[0] != pytest.approx(first[2], rel=1e-5)

    kept = tmp_path / "seed-1" / "ntp-only" / "model.safetensors"
    kept.unlink()  # a run that were trained again would write it
    record = tmp_path / "seed-2" / "llm-jepa" / "run.json"
    interrupted = json.loads(record.read_text()) | {"result": None}
    record.write_text(json.dumps(interrupted))
    assert run(*options, "--seeds", 1, 2, "--resume") == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert not kept.exists()
    assert losses(again["runs"][3]) == losses(full["runs"][3])
    assert again["runs"][:3] == full["runs"][:3]


def test_resume_refuses_other_options(miniature, capsys):
    options = [*MINIATURE, "--max-steps", 3, "--output-dir", miniature, "--resume"]
    assert run(*options, "--jepa-weight", 2) == 2
    assert "had other options: jepa_weight 1.0, now 2.0" in capsys.readouterr().err
    assert run(*options, "--seed", 3) == 2
    assert "data_seed 42, now 3" in capsys.readouterr().err
    record = miniature / "ntp-only" / "run.json"
    before = record.read_text()
    record.write_text(before.replace('"processes": 1', '"processes": 2'))
    assert run(*options) == 2
    assert "processes 2, now 1" in capsys.readouterr().err
    record.write_text(before.replace('"jepa_weight"', '"lambda"'))
    assert run(*options) == 2
    assert "with other options than this one: jepa_weight, lambda;" in capsys.readouterr().err
    record.write_text(before)


def test_a_finished_run_is_extended(tmp_path, capsys):
    options = [*MINIATURE, "--no-compare", "--hidden-size", 64, "--num-layers", 1]
    options += ["--output-dir", tmp_path, "--save-steps", 4]
    assert run(*options, "--epochs", 1) == 0
    first = report(tmp_path)["LLM-JEPA"]
    assert len(losses(first)) == 5
    assert run(*options, "--epochs", 0.5, "--resume") == 2
    assert "had other options: epochs 1.0, now 0.5" in capsys.readouterr().err
    assert run(*options, "--epochs", 2, "--resume") == 0
    assert "checkpoint-5" in capsys.readouterr().out
    longer = report(tmp_path)["LLM-JEPA"]
    assert losses(longer)[:5] == losses(first)
    assert len(losses(longer)) == 10
    assert run(*options, "--epochs", 2, "--resume") == 0  # and is kept
    assert "finished before, kept" in capsys.readouterr().out


def test_a_run_without_checkpoints_cannot_be_extended(miniature, capsys):
    options = [*MINIATURE, "--max-steps", 4, "--output-dir", miniature, "--resume"]
    assert run(*options) == 2
    assert "has no checkpoint to go on from to max_steps 4" in capsys.readouterr().err


def test_plain_format_with_loss_on_all_tokens(tmp_path):
    options = [*MINIATURE, "--format", "plain", "--supervise", "all", "--max-steps", 2]
    options += ["--no-compare", "--vocab-size", 300, "--output-dir", tmp_path]
    assert run(*options) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm-jepa")
    saved = ExampleFormat.load(tmp_path / "llm-jepa")
    ids = tokenizer.convert_tokens_to_ids(["<|predictor_1|>", "<|separator|>"])
    assert saved == ExampleFormat("plain", pred_ids=[300], separator_id=301, supervise="all")
    assert ids == [300, 301]
    assert set(losses(report(tmp_path)["LLM-JEPA"])) != {0.0}


def test_architecture_of_a_model_with_random_weights(miniature, tmp_path):
    options = [*MINIATURE, "--model", miniature / "llm-jepa", "--from-scratch", "--max-steps", 1]
    assert run(*options, "--no-compare", "--output-dir", tmp_path) == 0
    before = AutoModelForCausalLM.from_pretrained(miniature / "llm-jepa")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "llm-jepa")
    assert {n: p.shape for n, p in before.named_parameters()} == {
        n: p.shape for n, p in after.named_parameters()
    }
    name = "model.layers.0.self_attn.q_proj.weight"
    cosine = torch.cosine_similarity(*(m.state_dict()[name].flatten() for m in (before, after)), 0)
    assert cosine.abs() < 0.1


def test_bad_lines_and_long_samples_can_be_left_out_and_are_counted(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    rows = grammar.generate(8)
    rows[2]["messages"][1]["content"] *= 40
    lines = [json.dumps(row) for row in rows]
    lines.insert(1, '{"messages": []}')
    data.write_text("\n".join(lines))
    options = ["--data", data, "--max-length", 150, "--no-compare", "--max-steps", 1]
    options += ["--hidden-size", 64, "--num-layers", 1, "--output-dir", tmp_path / "out"]
    assert run(*options, "--skip-bad-lines") == 2
    assert "data.jsonl:4: it takes" in capsys.readouterr().err
    assert run(*options, "--skip-bad-lines", "--max-length-policy", "skip") == 0
    captured = capsys.readouterr()
    assert "left out 1 samples: malformed" in captured.out
    assert "left out 1 samples: too long" in captured.out
    assert "data.jsonl:2: messages must have the roles" in captured.err
    assert "LLM-JEPA, seed 42: 7 examples" in captured.out


@pytest.mark.slow
def test_streaming_resumes_and_counts_what_it_leaves_out(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    rows = grammar.generate(20, max_depth=1)
    rows[2]["messages"][1]["content"] *= 60
    rows += grammar.generate(4, min_depth=2)
    data.write_text("\n".join(["{", *map(json.dumps, rows)]))
    options = ["--data", data, "--streaming", "--shuffle-buffer", 6, "--skip-bad-lines"]
    options += [
        "--max-length-policy",
        "skip",
        "--max-length",
        200,
        "--split",
        "depth:1",
        "--no-compare",
    ]
    options += ["--hidden-size", 64, "--num-layers", 1, "--loss-dropout", 0.5, "--batch-size", 8]
    options += ["--save-strategy", "steps", "--save-steps", 4, "--output-dir", tmp_path / "out"]
    options += ["--dataloader-num-workers", 2]
    assert run(*options, "--max-steps", 6) == 0
    output = capsys.readouterr().out
    for kind, count in (("out of distribution", 4), ("malformed", 1), ("too long", 1)):
        assert f"left out {count} samples: {kind}" in output
    metrics = report(tmp_path / "out")["LLM-JEPA"]["metrics"]
    assert metrics["tokens_per_example"] > 10
    checkpoint = tmp_path / "out" / "llm-jepa"
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").unlink()
    record = json.loads((checkpoint / "run.json").read_text())
    (checkpoint / "run.json").write_text(json.dumps(record | {"result": None}))
    (checkpoint / "checkpoint-6" / "complete.json").unlink()
    assert run(*options, "--max-steps", 6, "--resume") == 0
    assert (checkpoint / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_two_processes_share_the_held_out_prompts(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "llmjepa_kernels", "train", "--hidden-size", "64", "--num-layers", "1"]
    command += ["--train-samples", "16", "--eval-samples", "5", "--max-steps", "2", "--no-compare"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--batch-size", "4", "--output-dir", str(tmp_path)]
    run = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "llm-jepa" / "run.json").read_text())["result"]
    correct = round(5 * result["metrics"]["accuracy"])
    assert tuple(result["accuracy_interval"]) == Accuracy(correct, 5).interval()
    assert result["metrics"]["unfinished"] in {n / 5 for n in range(6)}
    assert "accuracy" in run.stdout


def test_a_model_stops_where_its_answers_end(tmp_path):
    """In other programs too, also one whose end of text is another token."""
    tokenizer = train_tokenizer(grammar.generate(20))
    end = tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", repr(end))
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    model = small_llama(tokenizer, hidden_size=64, num_layers=1)
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "base")
    words = ["--model", tmp_path / "base", "--train-samples", 4, "--eval-samples", 1]
    options = ["--max-steps", 1, "--no-compare", "--output-dir", tmp_path / "out"]
    assert cli.main(["train", *map(str, [*words, *options])]) == 0
    assert cli.main(["export", str(tmp_path / "out" / "llm-jepa"), str(tmp_path / "plain")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").generation_config
    names = AutoTokenizer.from_pretrained(tmp_path / "plain").convert_ids_to_tokens
    assert set(names(exported.eos_token_id)) == {end, "<|endoftext|>"}
