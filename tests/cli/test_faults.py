"""What users, files and machines get wrong is one line that names it, and costs nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from datetime import datetime

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.cli import starting_point
from llmjepa_kernels.cli.evaluate_options import EvaluateOptions
from llmjepa_kernels.cli.train_options import TrainOptions
from llmjepa_kernels.cli.training_run import TrainingRun
from llmjepa_kernels.data import grammar
from llmjepa_kernels.files import only_process
from llmjepa_kernels.hf import load as models
from llmjepa_kernels.training import checkpoints
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from tests.training.test_checkpoints import full_disk

TINY = ["--hidden-size", 64, "--num-layers", 1, "--train-samples", 16, "--eval-samples", 2]
TINY += ["--batch-size", 8, "--no-compare"]


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture
def error(capsys):
    """Runs a command that fails with exit status 2; its message, which is one line."""

    def failing(*words: object, status: int = 2) -> str:
        capsys.readouterr()
        assert run(*words) == status
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"llmjepa {words[0]}: ")
        return message

    return failing


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory in which a run has finished."""
    directory = tmp_path_factory.mktemp("trained")
    assert run("train", *TINY, "--max-steps", 1, "--output-dir", directory) == 0
    return directory


@pytest.fixture
def model(trained, tmp_path):
    """A copy of its checkpoint, to be damaged."""
    return shutil.copytree(trained / "llm-jepa", tmp_path / "model")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--epochs", 0], "--epochs must be more than 0, got 0.0"),
        (["--max-steps", -5], "--max-steps must be at least 1, got -5"),
        (["--gradient-accumulation-steps", 0], "--gradient-accumulation-steps must be at least 1"),
        (["--output-dir", ""], "--output-dir must be a directory of its own, got '.'"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--hidden-size", 32], "--hidden-size must be at least 64, a multiple of 64, got 32"),
        (["--hidden-size", 65], "--hidden-size must be at least 64, a multiple of 64, got 65"),
        (["--jepa-weight", "nan"], "--jepa-weight must be at least 0, got nan"),
        (["--learning-rate", "inf"], "--learning-rate must be at least 0, got inf"),
        (["--temperature", 0], "--temperature must be more than 0, got 0.0"),
        (["--seed", -1], "--seed must be at least 0, at most 4.29497e+09, got -1"),
        (["--metric", "infonce", "--batch-size", 1], "--batch-size must be at least 2, got 1"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--report-to", "wandb"], "--report-to wandb needs a package that is not installed"),
    ],
)
def test_options_out_of_range_are_named_before_a_model_is_made(
    words, expected, error, monkeypatch, tmp_path
):
    monkeypatch.setattr(starting_point.models, "small_llama", None)
    assert expected in error("train", "--output-dir", tmp_path / "out", *words)


def test_options_are_checked_in_python_too():
    with pytest.raises(ValueError, match="--format must be one of chat, plain, got 'html'"):
        TrainOptions(template="html")
    assert EvaluateOptions(("x",)).batch_size == EvaluateOptions(("x",), batch_size=64).batch_size
    with pytest.raises(AttributeError):
        TrainOptions().seed = 3  # type: ignore[misc]


def test_hyphens_and_ranges_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        run("train", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 0; at least 0, at most 1)" in text
    assert text.index("--jepa-weight") < text.index("--shuffle-buffer")


def test_output_that_cannot_say_lambda():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "llmjepa_kernels", "train", "--help"]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    assert b"\\u03bb, the weight of the JEPA loss" in printed


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--version")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("llmjepa_kernels 0.")


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def drop_weights(path):
    state = load_file(path)
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})


