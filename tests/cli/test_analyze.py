"""The numbers of the views' geometry against plain numpy, and `llmjepa analyze` as a whole."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.cli.analysis_figure import analysis_figure
from llmjepa_kernels.cli.analyze import short_names
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.predictor_tokens import add_predictor_tokens
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.evaluation.geometry import (
    DEFINITIONS,
    effective_rank,
    embed_views,
    linear_residual,
    view_geometry,
    view_states,
)
from llmjepa_kernels.example import sequence_ids
from llmjepa_kernels.hf import load as models
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.packing import pack
from llmjepa_kernels.training.telemetry import CollapseTelemetry
from tests.support.helpers import random_examples
from tests.support.models import tiny_model


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values, rows, width):
    """A (rows, width) matrix with these singular values."""
    left, right = (torch.linalg.qr(randn(n, len(values), seed=n))[0] for n in (rows, width))
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def test_singular_values_are_those_of_the_difference():
    spectrum = [100.0, 10.0, 5.0, 1e-3]
    code = randn(12, 7, seed=1)
    difference = with_spectrum(spectrum, 12, 7)
    numbers = view_geometry(code + difference, code)
    assert numbers["singular_values"] == pytest.approx([*spectrum, 0, 0, 0], abs=1e-12)
    size = np.sqrt(np.square(spectrum).sum()) / np.linalg.norm(code.numpy())
    assert numbers["relative_difference"] == pytest.approx(size)
    assert len(view_geometry(randn(130, 120), randn(130, 120))["singular_values"]) == 100


def test_cosines_of_an_example_and_of_others():
    text, code, predicted = (randn(5, 3, seed=s) for s in range(3))
    numbers = view_geometry(text, code, (predicted, code))
    for name, first in (("text_code", text), ("pred_code", predicted)):
        a, b = first.numpy(), code.numpy()
        cosines = a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        assert numbers[f"{name}_cosines"] == pytest.approx(np.diag(cosines))
        assert numbers[f"{name}_cosine"] == pytest.approx(np.diag(cosines).mean())
        others = cosines[~np.eye(5, dtype=bool)]
        assert numbers[f"other_{name}_cosine"] == pytest.approx(others.mean())
    assert numbers.keys() == DEFINITIONS.keys()
    without = view_geometry(text, code)
    assert [key for key, value in without.items() if value is None] == [
        "pred_singular_values",
        "pred_code_cosines",
        "pred_code_cosine",
        "other_pred_code_cosine",
    ]
    spectrum = np.linalg.svd((predicted - code).numpy(), compute_uv=False)
    assert numbers["pred_singular_values"] == pytest.approx(spectrum)


def test_effective_rank_counts_directions_of_equal_variance():
    corners = torch.eye(4, dtype=torch.float64)
    states = torch.cat([corners, -corners])
    assert effective_rank(states) == pytest.approx(4)
    assert effective_rank(states + 50) == pytest.approx(4)  # a common mean is no direction
    assert effective_rank(states * torch.tensor([1.0, 1, 0, 0])) == pytest.approx(2)
    assert effective_rank(torch.ones(3, 4, dtype=torch.float64)) == 0
    text, code = randn(9, 6), randn(9, 6, seed=1)
    eigenvalues = np.linalg.eigvalsh(np.cov(text.numpy().T))
    ratio = eigenvalues.sum() ** 2 / np.square(eigenvalues).sum()
    assert view_geometry(text, code)["text_rank"] == pytest.approx(ratio)
    assert view_geometry(code, text)["code_rank"] == pytest.approx(ratio)


def test_what_training_logs_of_collapse():
    code = randn(40, 6)
    unit = code / code.norm(dim=1, keepdim=True)
    numbers = view_geometry(randn(40, 6, seed=1), code)
    assert numbers["code_variance"] == pytest.approx(unit.var(dim=0).sum().item())
    telemetry = CollapseTelemetry(torch.device("cpu"))
    telemetry.add(torch.stack([unit, unit])[:, None].float())
    logs = telemetry.logs(lambda x: x)
    assert numbers["code_variance"] == pytest.approx(logs["target_variance"], rel=1e-4)
    assert numbers["code_rankme"] == pytest.approx(logs["target_rank"], rel=1e-4)
    collapsed = view_geometry(code, torch.ones(40, 6, dtype=torch.float64))
    assert collapsed["code_variance"] == pytest.approx(0)
    assert collapsed["code_rankme"] == pytest.approx(1)


@pytest.mark.parametrize("width", [3, 20])
def test_linear_residual_is_the_error_on_the_example_left_out(width):
    text, noise = randn(9, width), randn(9, 2, seed=1)
    code = text[:, :2] @ randn(2, 2, seed=2) + 0.5 * noise + 7
    x, y = text.numpy(), code.numpy()
    size = np.square(x - x.mean(axis=0)).sum()
    errors = []
    for strength in 10.0 ** -np.arange(10):
        error = []
        for i in range(9):
            rest = np.arange(9) != i
            mean_x, mean_y = x[rest].mean(axis=0), y[rest].mean(axis=0)
            a, b = x[rest] - mean_x, y[rest] - mean_y
            weight = np.linalg.solve(a.T @ a + strength * size * np.eye(width), a.T @ b)
            error.append(y[i] - mean_y - (x[i] - mean_x) @ weight)
        errors.append(np.square(error).sum())
    trivial = sum(np.square(y[i] - np.delete(y, i, axis=0).mean(axis=0)).sum() for i in range(9))
    assert linear_residual(text, code) == pytest.approx(min(errors) / trivial, rel=1e-6)


def test_linear_residual_at_its_ends():
    text = randn(40, 10)
    assert linear_residual(text, text @ randn(10, 4) + 3) < 1e-9
    assert linear_residual(text, randn(40, 4, seed=5)) > 0.95
    assert linear_residual(text, torch.ones(40, 4, dtype=torch.float64)) is None


def test_embedding_keeps_neighbours_and_is_the_same_every_time():
    text = randn(12, 5)
    code = text + 100
    places = embed_views(text, code)
    assert [place.shape for place in places] == [(12, 2), (12, 2)]
    within = max(torch.cdist(place, place).max() for place in places)
    assert torch.cdist(*places).min() > within
    assert all(map(torch.equal, embed_views(text, code), places))
    assert all(torch.equal(p, torch.zeros(6, 2)) for p in embed_views(*torch.ones(2, 6, 5)))


def test_states_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"text and code must have the same shape .*\(3, 4\) and"):
        view_geometry(randn(3, 4), randn(4, 4))
    with pytest.raises(ValueError, match=r"at least 2, .*got \(1, 4\)"):
        view_geometry(randn(1, 4), randn(1, 4))
    broken = randn(3, 4)
    broken[1, 2] = float("nan")
    with pytest.raises(ValueError, match="code must be finite, row 1 holds"):
        view_geometry(randn(3, 4), broken)
    with pytest.raises(ValueError, match="predictors must be finite, row 1 holds"):
        view_geometry(randn(3, 4), randn(3, 4), (broken, randn(3, 4)))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_stays_in_its_mode(training):
    """Also after an error; its dropout does not touch the states."""
    model = patch_model(tiny_model("llama").train(training))
    batch, seen = pack(random_examples(3, seed=1)), []
    model.model.layers[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    view_states(model, [batch])
    assert seen == [False]
    assert model.training is model.model.layers[0].training is training
    with pytest.raises(ValueError, match="layer must be from"):
        view_states(model, [batch], layer=9)
    assert model.training is training


SAMPLES = 7


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Models as they come: without [PRED], with it in the chat format, and in the plain one."""
    root = tmp_path_factory.mktemp("checkpoints")
    rows = grammar.generate(SAMPLES, seed=3)
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("base", "chat", "plain"):
        tokenizer = train_tokenizer(rows, vocab_size=300)
        torch.manual_seed(0)
        model = models.small_llama(tokenizer, hidden_size=64, num_layers=2)
        if name != "base":
            pred_ids = add_predictor_tokens(model, tokenizer, 2)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    ExampleFormat(layout="official", direction="both", pred_ids=pred_ids).save(root / "chat")
    ExampleFormat("plain", separator_id=4, pred_ids=pred_ids).save(root / "plain")
    return root


