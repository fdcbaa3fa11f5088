"""Checkpoints that are cut off, and a disk that is full."""

import json
import resource
from contextlib import ExitStack, contextmanager

import pytest
import torch
from transformers import TrainerCallback

from llmjepa_kernels.files import write_whole
from llmjepa_kernels.training.checkpoints import (
    MANIFEST,
    checkpoints,
    mark_complete,
    why_incomplete,
)
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from tests.training.test_trainer import ROWS, arguments, build, tokenizer  # noqa: F401


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "checkpoint-7"
    (directory / "shards").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "shards" / "0.bin").write_bytes(b"shard")
    return directory


def test_complete_or_what_is_missing(checkpoint):
    assert why_incomplete(checkpoint) == f"it has no {MANIFEST}: saving it was interrupted"
    mark_complete(checkpoint)
    assert why_incomplete(checkpoint) is None
    (checkpoint / "shards" / "0.bin").write_bytes(b"shar?")
    assert why_incomplete(checkpoint) == "shards/0.bin has other content than was saved"
    (checkpoint / "shards" / "0.bin").write_bytes(b"sha")
    assert why_incomplete(checkpoint) == "shards/0.bin has 3 bytes instead of 5"
    (checkpoint / "shards" / "0.bin").unlink()
    assert why_incomplete(checkpoint) == "shards/0.bin is missing"
    (checkpoint / MANIFEST).write_text("{")
    assert why_incomplete(checkpoint).startswith(f"{MANIFEST} is corrupt: ")


def test_the_latest_comes_first(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "adapter"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert checkpoints(tmp_path / "none") == []


@contextmanager
def full_disk():
    """Inside, no file can grow beyond a few bytes: writes fail as on a full disk.

    That holds for pytest's own output too, so leave before the test ends.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_earlier_checkpoint(tokenizer, tmp_path):  # noqa: F811
    with ExitStack() as stack:

        class FillDisk(TrainerCallback):
            def on_save(self, *args, **kwargs):
                stack.enter_context(full_disk())

        model, collator = build(tokenizer)
        args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        args.save_total_limit = 1
        trainer = LLMJEPATrainer(model, args, collator, train_dataset=ROWS, callbacks=[FillDisk()])
        with pytest.raises(OSError, match="checkpoint-2 could not be saved: "):
            trainer.train()
    second, first = checkpoints(tmp_path)
    assert why_incomplete(first) is None
    assert why_incomplete(second)


def test_only_the_last_checkpoints_are_kept(tokenizer, tmp_path):  # noqa: F811
    model, collator = build(tokenizer)
    args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    args.save_total_limit = 2
    LLMJEPATrainer(model, args, collator, train_dataset=ROWS).train()
    found = checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-3", "checkpoint-2"]
    assert [why_incomplete(path) for path in found] == [None, None]
    assert (found[0] / "llm_jepa.json").is_file()
    assert torch.load(found[0] / "training_args.bin", weights_only=False).max_steps == 3


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "report.json"
    write_whole(path, json.dumps("old"))
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write_whole(path, "x" * 10_000)
    assert json.loads(path.read_text()) == "old"
    assert list(tmp_path.iterdir()) == [path]
