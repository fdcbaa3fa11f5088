"""`llmjepa train --dry-run`: what a run would take, from its first batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import TrainingArguments

from llmjepa_kernels.cli.packed_row import row_text, runs_of
from llmjepa_kernels.cli.training_data import LeftOut
from llmjepa_kernels.cli.training_run import TrainingRun
from llmjepa_kernels.training.next_token_loss import MAX_LOGITS
from llmjepa_kernels.training.objective import real_tokens

BATCHES = 50
GIB = 2**30
# Bytes that a layer keeps for its backward, per token and hidden unit in 16 bits, where attention
# keeps no matrix of scores: Korthikanti et al., arXiv:2205.05198, section 4.
ACTIVATIONS = 34
COPIES_OF_LOGITS = 4  # of the loss and its backward


def rehearsal(run: TrainingRun, arguments: TrainingArguments) -> str:
    """Tokens, rows, cost, padding, memory and the first row of a run that is not started."""
    with TemporaryDirectory() as folder:  # which the trainer wants to exist
        elsewhere = replace(run, record=replace(run.record, directory=Path(folder)))
        trainer = elsewhere.trainer(LeftOut(silent=True))
        batches = list(islice(trainer.get_train_dataloader(), BATCHES))
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    padding = sum(int((~real_tokens(batch)).sum()) for batch in batches)
    plain = sum(int(batch["sft_tokens"].sum()) for batch in batches)
    largest = max(batch["input_ids"].numel() for batch in batches)
    supervised = max(int((batch["labels"] >= 0).sum()) for batch in batches)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    what = f"a stream of {run.options.data}"
    if not run.options.streaming:
        what = f"{len(run.data.train)} examples"
    lines = [
        f"\n{run.record.title}: {what}, {_updates(run, arguments)} updates",
        f"of the first {len(batches)} batches: {rows / len(batches):.3g} rows and "
        f"{tokens / len(batches):,.0f} tokens each, at most {largest:,}; {padding / tokens:.1%} of "
        f"them padding; {tokens / plain:.3f} of the tokens of plain fine-tuning",
        _memory(run, largest, supervised),
        "",
        "the first row:",
        row_text(runs_of(batches[0], 0, run.start.tokenizer)),
    ]
    return "\n".join(lines)


def _updates(run: TrainingRun, arguments: TrainingArguments) -> int:
    if arguments.max_steps > 0:
        return arguments.max_steps
    at_once = arguments.per_device_train_batch_size * arguments.world_size
    whole = len(run.data.train) / at_once
    batches = int(whole) if arguments.dataloader_drop_last else ceil(whole)
    per_epoch = max(ceil(batches / arguments.gradient_accumulation_steps), 1)
    return ceil(per_epoch * arguments.num_train_epochs)


def _memory(run: TrainingRun, tokens: int, supervised: int) -> str:
    """About what the largest of the batches takes on one device, all of the model being there."""
    parameters = list(run.start.model.parameters())
    weights = sum(p.numel() * p.itemsize for p in parameters)
    trained = sum(p.numel() * p.itemsize for p in parameters if p.requires_grad)
    config = run.start.model.config.get_text_config()
    width = 2 if run.options.bf16 else parameters[0].itemsize
    activations = tokens * config.num_hidden_layers * config.hidden_size * ACTIVATIONS * width // 2
    logits = min(supervised * config.vocab_size, MAX_LOGITS) * 4 * COPIES_OF_LOGITS
    parts = {
        "weights": weights,
        "gradients and AdamW": 3 * trained,
        "activations without checkpointing": activations,
        "logits": logits,
    }
    total = sum(parts.values()) / GIB
    words = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"memory of a process, estimated: {total:.2f} GiB ({words})"
