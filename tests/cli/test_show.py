"""Packed rows for people, and the rehearsal of a run."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("transformers")

from llmjepa_kernels import Example, Segment, llm_jepa_example, pack
from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.cli import packed_row
from llmjepa_kernels.cli.packed_row import row_figure, row_text, runs_of
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.chat import chat_example
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.predictor_tokens import predictor_tokens
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.ops.dense import visible
from tests.support.helpers import random_rows


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def sees(runs):
    return [[j for j, key in enumerate(runs) if key.is_seen_by(query)] for query in runs]


def test_runs_of_a_row(monkeypatch):
    examples = [
        llm_jepa_example([0, 1, 2, 3], [4, 5], [6, 7], pred_ids=[25]),
        llm_jepa_example([0, 1, 8], [9], [10], pred_ids=[25]),
    ]
    batch = pack(examples, 24, pad_to_multiple_of=8)
    runs = runs_of(batch, 0, Letters())
    assert [run.text for run in runs] == ["ab", "cd", "ef", "z", "i", "j", "z", "gh", "k", ""]
    assert [run.depth for run in runs] == [0, 1, 2, 2, 1, 2, 2, 0, 0, 0]
    assert [run.supervised for run in runs] == [0, 0, 2, 0, 0, 1, 0, 0, 0, 0]
    roles = ["", "", "", "predicts 1", "", "", "predicts 2", "target 1", "target 2", "padding"]
    assert [run.role for run in runs] == roles
    assert sees(runs)[:8] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4], [0, 4, 5], [0, 4, 6], [7]]
    lines = row_text(runs).splitlines()
    assert re.search(r"2 to 3 +cd +██$", lines[3])
    assert re.search(r"predicts 1 +z +██ █$", lines[5])
    # The whole mask, as drawn.
    image = row_figure(runs).axes[0].get_images()[0].get_array()
    shown = torch.from_numpy(~image.mask if image.mask.shape else image.data == image.data)
    seen = visible(batch["visible_until"])[0]
    stop = runs[-1].start
    assert torch.equal(shown[:stop, :stop], seen[:stop, :stop])
    assert not shown[stop:].any()
    # A longer row is drawn coarser.
    monkeypatch.setattr(packed_row, "MAX_CELLS", len(shown) // 2)
    coarse = row_figure(runs).axes[0].get_images()[0].get_array()
    assert torch.equal(torch.from_numpy(~coarse.mask), shown[::2, ::2])


def test_runs_are_the_mask_of_any_row():
    visible_until, position_ids = random_rows(6, 60, seed=1)
    batch = {
        "input_ids": torch.arange(360).view(6, 60),
        "labels": torch.zeros(6, 60, dtype=torch.int64),  # so that nothing is padding
        "visible_until": visible_until,
        "position_ids": position_ids,
        "view_pairs": torch.full((6, 0, 2), -1),
    }
    for row in range(6):
        runs = runs_of(batch, row, Letters())
        assert [run.start for run in runs[1:]] == [run.stop for run in runs[:-1]]
        expected = visible(visible_until)[row]
        for query, found in zip(runs, sees(runs), strict=True):
            for key, run in enumerate(runs[: runs.index(query)]):
                part = expected[query.start : query.stop, run.start : run.stop]
                assert part.all() if key in found else not part.any()


def test_a_long_row_is_cut_in_text():
    examples = [Example([Segment([i, i + 1], labels=[0, 0])]) for i in range(50)]
    runs = runs_of(pack(examples), 0, Letters())
    assert "… and 10 more runs" in row_text(runs)


def test_the_command(tmp_path, capsys):
    tokenizer = train_tokenizer(grammar.generate(20, seed=3), vocab_size=300)
    tokenizer.add_tokens(predictor_tokens(1), special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    picture = tmp_path / "pictures" / "row.png"
    show = ["show", str(tmp_path), "--samples", "3"]
    assert cli.main(show) == 2
    assert "say how many of them follow a view" in capsys.readouterr().err
    ExampleFormat(pred_ids=tokenizer.convert_tokens_to_ids(predictor_tokens(1))).save(tmp_path)
    assert cli.main([*show, "--output", str(picture)]) == 0
    output = capsys.readouterr().out
    assert re.search(r"row 0: \d+ tokens", output)
    assert "predicts 3" in output
    assert "target 3" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*show, "--max-length", "150", "--no-share-prefixes"]) == 0
    assert "row 1: " in capsys.readouterr().out
    assert cli.main([*show, "--output", "row.jpg"]) == 2
    assert "--output must end in .png" in capsys.readouterr().err


def test_a_rehearsal_writes_nothing(tmp_path, capsys):
    options = ["--train-samples", 40, "--eval-samples", 4, "--hidden-size", 64, "--num-layers", 1]
    options += ["--objective", "jepa", "stp", "--epochs", 3, "--batch-size", 16, "--seeds", 1, 2]
    out = tmp_path / "out"
    command = ["train", *map(str, options), "--output-dir", str(out)]
    assert cli.main([*command, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert not out.exists()
    titles = re.findall(r"^(.*), seed (\d): 40 examples, 9 updates$", output, re.MULTILINE)
    assert titles == [("NTP only", "1"), ("LLM-JEPA", "1"), ("STP", "1")]
    cost = [float(x) for x in re.findall(r"([\d.]+) of the tokens of plain", output)]
    assert cost[0] == 1
    assert 0.5 < cost[2] < cost[1] < 1.5
    assert output.count("the first row:") == 3
    assert "predicts 16" in output
    assert "0.0% of them padding" in output
    assert len(re.findall(r"memory of a process, estimated: [\d.]+ GiB", output)) == 3
    per_step = [*command, "--loss-dropout", "0.5", "--loss-dropout-per", "step", "--dry-run"]
    assert cli.main(per_step) == 0
    assert "the first row:" in capsys.readouterr().out
    skipped = [*command, "--max-sequence-length", "36", "--max-length-policy", "skip"]
    assert cli.main([*skipped, "--dry-run"]) == 0
    assert re.search(r"left out \d+ samples: too long", capsys.readouterr().out)
    dropped = [*command, "--batch-size", "64", "--dataloader-drop-last", "True"]
    assert cli.main([*dropped, "--dry-run"]) == 2
    assert "40 samples make no batch of 64" in capsys.readouterr().err
    long = [*command, "--max-length", "64", "--dataloader-drop-last", "True", "--dry-run"]
    assert cli.main(long) == 0
    output = capsys.readouterr().out
    assert "40 examples, 6 updates" in output
    assert "padding" in output.split("the first row")[0]


def test_dollars_are_no_formulas(tmp_path):
    tokenizer = train_tokenizer(grammar.generate(20, seed=3), vocab_size=300)
    chat = [{"role": "user", "content": "$^$ $5?"}, {"role": "assistant", "content": "$\\begin$"}]
    row = pack([chat_example(chat, tokenizer)])
    row_figure(runs_of(row, 0, tokenizer)).savefig(tmp_path / "row.png")