def pickle_of_code(path):
    path.unlink()
    torch.save({"weight": print}, path.with_name("pytorch_model.bin"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, ""),
        (lambda path: path.write_bytes(b""), ""),
        (pickle_of_code, ""),
        (drop_weights, "it lacks the weights model.layers.0.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "train", "analyze"])
def test_damaged_weights_are_named_with_their_model(command, damage, expected, model, error):
    damage(model / "model.safetensors")
    words = [command, model] if command != "train" else [command, "--model", model]
    assert f"error: '{model}' cannot be loaded: {expected}" in error(*words)


def test_a_tokenizer_with_more_tokens_than_embeddings(model, error):
    tokenizer = models.load_tokenizer(str(model))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(model)
    assert "its tokenizer has" in error("evaluate", model)


def test_a_device_that_computes_nothing(model, error):
    assert "--device meta cannot be used" in error("evaluate", model, "--device", "meta")


def test_a_template_without_end(model, error):
    loop = "{% for i in range(10**9) %}x{% endfor %}"
    (model / "chat_template.jinja").write_text(loop)
    assert "Range too big" in error("evaluate", model, "--samples", 1)


def test_all_models_are_looked_for_before_the_first_answers(model, error, monkeypatch):
    monkeypatch.setattr("llmjepa_kernels.cli.evaluate.load_checkpoint", None)
    assert "no directory '/nope'" in error("evaluate", model, "/nope")


def test_a_full_disk_leaves_the_last_checkpoint_to_go_on_from(tmp_path, error, monkeypatch):
    words = ["train", *TINY, "--max-steps", 2, "--save-steps", 1, "--output-dir", tmp_path]
    mark_complete = checkpoints.mark_complete
    with ExitStack() as stack:

        def fill_disk_after(directory):
            mark_complete(directory)
            stack.enter_context(full_disk())

        monkeypatch.setattr("llmjepa_kernels.training.trainer.mark_complete", fill_disk_after)
        status = run(*words)
    assert status == 2
    first = tmp_path / "llm-jepa" / "checkpoint-1"
    assert checkpoints.why_incomplete(first) is None
    monkeypatch.undo()
    assert run(*words, "--resume") == 0


def test_a_run_is_neither_overwritten_nor_mixed_by_another(trained, error):
    words = ["train", *TINY, "--max-steps", 1, "--output-dir", trained]
    weights = (trained / "llm-jepa" / "model.safetensors").read_bytes()
    assert "holds an earlier run (run.json): go on with it by --resume" in error(*words)
    with only_process(trained):
        expected = f"another process is writing to {trained}"
        assert expected in error(*words, "--overwrite")
    assert (trained / "llm-jepa" / "model.safetensors").read_bytes() == weights


def test_others_may_read_the_weights_as_the_umask_says(trained):
    found = [path.stat().st_mode for path in (trained / "llm-jepa").glob("*.*")]
    assert len(set(found)) == 1


def test_overwrite_deletes_what_was_there(trained, tmp_path):
    directory = shutil.copytree(trained, tmp_path / "again")
    stale = directory / "llm-jepa" / "checkpoint-9"
    stale.mkdir()
    words = ["train", *TINY, "--max-steps", 1, "--output-dir", directory]
    assert run(*words, "--overwrite") == 0
    assert not stale.exists()


def test_resume_notices_other_weights_and_processes(model, tmp_path, error):
    words = ["train", "--model", model, "--train-samples", 4, "--eval-samples", 1]
    words += ["--max-steps", 1, "--lora-rank", 1, "--no-compare", "--output-dir", tmp_path / "out"]
    assert run(*words) == 0
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    assert "had other options: weights " in error(*words, "--resume")


def test_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(tmp_path, error):
    words = ["train", *TINY, "--max-steps", 9, "--save-steps", 1, "--output-dir", tmp_path]
    message = error(*words, "--learning-rate", 1e30, status=1)
    assert "training diverged" in message
    directory = tmp_path / "llm-jepa"
    saved = checkpoints.checkpoints(directory)
    assert 0 < len(saved) < 9
    for checkpoint in saved:
        state = load_file(checkpoint / "model.safetensors")
        assert all(weight.isfinite().all() for weight in state.values())
    assert not (directory / "model.safetensors").exists()


def test_interrupted_training_says_how_to_go_on(tmp_path, error, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLMJEPATrainer, "compute_loss", interrupt)
    message = error("train", *TINY, "--output-dir", tmp_path, status=130)
    assert "interrupted: the same command with --resume" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"index": -1}, "index must be in 0 .. 1, got -1"),
        ({"index": 9999}, "index must be in 0 .. 1, got 9999"),
        ({"index": "0"}, "index must be in 0 .. 1, got '0'"),
        ({"index": [0]}, "index must be in 0 .. 1, got [0]"),
        ({"completion": None}, "completion must be a string, got None"),
        ({"answer": "x"}, "answer must be that of sample 0, got 'x'"),
        ({"correct": 5}, None),
        ({"correct": None}, None),
    ],
)
def test_predictions_are_not_trusted(model, tmp_path, change, expected, error, capsys):
    output = tmp_path / "p.jsonl"
    words = ["evaluate", model, "--samples", 2, "--max-new-tokens", 1, "--output", output]
    assert run(*words) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    found.sort(key=lambda line: line["index"])
    found[0] |= change
    output.write_text("".join(json.dumps(line) + "\n" for line in found))
    if expected:
        assert f"{output}:1 is no prediction: {expected}" in error(*words)
    else:
        capsys.readouterr()
        assert run(*words) == 0
        assert "0 / 2" in capsys.readouterr().out