def analyze(*options):
    return cli.main(["analyze", *map(str, options)])


@pytest.fixture(scope="module")
def analysis(checkpoints):
    names = [checkpoints / name for name in ("base", "chat", "plain")]
    output = checkpoints / "out"
    assert analyze(*names, "--data", checkpoints / "data.jsonl", "--output-dir", output) == 0
    return output


def test_analysis_of_checkpoints_side_by_side(checkpoints, analysis):
    content = json.loads((analysis / "analysis.json").read_text())
    assert content["samples"] == SAMPLES
    assert content["definitions"] == DEFINITIONS
    found = {checkpoint["name"]: checkpoint for checkpoint in content["checkpoints"]}
    assert list(found) == ["base", "chat", "plain"]
    assert (analysis / "analysis.png").read_bytes().startswith(b"\x89PNG")
    for numbers in found.values():
        assert DEFINITIONS.keys() < numbers.keys()
        assert [len(numbers["tsne"][view]) for view in ("text", "code")] == [SAMPLES, SAMPLES]
    assert found["base"]["pred_code_cosine"] is None
    assert len(found["chat"]["pred_code_cosines"]) == 2 * SAMPLES  # both directions
    assert len(found["plain"]["pred_code_cosines"]) == SAMPLES
    # The views alone, in plain Transformers.
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "plain").eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "plain")
    rows = [json.loads(line) for line in (checkpoints / "data.jsonl").read_text().splitlines()]

    def encode(text):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        return model(ids, output_hidden_states=True).hidden_states[-1][0, -1].detach()

    views = [[encode(turn["content"]) for turn in row["messages"][1:]] for row in rows]
    cosines = [torch.cosine_similarity(*pair, dim=0).item() for pair in views]
    assert found["plain"]["text_code_cosines"] == pytest.approx(cosines, abs=1e-5)


