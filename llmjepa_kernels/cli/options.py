"""Defaults of `llmjepa train`, where they differ from those of TrainingArguments."""

TRAIN_SAMPLES, EVAL_SAMPLES = 4000, 200  # the built-in ones; held-out ones of any data
COMMON = {
    "lr_scheduler_type": "cosine",
    "logging_steps": 0.02,  # 50 points, however long the training
    "report_to": "none",
    "logging_nan_inf_filter": False,  # which would log a mean in place of NaN
    "use_cache": True,  # of the saved checkpoint; training never uses it
}
SCRATCH = {
    "learning_rate": 2e-3,
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.05,
    "save_strategy": "no",  # of intermediate checkpoints
}
FINE_TUNE = {
    "learning_rate": 2e-5,
    "num_train_epochs": 4.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "warmup_steps": 0.03,
}
