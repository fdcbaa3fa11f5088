"""The trainer on a GPU, in bfloat16, as `llmjepa train --bf16` runs it."""

import pytest
import torch
from transformers import TrainingArguments

from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.grammar import generate
from llmjepa_kernels.data.predictor_tokens import add_predictor_tokens
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import small_llama
from llmjepa_kernels.training.collator import LLMJEPACollator
from llmjepa_kernels.training.trainer import LLMJEPATrainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(directory, steps, *, compiled=False):
    """Losses of each step, and the weights at the end."""
    chats = generate(64, seed=0)
    tokenizer = train_tokenizer(chats, vocab_size=300)
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden_size=64, num_layers=1)
    form = ExampleFormat(pred_ids=add_predictor_tokens(model, tokenizer, 1))
    arguments = TrainingArguments(
        str(directory),
        use_cpu=DEVICE == "cpu",
        bf16=DEVICE != "cpu",
        torch_compile=compiled,
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    collator = LLMJEPACollator(tokenizer, form)
    trainer = LLMJEPATrainer(model, arguments, train_dataset=chats, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [p.detach().cpu() for p in model.parameters()]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_it_learns(tmp_path, compiled):
    losses, _ = train(tmp_path, 30, compiled=compiled)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.gpu
def test_two_runs_give_the_same_bits(tmp_path):
    first, second = (train(tmp_path / str(i), 8) for i in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