def test_the_figure_shows_all_of_it(analysis):
    """Every singular value, every cosine, every place of both views."""
    content = json.loads((analysis / "analysis.json").read_text())["checkpoints"]
    for shown in (content, content[:1]):
        figure = analysis_figure(shown)
        spectrum, *histograms = figure.axes[:3]
        maps = figure.axes[3:]
        lines = [list(line.get_ydata()) for line in spectrum.lines]
        both = ("singular_values", "pred_singular_values")
        assert lines == [c[key] or [] for c in shown for key in both]
        for axis, kind in zip(histograms, ("text_code", "pred_code"), strict=True):
            found = [c for c in shown if c[f"{kind}_cosines"]]
            lefts, rights = axis.get_xlim()
            assert all(lefts <= x <= rights for c in found for x in c[f"{kind}_cosines"])
            outlines = [patch.get_xy()[:, 1] for patch in axis.patches if not patch.get_fill()]
            # An outline goes up, across and down: each bar's height is in it twice.
            assert [sum(outline) / 2 for outline in outlines] == pytest.approx([1.0] * len(found))
            means = [line.get_xdata()[0] for line in axis.lines]
            assert means == [c[f"other_{kind}_cosine"] for c in found]
        assert [axis.get_title("left") for axis in maps] == [f"t-SNE: {c['name']}" for c in shown]
        for axis, numbers in zip(maps, shown, strict=True):
            places = {s.get_label().lower(): s.get_offsets().tolist() for s in axis.collections}
            assert places == numbers["tsne"]
    assert histograms[1].texts[0].get_text() == "no [PRED] tokens"


def test_the_same_numbers_at_every_call(checkpoints, analysis, tmp_path, capsys):
    data = checkpoints / "data.jsonl"
    assert analyze(checkpoints / "chat", "--data", data, "--output-dir", tmp_path) == 0
    table = capsys.readouterr().out
    again, first = (
        json.loads((directory / "analysis.json").read_text())["checkpoints"]
        for directory in (tmp_path, analysis)
    )
    assert again == [first[1]]
    assert f"{again[0]['code_rank']:.1f}" in table


