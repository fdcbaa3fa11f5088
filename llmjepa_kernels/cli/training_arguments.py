"""Transformers' arguments of one run: the defaults and options of `llmjepa train`, all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from llmjepa_kernels.cli.train_options import TrainOptions


def training_arguments(options: TrainOptions, directory: Path, seed: int) -> TrainingArguments:
    """The arguments of a run.

    Args:
        options: Of the command.
        directory: Of the run's checkpoints.
        seed: Of weights and order.

    Raises:
        ValueError: One of ``options.other`` is unknown, wrong or not supported.
    """
    parser = _Parser(TrainingArguments, allow_abbrev=False)  # type: ignore[arg-type]
    parser.set_defaults(
        use_cpu=not (torch.cuda.is_available() or torch.xpu.is_available()),
        **options.training_arguments,
        output_dir=str(directory),
        seed=seed,
    )
    arguments: Any
    arguments, unknown = parser.parse_args_into_dataclasses(
        list(options.other), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown options {' '.join(unknown)}: see llmjepa train --help")
    if arguments.resume_from_checkpoint is not None:
        raise ValueError("--resume-from-checkpoint is not supported: use --resume")
    return arguments


class _Parser(HfArgumentParser):
    """Raises on a mistake, instead of writing the usage of all options and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
