"""What `llmjepa train` takes where nothing is given, and the recipe of the authors."""

from __future__ import annotations

from typing import Any

TRAIN_SAMPLES = 4000  # built-in ones
SMALL_LLAMA = {"hidden_size": 192, "num_layers": 4}
SEPARATOR = "<|separator|>"
VOCAB_MULTIPLE = 64  # rows of the embeddings, for the matrix products of GPUs
# Where the defaults are not those of TrainingArguments.
COMMON: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "logging_steps": 0.02,  # 50 points, however long the training
    "report_to": "none",
    "logging_nan_inf_filter": False,  # which would log a mean in place of NaN
    "use_cache": True,  # of the saved checkpoint; training never uses it
}
SCRATCH: dict[str, Any] = {
    "learning_rate": 2e-3,
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.05,
    "save_strategy": "no",  # of intermediate checkpoints
}
FINE_TUNE: dict[str, Any] = {
    "learning_rate": 2e-5,
    "num_train_epochs": 4.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "warmup_steps": 0.03,
    "save_steps": 500,
}
# The recipe that the authors' finetune.py has by default: three separate sequences, each padded to
# 512 tokens there, and the labels that its collator makes.
AUTHORS: dict[str, Any] = {
    "layout": "official",
    "embedding_token": "-1",
    "add_special_tokens": True,
    "max_sequence_length": 512,
    "max_length_policy": "truncate",
    "supervise": "released",
    "num_pred_tokens": 0,
    "jepa_weight": 0.1,
    "learning_rate": 2e-5,
    "epochs": 3.0,
    "batch_size": 4,
    "gradient_accumulation_steps": 4,
    "dtype": "bfloat16",
    "bf16": True,
    "other": (
        *("--lr-scheduler-type", "linear", "--warmup-steps", "0"),
        *("--dataloader-drop-last", "True"),
    ),
}