def test_further_views_are_predictions_only(checkpoints, analysis, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in (checkpoints / "data.jsonl").read_text().splitlines()]
    data.write_text("".join(json.dumps({**row, "views": {"a": "b"}}) + "\n" for row in rows))
    options = ["--data", data, "--output-dir", tmp_path]
    assert analyze(checkpoints / "plain", *options) == 0
    again, first = (
        json.loads((directory / "analysis.json").read_text())["checkpoints"][-1]
        for directory in (tmp_path, analysis)
    )
    assert len(again["pred_code_cosines"]) == 2 * SAMPLES
    for key in ("text_code_cosines", "singular_values", "linear_residual"):
        assert again[key] == first[key]


def test_built_in_pairs_by_default(checkpoints, tmp_path, capsys):
    options = ["--samples", 4, "--output-dir", tmp_path]
    assert analyze(checkpoints / "base", *options) == 0
    data = tmp_path / "same.jsonl"
    rows = grammar.generate(4, seed=42, split="heldout")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first,) = json.loads((tmp_path / "analysis.json").read_text())["checkpoints"]
    assert analyze(checkpoints / "base", "--data", data, *options) == 0
    assert json.loads((tmp_path / "analysis.json").read_text())["checkpoints"] == [first]
    assert analyze(checkpoints / "base", "--recipe", "gsm8k", *options) == 2
    assert "--recipe gsm8k needs --data" in capsys.readouterr().err


def analysed(directory):
    content = json.loads((directory / "analysis.json").read_text())
    return content["checkpoints"]


@pytest.mark.parametrize("name", ["base", "chat", "plain"])
@pytest.mark.parametrize(("layer", "pooling"), [(0, "mean"), (1, "last"), (-2, "mean")])
def test_layer_and_pooling(checkpoints, tmp_path, name, layer, pooling):
    """Against every view in a pass of its own, in plain Transformers."""
    data = checkpoints / "data.jsonl"
    options = ["--data", data, "--output-dir", tmp_path, "--layer", layer, "--pooling", pooling]
    assert analyze(checkpoints / name, *options) == 0
    (found,) = analysed(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoints / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / name)
    trained = ExampleFormat.load(checkpoints / name, tokenizer)
    chats = [json.loads(line) for line in data.read_text().splitlines()]

    def state(example, segment):
        ids = torch.tensor([sequence_ids(example, segment)])
        states = model(ids, output_hidden_states=True).hidden_states[layer][0].detach()
        return states[-1] if pooling == "last" else states.mean(dim=0)

    def cosines(example_format):
        return [
            torch.cosine_similarity(*(state(example, i) for i in pair), dim=0).item()
            for example in (example_format.example(chat, tokenizer) for chat in chats)
            for pair in example.pairs
        ]

    views = dataclasses.replace(trained, pred_ids=(), direction="text_to_code")
    assert found["text_code_cosines"] == pytest.approx(cosines(views), abs=1e-5)
    if trained.pred_ids:
        predicted = sorted(found["pred_code_cosines"])
        assert predicted == pytest.approx(sorted(cosines(trained)), abs=1e-5)


def test_layers_that_there_are(checkpoints, tmp_path, capsys):
    options = ["--data", checkpoints / "data.jsonl", "--output-dir", tmp_path]
    for layer in (3, -4):
        assert analyze(checkpoints / "base", *options, "--layer", layer) == 2
        assert f"layer must be from -3 to 2, got {layer}" in capsys.readouterr().err


