"""What the trainer's means are over: pairs or tubes, and the updates that have some."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.example import without_views
from llmjepa_kernels.training.objective import llm_jepa_loss
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from llmjepa_kernels.tubes import TubeSampler
from tests.training.test_trainer import ROWS, arguments, build


@pytest.fixture
def tokenizer():
    return train_tokenizer(ROWS, vocab_size=300)


def drawn(collator, count):
    """Examples with i + 1 tubes."""
    examples = [collator.example(row) for row in ROWS[:count]]
    return [
        replace(x, tubes=TubeSampler(count=1 + i).draw(x.path, [i])) for i, x in enumerate(examples)
    ]


def test_updates_without_tubes_or_without_pairs_do_not_count(tokenizer, tmp_path):
    _, collator = build(tokenizer)
    data = [without_views(x) for x in drawn(collator, 8)]  # tubes, and no pairs
    data += [collator.example(row) for row in ROWS[8:16]]  # the reverse
    histories = []
    for steps in (1, 2):
        model, _ = build(tokenizer)
        options = arguments(
            tmp_path, max_steps=2, logging_steps=steps, train_sampling_strategy="sequential"
        )
        trainer = LLMJEPATrainer(model, options, collator, train_dataset=data, stp_weight=0.5)
        trainer.train()
        histories.append(trainer.state.log_history)
    (first, second, *_), (both, *_) = histories
    assert "stp_loss" not in second
    assert "jepa_loss" not in first
    assert both["stp_loss"] == pytest.approx(first["stp_loss"], rel=1e-4)
    assert both["jepa_loss"] == pytest.approx(second["jepa_loss"], rel=1e-4)


def test_an_evaluation_is_over_tubes(tokenizer, tmp_path):
    model, collator = build(tokenizer)
    data = drawn(collator, 6)
    options = arguments(tmp_path, per_device_eval_batch_size=2)
    trainer = LLMJEPATrainer(model, options, collator, eval_dataset=data, stp_weight=0.5)
    batch = collator(data)
    del batch["sft_tokens"]
    expected = llm_jepa_loss(model, batch, stp_weight=0.5)
    assert trainer.evaluate()["eval_stp_loss"] == pytest.approx(expected.stp_loss.item(), rel=1e-5)
