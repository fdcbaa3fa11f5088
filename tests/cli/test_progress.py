"""What commands say while they work: readable at 80 columns, lines in a file."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.cli import progress

LOGS = {
    "loss": 12.345678,
    "ntp_loss": 11.234567,
    "jepa_loss": 0.00012345,
    "stp_loss": 1.2345678,
    "cosine": -0.98765432,
    "tokens_per_second": 123456.789,
}


def train(updates):
    bar = progress.TrainingBar()
    state = SimpleNamespace(is_world_process_zero=True, max_steps=10_000, global_step=0)
    bar.on_train_begin(None, state, None)
    for state.global_step in updates:
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, logs=LOGS)
        bar.on_log(None, state, None, logs={"eval_loss": 1.0})
    bar.on_train_end(None, state, None)


def test_a_terminal_of_80_columns_shows_all_of_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    train([9_999, 10_000])
    lines = capsys.readouterr().err.strip().split("\r")
    assert max(map(len, lines)) <= 80
    shown = "ntp 11.2 jepa 0.000123 stp 1.23 cos -0.988 123457 tok/s"
    assert shown in lines[-1]


def test_a_file_gets_lines_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    train(range(1, 4))
    first = capsys.readouterr().err
    assert first == "1/10000 ntp 11.2 jepa 0.000123 stp 1.23 cos -0.988 123457 tok/s\n"
    now[0] += 100
    train([5, 10_000])
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["10000/10000"]


def test_counted_batches_are_the_same(capsys):
    assert list(progress.counted([[1, 2], [3]], "things", 3)) == [[1, 2], [3]]
    err = capsys.readouterr().err
    assert "things" in err
    assert "3/3" in err


def test_other_processes_are_silent(monkeypatch, capsys):
    progress.say("once")
    monkeypatch.setenv("RANK", "1")
    progress.say("again")
    assert capsys.readouterr() == ("", "once\n")


def test_warnings_are_lines(monkeypatch):
    for terminal, begin in ((False, ""), (True, "\r\033[K")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with warnings.catch_warnings(record=True):
            text = cli._warning("be careful", UserWarning, "file.py", 3)
        assert text == f"{begin}warning: be careful\n"