def test_cosines_of_right_and_wrong_answers(checkpoints, tmp_path, capsys):
    data, answers = checkpoints / "data.jsonl", tmp_path / "answers.jsonl"
    names = [str(checkpoints / name) for name in ("base", "plain")]
    words = ["--data", str(data), "--output", str(answers)]
    assert cli.main(["evaluate", *names, *words]) == 2
    assert "--rule must be given for checkpoints of several formats" in capsys.readouterr().err
    assert cli.main(["evaluate", *names, *words, "--rule", "exact"]) == 0
    assert "judged by --rule exact" in capsys.readouterr().out
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    for line in lines:
        line["correct"] = line["index"] in (1, 4)
    lines = [line for line in lines if line["index"]]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--data", data, "--output-dir", tmp_path, "--answers", answers]
    assert analyze(*names, *options) == 0
    table = capsys.readouterr().out
    for found in analysed(tmp_path):
        assert found["right"] == [None, True, False, False, True, False, False]
        cosines = found["text_code_cosines"]
        assert found["right_text_code_cosine"] == pytest.approx((cosines[1] + cosines[4]) / 2)
        wrong = [cosines[i] for i in (2, 3, 5, 6)]
        assert found["wrong_text_code_cosine"] == pytest.approx(np.mean(wrong))
        assert f"{found['wrong_text_code_cosine']:.4f}" in table
    assert analyze(f"{names[0]}/", *options) == 0
    capsys.readouterr()
    assert analyze(checkpoints / "chat", *options) == 2
    assert "has no answers of" in capsys.readouterr().err
    made_with = answers.with_suffix(".report.json")
    report = json.loads(made_with.read_text())
    for each in report["checkpoints"].values():
        each["settings"]["weights"] = "others"
    before = made_with.read_text()
    made_with.write_text(json.dumps(report))
    assert analyze(*names, *options) == 2
    assert "gave with other weights" in capsys.readouterr().err
    # The same weights look otherwise in another dtype.
    assert analyze(*names, *options, "--dtype", "bfloat16") == 0
    made_with.write_text(before)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in grammar.generate(7, seed=99)))
    assert analyze(*names, "--data", other, *options[2:]) == 2
    assert (
        "answers.jsonl:1 is no prediction: answer is not that of sample" in capsys.readouterr().err
    )
    answers.write_text("{}\n")
    assert analyze(*names, *options) == 2
    assert "answers.jsonl:1 is no prediction" in capsys.readouterr().err


def test_fewer_samples(checkpoints, tmp_path):
    options = ["--samples", 3, "--data", checkpoints / "data.jsonl", "--output-dir", tmp_path]
    assert analyze(checkpoints / "base", *options) == 0
    (numbers,) = json.loads((tmp_path / "analysis.json").read_text())["checkpoints"]
    assert len(numbers["singular_values"]) == len(numbers["text_code_cosines"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["base", "base"], "expected different checkpoints"),
        (list("abcdefg"), "expected 1 to 6 checkpoints, got 7"),
        (["base", "--samples", "1"], "--samples must be at least 2, got 1"),
        (["base", "--data", "none.jsonl"], "none.jsonl"),
        (
            [".", "--data", "data.jsonl"],
            "no model in '.': expected a config.json, which is in base",
        ),
        (["none.gguf"], "no file 'none.gguf'"),
        (["base", "--seed", "1"], "unknown options --seed 1: see llmjepa analyze --help"),
    ],
)
def test_mistakes_are_named(checkpoints, monkeypatch, capsys, options, message):
    monkeypatch.chdir(checkpoints)
    assert analyze("--data", "data.jsonl", "--output-dir", "never", *options) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("llmjepa analyze: error: ")
    assert message in error
    assert not (checkpoints / "never").exists()


def test_a_sample_that_does_not_fit_is_named_with_the_checkpoint(checkpoints, tmp_path, capsys):
    directory = tmp_path / "no-template"
    AutoModelForCausalLM.from_pretrained(checkpoints / "base").save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    data = checkpoints / "data.jsonl"
    assert analyze(directory, "--data", data, "--output-dir", tmp_path / "out") == 2
    assert f"{directory}: sample 0: the tokenizer has no chat template" in capsys.readouterr().err


def test_missing_package_is_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else name
    )
    assert analyze("x", "--data", "y") == 2
    expected = "scikit-learn is missing: pip install 'llmjepa_kernels[analyze]'"
    assert expected in capsys.readouterr().err


def test_names_are_as_long_as_it_takes():
    assert short_names(["out/a", "out/Llama-3.2-1B", "x/y.gguf"]) == ["a", "Llama-3.2-1B", "y"]
    assert short_names(["one/llm-jepa", "two/llm-jepa"]) == ["one/llm-jepa", "two/llm-jepa"]
    assert short_names(["a/x", "x"]) == ["a/x", "x"]
