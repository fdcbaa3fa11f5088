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
