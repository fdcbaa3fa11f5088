"""The ``llmjepa`` command itself: help, mistakes, and the module that torchrun starts."""

import importlib.util
import subprocess
import sys

import pytest

from llmjepa_kernels.cli import main as cli


def test_help_explains_and_stops(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ("--model", "--jepa-weight", "--lora-rank", "--no-share-prefixes", "--compare"):
        assert option in text


def test_help_and_mistakes_answer_without_transformers():
    code = (
        "import sys\n"
        "from llmjepa_kernels.cli import main as cli\n"
        "try:\n"
        "    cli.main(['train', '--seed', 'x'])\n"
        "except SystemExit as stopped:\n"
        "    assert stopped.code == 2\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "llmjepa_kernels", "--help"]
    assert "train" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_missing_package_says_how_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else name)
    assert cli.main(["train", "--model", "x", "--lora-rank", "8"]) == 2
    assert "peft is missing: pip install 'llmjepa_kernels[train]'" in capsys.readouterr().err


def test_traceback_on_demand():
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        cli.main(["train", "--data", "none.jsonl", "--traceback"])
