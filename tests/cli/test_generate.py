"""`llmjepa generate`: a prompt, standard input, a chat; and models that come with code."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.evaluation import answer as answers
from llmjepa_kernels.evaluation import predict
from llmjepa_kernels.hf.load import load_pretrained
from tests.evaluation.test_predict import talkative_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model from random weights."""
    directory = tmp_path_factory.mktemp("model") / "random"
    tokenizer = train_tokenizer(grammar.generate(20))
    talkative_llama(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def generate(checkpoint, capsys):
    def run(*options, model=checkpoint):
        try:
            status = cli.main(["generate", str(model), *map(str, options)])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def typed(monkeypatch, text, *, tty=False):
    stream = io.StringIO(text)
    stream.isatty = lambda: tty
    monkeypatch.setattr(sys, "stdin", stream)


def test_answers_as_the_evaluation_does(checkpoint, generate, monkeypatch):
    sample = grammar.generate(1, seed=5)[0]
    (expected,) = predict.evaluate(*load_pretrained(str(checkpoint)), [sample], max_new_tokens=9)
    system, user, _ = (turn["content"] for turn in sample["messages"])
    options = ["--system", system, "--max-new-tokens", 9]
    status, out, _ = generate(*options, "--prompt", user)
    assert status == 0
    assert expected.completion
    assert out == expected.completion + "\n"
    typed(monkeypatch, f"{user}\n")
    assert generate(*options)[1] == out


def test_a_chat_remembers_what_was_said(checkpoint, generate, monkeypatch):
    typed(monkeypatch, "a\nb\n\nc\n", tty=True)
    heard = []

    def spy(model, tokenizer, messages, *rest, **options):
        heard.append([(turn["role"], turn["content"]) for turn in messages])
        return answers.answer(model, tokenizer, messages, *rest, **options)

    monkeypatch.setattr("llmjepa_kernels.cli.generate.answer", spy)
    status, out, _ = generate("--max-new-tokens", 3, "--system", "s")
    assert status == 0
    assert heard[0] == [("system", "s"), ("user", "a")]
    assert heard[1][:2] == heard[0]
    assert [role for role, _ in heard[1]] == ["system", "user", "assistant", "user"]
    assert heard[1][2][1] in out
    assert len(heard) == 2


def test_a_question_without_an_answer_is_forgotten(generate, monkeypatch):
    typed(monkeypatch, "a\nb\n", tty=True)
    heard = []
    monkeypatch.setattr(
        "llmjepa_kernels.cli.generate.answer",
        lambda m, t, messages, *_, **__: heard.append(messages) or "",
    )
    status, out, _ = generate()
    assert status == 0
    assert out.count("no answer") == 2
    assert [[turn["content"] for turn in messages] for messages in heard] == [["a"], ["b"]]


def test_the_plain_format_has_no_system_turn(checkpoint, generate, tmp_path):
    plain = shutil.copytree(checkpoint, tmp_path / "plain")
    ExampleFormat(template="plain", separator_id=5).save(plain)
    status, _, error = generate("--prompt", "a", "--system", "b", model=plain)
    assert status == 2
    assert "--system has no place in the plain format" in error


def test_the_plain_format_has_no_turns(checkpoint, generate, monkeypatch, tmp_path):
    plain = shutil.copytree(checkpoint, tmp_path / "plain")
    ExampleFormat(template="plain", separator_id=5).save(plain)
    typed(monkeypatch, "a\nb\n", tty=True)
    monkeypatch.setattr("llmjepa_kernels.cli.generate.answer", lambda m, t, messages, *_, **__: (
        print([turn["content"] for turn in messages]) or "x"
    ))  # fmt: skip
    assert generate(model=plain)[1].splitlines()[:2] == ["> ['a']", "> ['b']"]


def test_drawn_answers_follow_the_seed(generate):
    def drawn(seed):
        return generate("--prompt", "a", "--temperature", 5, "--seed", seed)[1]

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(3)}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "expected a prompt, from --prompt or standard input, got none"),
        (["--prompt", "word " * 3000], "tokens long, and the model has 2048 positions"),
        (["--prompt", "a", "--temperature", -1], "--temperature must be at least 0, got -1.0"),
        (["--prompt", "a", "--device", "meta"], "--device meta cannot be used"),
        (["--prompt", "a", "--seed", -1], "--seed must be at least 0, got -1"),
    ],
)
def test_mistakes(generate, options, message):
    status, out, error = generate(*options)
    assert status == 2
    assert out == ""
    assert error.splitlines()[-1].startswith("llmjepa generate: error: ")
    assert message in error


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_if_it_is_trusted(checkpoint, generate, tmp_path):
    model = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    (model / "own.py").write_text(CODE)
    config = json.loads((model / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (model / "config.json").write_text(json.dumps(config))
    status, _, error = generate("--prompt", "a", model=model)
    assert status == 2
    assert "it comes with Python code, which runs only if you trust its authors" in error
    assert "--trust-remote-code" in error
    options = ["--prompt", "a", "--max-new-tokens", 5]
    status, out, _ = generate(*options, "--trust-remote-code", model=model)
    assert status == 0
    assert out == generate(*options)[1]