def test_a_line_nested_too_deeply_is_named(tmp_path, error):
    data = tmp_path / "data.jsonl"
    line = json.dumps(grammar.generate(1)[0])
    data.write_text(f'{line}\n{line[:-1]}, "extra": {"[" * 100_000}{"]" * 100_000}}}\n')
    assert "data.jsonl:2: it is nested too deeply" in error("train", "--data", data)


def test_samples_beyond_the_positions_of_the_model(model, error, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    expected = "tokens long, more than the 20 of the model"
    assert expected in error("evaluate", model, "--samples", 2)
    assert expected in error("analyze", model, "--samples", 2, "--output-dir", model / "out")
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    assert run("evaluate", model, "--samples", 2, "--max-new-tokens", 100) == 0


def test_numbers_that_are_judged_to_the_letter_get_a_hint(model, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "#### 2"}]
    data.write_text(json.dumps({"messages": turns}))
    assert run("evaluate", model, "--data", data, "--max-new-tokens", 1) == 0
    assert "hint: all answers have a number after ####" in capsys.readouterr().err


def test_held_out_data_without_samples(tmp_path, error):
    data = tmp_path / "data.jsonl"
    data.write_text("")
    assert f"--eval-data {data} has no samples" in error("train", "--eval-data", data)


def test_underscores_in_options_are_hyphens(tmp_path):
    assert run("train", *TINY, "--max_steps", 1, f"--output_dir={tmp_path / 'my_runs'}") == 0
    assert (tmp_path / "my_runs" / "llm-jepa" / "model.safetensors").is_file()


def test_two_names_of_one_option(tmp_path, error):
    config = tmp_path / "c.yaml"
    config.write_text("per_device_train_batch_size: 5\nbatch_size: 5\n")
    words = ["train", *TINY, "--config", config]
    message = "batch_size is given twice, as per_device_train_batch_size too"
    assert message in error(*words)
    config.write_text("learning_rate: 1e-3\nlearning_rate: 5e-5\n")
    assert "learning_rate is given twice" in error(*words)
    config.write_text(f"learning_rate: 1{'0' * 400}\n")
    assert "learning_rate must be of type float" in error(*words)
    assert "--batch-size must be" in error("train", "--batch-size", "9" * 400)


def test_a_resume_needs_the_state_of_the_optimizer(tmp_path, error, capsys):
    words = ["train", *TINY, "--output-dir", tmp_path, "--save-only-model", "True"]
    words += ["--max-steps", 1, "--save-steps", 1]
    assert run(*words) == 0
    assert run(*words, "--resume") == 0
    assert "finished before, kept" in capsys.readouterr().out
    record = tmp_path / "llm-jepa" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"result": None}))
    assert "which --save-only-model has kept out of" in error(*words, "--resume")


def test_a_template_with_the_date_can_be_resumed(model, tmp_path, monkeypatch, capsys):
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    words = ["train", "--model", model, "--train-samples", 4, "--eval-samples", 1]
    words += ["--max-steps", 1, "--no-compare", "--output-dir", tmp_path / "out"]
    assert run(*words) == 0

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2100, 1, 1)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert run(*words, "--resume") == 0
    assert "finished before, kept" in capsys.readouterr().out


def test_a_value_may_look_like_an_option(trained, capsys):
    words = ["generate", trained / "llm-jepa", "--max-new-tokens", 1]
    assert cli._hyphenated("--use_cache what is it?") == "--use_cache what is it?"
    assert cli._hyphenated("--output_dir=a_b") == "--output-dir=a_b"
    assert run(*words, "--prompt=--use_cache what is it?") == 0


