"""TRL's SFTTrainer: three ways to LLM-JEPA, which train the same weights."""

import copy

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.grammar import generate
from llmjepa_kernels.data.predictor_tokens import add_predictor_tokens
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import small_llama
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training.collator import LLMJEPACollator
from llmjepa_kernels.training.objective import llm_jepa_loss
from llmjepa_kernels.training.trainer import LLMJEPATrainer

ROWS = Dataset.from_list(generate(32, seed=3))
UNPREPARED = {"dataset_kwargs": {"skip_prepare_dataset": True}}


class Mixed(LLMJEPATrainer, SFTTrainer):
    """As in examples/trl_sft.py."""


class OfThreeLines(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = llm_jepa_loss(
            model,
            inputs,
            jepa_weight=1 / self.args.gradient_accumulation_steps,
            num_items_in_batch=num_items_in_batch,
        )
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.fixture(scope="module")
def start():
    tokenizer = train_tokenizer(ROWS, vocab_size=300)
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden_size=64, num_layers=2)
    pred_ids = add_predictor_tokens(model, tokenizer, 1)
    return model, LLMJEPACollator(tokenizer, ExampleFormat(pred_ids=pred_ids))


def trainer(kind, start, directory, **options):
    model, collator = start
    args = SFTConfig(
        str(directory),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_steps=3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **options,
    )
    model = patch_model(copy.deepcopy(model))
    more = {"train_dataset": ROWS, "processing_class": collator.tokenizer}
    return kind(model, args, data_collator=collator, **more)


def test_all_ways_train_the_same(start, tmp_path):
    weights = []
    for kind, options in (
        (LLMJEPATrainer, {}),
        (Mixed, {}),
        (Mixed, UNPREPARED),
        (OfThreeLines, {"remove_unused_columns": False, **UNPREPARED}),
    ):
        one = trainer(kind, start, tmp_path, **options)
        one.train()
        weights.append(torch.cat([p.detach().flatten() for p in one.model.parameters()]))
    before = torch.cat([p.detach().flatten() for p in start[0].parameters()])
    assert not torch.equal(weights[0], before)
    assert all(torch.equal(weights[0], other) for other in weights[1:])


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dft"},
        *({"completion_only_loss": given} for given in (True, False)),
        {"assistant_only_loss": True},
    ],
)
def test_options_of_sft_that_would_be_ignored(start, tmp_path, options):
    with pytest.raises(ValueError, match=f"does not support {next(iter(options))} of SFTConfig"):
        trainer(LLMJEPATrainer, start, tmp_path, **options)


def test_the_weight_under_gradient_accumulation(start, tmp_path):
    """By the means of micro-batches, which add up, unless the weight is divided."""
    losses = []
    for kind in (LLMJEPATrainer, OfThreeLines):
        options = {"remove_unused_columns": False, **UNPREPARED, "gradient_accumulation_steps": 2}
        one = trainer(kind, start, tmp_path, logging_steps=1, **options)
        one.train()
        losses.append(one.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_columns_that_sft_trainer_drops(start, tmp_path):
    with pytest.raises(ValueError, match="drop that key unless remove_unused_columns=False"):
        trainer(OfThreeLines, start, tmp_path).train()
