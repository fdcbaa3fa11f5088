"""Transformers' arguments of one run: the defaults and options of `llmjepa train`, all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

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
    kinds: Any = TrainingArguments
    parser = _Parser(kinds, allow_abbrev=False, add_help=False)
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
    at_once = arguments.train_batch_size * arguments.world_size
    if options.metric == "infonce" and at_once < 2:
        raise ValueError(
            "--metric infonce contrasts the examples of a batch with each other: --batch-size must "
            f"be at least 2, got {at_once}"
        )
    return arguments


def check_services(arguments: TrainingArguments) -> None:
    """Raises a ValueError or an OSError if what a run is to report to is not there."""
    reports = set(arguments.report_to or ()) - {"none"}
    if missing := sorted(reports - set(get_available_reporting_integrations())):
        raise ValueError(f"--report-to {missing[0]} needs a package that is not installed")
    if arguments.push_to_hub:
        try:
            HfApi(token=arguments.hub_token).whoami()
        except Exception as error:  # of the network, or of the hub
            reason = " ".join(str(error).split())
            raise OSError(f"--push-to-hub: no access to the hub: {reason}") from error


class _Parser(HfArgumentParser):
    """Raises on a mistake, instead of writing the usage of all options and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
