"""What `llmjepa train` does with samples that are too long, and with weights in bfloat16."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from tokenizers import normalizers

from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.cli.main import _parser
from llmjepa_kernels.cli.starting_point import starting_point
from llmjepa_kernels.cli.train_options import TrainOptions
from llmjepa_kernels.cli.training_data import ExampleMaker, LeftOut, SampleReader, TrainingData
from llmjepa_kernels.data import grammar
from llmjepa_kernels.example import segment_ends
from llmjepa_kernels.hf import load as models
from llmjepa_kernels.packing import pack


def run(*options: object) -> int:
    return cli.main(["train", *map(str, options)])


def _long_rows(path):
    """Ten pairs, of which one has a long text, one a long system turn and one a long answer."""
    rows = grammar.generate(10)
    for index, turn in ((2, 1), (4, 0), (6, 2)):
        rows[index]["messages"][turn]["content"] *= 40
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _parts(*options):
    """The data of `llmjepa train`, as it would train on them."""
    options = TrainOptions.of(*_parser().parse_known_args(["train", *map(str, options)]))
    left_out = LeftOut()
    reader = SampleReader(options, left_out)
    samples = reader.first()
    start = starting_point(options, [each.sample for each in samples], 1)
    return TrainingData(options, samples, reader.held_out(), start, left_out), start


@pytest.mark.parametrize("layout", ["shared", "official"])
def test_sequences_are_cut_as_little_as_need_be(tmp_path, layout, capsys):
    data = tmp_path / "data.jsonl"
    rows = _long_rows(data)
    options = ["--data", data, "--layout", layout, "--max-length-policy", "truncate"]
    options += ["--supervise", "all", "--hidden-size", 64, "--num-layers", 1]
    limits = ["--max-sequence-length", 90, "--max-length", 160]
    parts, start = _parts(*options, *limits)
    # Of the long system turn nothing of the text is left, where the view has the system turn.
    left = [0, 1, 2, 3, *[4] * (layout == "official"), 5, 6, 7, 8, 9]
    assert [each.located.sample["messages"] for each in parts.train.made] == [
        rows[i]["messages"] for i in left
    ]
    cut = {rows.index(each.located.sample): each.max_length for each in parts.train.made}
    assert [index for index, length in cut.items() if length] == [i for i in left if i in (2, 4, 6)]
    expected = {"truncated": len(left) - 7} | ({"too long": 1} if layout == "shared" else {})
    assert parts.left_out.counts() == expected
    assert "truncated: " + str(data) in capsys.readouterr().err
    for each in parts.train.made:
        if each.max_length is None:
            continue

        def size(length, sample=each.located.sample):
            example = start.example_format.example(sample, start.tokenizer, max_length=length)
            return max(segment_ends(example)), pack([example])["input_ids"].shape[1]

        longest, row = size(each.max_length)
        assert longest <= 90
        assert row <= 160
        assert each.max_length == 90 or size(each.max_length + 1)[1] > 160


def test_a_row_alone_may_be_what_is_too_short(tmp_path):
    """Found by halving: each length is tokenized anew."""
    data = tmp_path / "data.jsonl"
    _long_rows(data)
    options = ["--data", data, "--max-length-policy", "truncate", "--max-length", 160]
    options += ["--hidden-size", 64, "--num-layers", 1, "--supervise", "all"]
    parts, start = _parts(*options)
    cut = next(each for each in parts.train.made if each.max_length)
    assert pack([cut.example])["input_ids"].shape[1] <= 160
    tried = []
    maker = ExampleMaker(parts._options, start, LeftOut(silent=True))

    def counting(self, sample, max_length=None):
        tried.append(max_length)
        return start.example_format.example(sample, start.tokenizer, max_length=max_length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExampleMaker, "_example", counting)
        (again,) = maker.examples([("here", cut.located.sample)])
    assert again.max_length == cut.max_length
    assert len(tried) < 16
    longer = start.example_format.example(
        cut.located.sample, start.tokenizer, max_length=cut.max_length + 1
    )
    assert pack([longer])["input_ids"].shape[1] > 160


def test_the_fingerprint_is_of_the_texts_as_they_are_written(tmp_path):
    """Which a tokenizer may take apart in another way only where they are not ASCII."""
    data = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"na\u00efve \u00e9t\u00e9 {i}", "completion": "\u00e0 no\u00ebl"}
        for i in range(8)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts, start = _parts("--data", data, "--eval-samples", 2)
    before = parts.fingerprint()
    assert parts.fingerprint() == before
    start.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents()]
    )
    assert parts.fingerprint() != before


def test_what_truncation_leaves_nothing_of(tmp_path, capsys):
    """Answers that are cut off, and held-out samples that the model could not answer whole."""
    data = tmp_path / "data.jsonl"
    rows = _long_rows(data)
    options = ["--data", data, "--max-length-policy", "truncate", "--max-sequence-length", 90]
    options += ["--hidden-size", 64, "--num-layers", 1]
    parts, _ = _parts(*options)
    kept = [rows.index(each.located.sample) for each in parts.train.made]
    assert kept == [0, 1, 3, 5, 6, 7, 8, 9]  # 6 has the beginning of its answer
    assert parts.left_out.counts() == {"too long": 2, "truncated": 1}
    many = list(rows)
    many[1]["messages"][1]["content"] *= 800  # more than the 2048 positions
    data.write_text("".join(json.dumps(row) + "\n" for row in many))
    parts, start = _parts(*options, "--supervise", "all", "--eval-data", data)
    assert start.max_positions == 2048
    assert [rows.index(each.located.sample) for each in parts.train.made][:2] == [0, 1]
    held_out = [rows.index(each.located.sample) for each in parts.held_out.made]
    assert held_out == [0, 2, 3, 5, 6, 7, 8, 9]
    command = [*options, "--max-steps", 1, "--no-compare", "--output-dir", tmp_path / "out"]
    assert run(*command, "--supervise", "all", "--eval-data", data) == 0
    assert "\ntruncated 5 samples" in capsys.readouterr().out


@pytest.mark.parametrize("how", [[], ["--lora-rank", 2]])
def test_weights_in_bfloat16(tmp_path, how):
    options = ["--hidden-size", 64, "--num-layers", 1, "--train-samples", 20, "--eval-samples", 2]
    options += ["--max-steps", 2, "--no-compare", "--dtype", "bfloat16"]
    first = tmp_path / "first"
    assert run(*options, "--output-dir", first) == 0
    checkpoint = first / "llm-jepa"
    if how:
        options = [o for o in options if o not in ("--hidden-size", 64, "--num-layers", 1)]
        options += ["--model", checkpoint, "--output-dir", tmp_path / "second", *how]
        assert run(*options) == 0
        checkpoint = tmp_path / "second" / "llm-jepa"
    saved = load_file(checkpoint / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    model, _ = models.load_pretrained(str(checkpoint), "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(b.dtype != torch.bfloat16 for b in model.buffers())  # frequencies keep their digits


def test_what_is_left_out_of_a_stream_is_said_once(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    _long_rows(data)
    options = ["--data", data, "--eval-data", data, "--streaming", "--max-length-policy", "skip"]
    options += ["--max-sequence-length", 90, "--batch-size", 4, "--max-steps", 8, "--no-compare"]
    options += ["--hidden-size", 64, "--num-layers", 1, "--output-dir", tmp_path / "out"]
    assert run(*options) == 0
    captured = capsys.readouterr()
    assert captured.out.count("left out 3 samples: too long") == 2  # held out, and of the stream
    assert captured.err.count("left out: ") == 2 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--separator", "<|predictor_1|>"], "<|predictor_1|> is a [PRED] token"),
        (["--end-token", "<|predictor_1|>"], "<|predictor_1|> is a [PRED] token"),
        (["--separator", ""], "--separator must not be empty"),
        (["--separator", "<|a|>", "--end-token", "<|a|>"], "must differ, got <|a|>"),
        (["--end-token", "<|separator|>"], "must differ, got <|separator|>"),
        (["--embedding-token", "-1"], "--embedding-token is for --format chat"),
    ],
)
def test_tokens_of_the_plain_format(tmp_path, capsys, options, message):
    small = ["--train-samples", 8, "--hidden-size", 64, "--num-layers", 1, "--format", "plain"]
    assert run(*small, *options, "--dry-run", "--output-dir", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_generate_of_other_programs_stops_at_the_end_token(tmp_path):
    options = ["--train-samples", 8, "--hidden-size", 64, "--num-layers", 1, "--max-steps", 1]
    options += ["--format", "plain", "--end-token", "<|stop|>", "--no-compare"]
    assert run(*options, "--eval-samples", 1, "--output-dir", tmp_path) == 0
    model, tokenizer = models.load_pretrained(str(tmp_path / "llm-jepa"))
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    ends = model.generation_config.eos_token_id  # Trainer adds the tokenizer's
    assert stop in (ends if isinstance(ends, list) else [ends])