def test_what_is_secret_or_of_no_consequence_is_not_recorded():
    other = (
        "--hub-token",
        "hf_secret",
        "--weight-decay",
        "0.1",
        "--run-name=a",
        "--report-to",
        "x",
    )
    assert TrainOptions(other=other).recorded()["other"] == ["--weight-decay", "0.1"]


def test_an_interrupted_overwrite_is_not_gone_on_with(tmp_path, error, monkeypatch):
    words = ["train", *TINY, "--seeds", 1, 2, "--save-steps", 1, "--output-dir", tmp_path]
    assert run(*words, "--max-steps", 2) == 0
    old = tmp_path / "seed-2" / "llm-jepa"
    weights = (old / "model.safetensors").read_bytes()
    # As if it had been killed while the first one trained anew.
    monkeypatch.setattr(TrainingRun, "run", killed)
    new = ["--max-steps", 2, "--learning-rate", 1e-5]
    with pytest.raises(RuntimeError, match="killed"):
        run(*words, *new, "--overwrite")
    monkeypatch.undo()
    assert not list(old.glob("checkpoint-*"))
    assert run(*words, *new, "--resume") == 0
    assert (old / "model.safetensors").read_bytes() != weights
    (old / "run.json").unlink()  # as in the middle of deleting
    assert "but no run.json with the options of its run" in error(*words, *new, "--resume")


def killed(_):
    raise RuntimeError("killed")


def test_another_chat_template_is_no_way_to_go_on(model, tmp_path, error):
    words = ["train", "--model", model, *TINY[4:], "--max-steps", 1, "--output-dir", tmp_path / "o"]
    assert run(*words) == 0
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    assert "had other options: samples" in error(*words, "--resume")


def test_names_with_brackets(model, tmp_path, capsys):
    names = [shutil.copytree(model, tmp_path / name) for name in ("z[v1]", "y[/x]")]
    assert run("evaluate", *names, "--samples", 2) == 0
    printed = capsys.readouterr().out
    assert "z[v1]" in printed
    assert "y[/x]" in printed
    assert run("analyze", names[0], "--samples", 2, "--output-dir", tmp_path / "a") == 0
    assert "z[v1]" in capsys.readouterr().out


def test_results_of_what_is_through_are_shown(model, trained, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    assert run("evaluate", trained / "llm-jepa", model, "--samples", 2) == 2
    printed = capsys.readouterr()
    assert "do not end" in printed.out
    assert "more than the 20 of the model" in printed.err


def test_a_cut_that_makes_answers_right_is_warned_of(model):
    with pytest.warns(RuntimeWarning, match="max_new_tokens=1 cuts answers"):
        assert run("evaluate", model, "--samples", 2, "--max-new-tokens", 1) == 0


def test_standard_input_that_is_closed(model, monkeypatch, error):
    monkeypatch.setattr(sys, "stdin", None)
    assert "which is closed" in error("generate", model)
    assert "standard input is closed" in error("evaluate", model, "--data", "-")
    assert "--temperature must be 0 or at least 0.001" in error(
        "generate", model, "--temperature", 1e-42
    )


@pytest.mark.parametrize("rank", ["", "abc"])
def test_a_rank_that_is_none(rank):
    environment = {**os.environ, "RANK": rank}
    words = [sys.executable, "-m", "llmjepa_kernels", "train", "--epochs", "0"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_help_needs_no_optional_package():
    script = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in {'scipy', 'rich', 'matplotlib', 'peft', 'yaml'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from llmjepa_kernels.cli.main import main\n"
        "main(['train', '--help'])\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_a_directory_is_locked_in_itself(tmp_path):
    with only_process(tmp_path), pytest.raises(BlockingIOError), only_process(tmp_path):
        pass
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.lock"))


def test_a_run_that_diverged_is_in_the_report(tmp_path):
    words = [
        "train",
        *TINY,
        "--max-steps",
        3,
        "--output-dir",
        tmp_path,
        "--objective",
        "ntp",
        "jepa",
    ]
    assert run(*words, "--jepa-weight", 3e38) == 1
    assert "diverged, and not in the table: LLM-JEPA, seed" in (tmp_path / "report.txt").read_text()
