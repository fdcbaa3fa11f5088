"""Checkpoints in 8 and 4 bits, through every command that only reads them."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("bitsandbytes")

from llmjepa_kernels.cli import main as cli
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf import load as models
from llmjepa_kernels.training.collator import LLMJEPACollator
from llmjepa_kernels.training.flops import FlopCount

# The relative error of logits: a product of rows in 8 bits has some 1 / 127 of noise per layer,
# NF4 has 16 values for a normal distribution, a tenth of its deviation from one to the next.
NOISE = {"8bit": 0.05, "4bit": 0.4}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    tokenizer = train_tokenizer(grammar.generate(50, seed=3), vocab_size=300)
    torch.manual_seed(0)
    model = models.small_llama(tokenizer, hidden_size=192, num_layers=2)
    model.save_pretrained(root / "model")
    adapted = models.add_lora(model, 4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = str(root / "model")
    adapted.save_pretrained(root / "adapter")
    for name in ("model", "adapter"):
        tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("load_in", NOISE)
@pytest.mark.parametrize("name", ["model", "adapter"])
def test_logits_are_near_those_of_whole_weights(checkpoints, name, load_in):
    path = str(checkpoints / name)
    whole, _ = models.load_pretrained(path)
    quantized, _ = models.load_pretrained(path, load_in=load_in)
    assert {p.dtype for p in quantized.parameters()} & {torch.int8, torch.uint8}
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        expected, found = whole(ids).logits, quantized(ids).logits
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < NOISE[load_in]


@pytest.mark.parametrize("load_in", NOISE)
def test_commands(checkpoints, tmp_path, load_in):
    name, how = str(checkpoints / "adapter"), ["--load-in", load_in]
    answers = str(tmp_path / "answers.jsonl")
    assert cli.main(["evaluate", name, "--samples", "3", "--output", answers, *how]) == 0
    report = json.loads((tmp_path / "answers.report.json").read_text())
    assert report["settings"]["load_in"] == load_in
    options = ["--samples", "4", "--output-dir", str(tmp_path)]
    assert cli.main(["analyze", name, *options, *how]) == 0
    assert cli.main(["generate", name, "--prompt", "a", "--max-new-tokens", "2", *how]) == 0


@pytest.mark.parametrize("load_in", NOISE)
def test_qlora(checkpoints, tmp_path, load_in, capsys):
    """Adapters of a quantised model are trained, resumed, and taken by the other commands."""
    options = ["--model", str(checkpoints / "model"), "--lora-rank", "4", "--load-in", load_in]
    options += ["--learning-rate", "1e-2", "--train-samples", "32", "--eval-samples", "4"]
    options += ["--batch-size", "8", "--save-steps", "4", "--output-dir", str(tmp_path)]
    assert cli.main(["train", *options, "--epochs", "1"]) == 0
    whole, _ = models.load_pretrained(str(checkpoints / "model"))
    assert f"{sum(p.numel() for p in whole.parameters()) / 1e6:.1f} M parameters" in (
        capsys.readouterr().out
    )
    assert cli.main(["train", *options, "--epochs", "2", "--resume"]) == 0
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    losses = [log["ntp_loss"] for log in run["history"] if "ntp_loss" in log]
    assert losses[-1] < losses[0] - 0.5
    adapter = str(tmp_path / "llm-jepa")
    assert models.is_adapter(adapter)
    assert cli.main(["evaluate", adapter, "--samples", "2", "--load-in", load_in]) == 0
    assert cli.main(["export", adapter, str(tmp_path / "exported"), "--merge"]) == 0
    again = ["--model", adapter, *options[2:], "--output-dir", str(tmp_path / "again")]
    assert cli.main(["train", *again]) == 2
    assert "is a LoRA adapter" in capsys.readouterr().err
    del options[4:6]  # without --load-in
    assert cli.main(["train", *options, "--max-steps", "1", "--overwrite"]) == 0
    assert not models.is_adapter(adapter)
    assert cli.main(["evaluate", adapter, "--samples", "2"]) == 0


@pytest.mark.parametrize("load_in", NOISE)
def test_flops_are_those_of_the_whole_weights(checkpoints, load_in):
    tokenizer = models.load_tokenizer(str(checkpoints / "model"))
    batch = LLMJEPACollator(tokenizer)(grammar.generate(3, seed=4))
    counts = []
    for how in (None, load_in):
        model, _ = models.load_pretrained(str(checkpoints / "model"), load_in=how)
        counts.append(FlopCount(model.requires_grad_(False))(batch, torch.tensor(30.0)))
    assert counts[0] == counts[1]
