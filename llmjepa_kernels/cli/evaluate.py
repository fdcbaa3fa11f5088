"""`llmjepa evaluate`: the accuracy of checkpoints, in and out of distribution."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from itertools import islice
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging

from llmjepa_kernels.cli.options import EVAL_SAMPLES
from llmjepa_kernels.cli.prediction_file import (
    PredictionFile,
    data_fingerprint,
    weights_fingerprint,
)
from llmjepa_kernels.cli.report import plain_text
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.samples import read_chats
from llmjepa_kernels.data.splits import Split
from llmjepa_kernels.evaluation.predict import Accuracy, Prediction, accuracies, predict
from llmjepa_kernels.evaluation.rules import RULE_OF_RECIPE, answer_rule
from llmjepa_kernels.hf.load import load_pretrained


class EvaluateJob:
    """One ``llmjepa evaluate``: checks and loads all but the models at first.

    Args:
        args: The options, see ``llmjepa evaluate --help``.
    Raises:
        ValueError: An option or a sample is wrong, or ``--output`` belongs to something else.
        OSError: A file or a model is not there.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        for name in ("samples", "batch_size", "max_new_tokens"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if repeated := {name for name in args.checkpoints if args.checkpoints.count(name) > 1}:
            raise ValueError(f"checkpoints must differ, got {', '.join(repeated)} more than once")
        self.device = _device(args.device)
        self.rule = answer_rule(
            args.rule or RULE_OF_RECIPE.get(args.recipe, "exact"), databases=args.databases
        )
        self.split = None if args.split is None else Split.parse(args.split)
        self.samples = self._samples()
        for index, sample in enumerate(self.samples):
            try:
                self.rule.check(sample)
                if self.split is not None:
                    self.split.is_out_of_distribution(sample)
            except ValueError as error:
                place = args.data or "the built-in data"
                raise ValueError(f"sample {index} of {place}: {error}") from error
        self.file = None
        if args.output is not None:
            settings = {
                "data": data_fingerprint(self.samples),
                "samples": len(self.samples),
                "rule": self.rule.name,
                "max_new_tokens": args.max_new_tokens,
                "dtype": "bfloat16" if args.bf16 else "float32",
            }
            self.file = PredictionFile(args.output, settings)

    def _samples(self) -> list[dict[str, Any]]:
        args = self.args
        if args.data is None:
            if args.recipe is not None:
                raise ValueError(f"--recipe {args.recipe} needs --data")
            max_depth = 2  # as `llmjepa train` has it
            if self.split is not None and self.split.kind == "depth":
                max_depth = max(max_depth, self.split.value + 1)
            count = args.samples or EVAL_SAMPLES
            return grammar.generate(count, seed=args.seed, split="heldout", max_depth=max_depth)
        samples = list(islice(read_chats(args.data, recipe=args.recipe), args.samples))
        if not samples:
            raise ValueError(f"--data {args.data} has no samples")
        return samples

    def run(self) -> None:
        """Evaluates one checkpoint after the other and prints a table of them."""
        logging.disable_progress_bar()  # of reading weights
        results = {name: self._evaluate(name) for name in self.args.checkpoints}
        print(format_accuracies(results, self.split), end="")
        if self.file is not None:
            print(f"Predictions: {self.file.path}, settings and results: {self.file.report_path}")

    def _evaluate(self, name: str) -> dict[str, Accuracy]:
        model, tokenizer = load_pretrained(name)
        model.to(self.device, torch.bfloat16 if self.args.bf16 else torch.float32)
        example_format = ExampleFormat.load(name, tokenizer)
        done: dict[int, Prediction] = {}
        if self.file is not None:
            settings = {
                "weights": weights_fingerprint(model),
                "format": _plain_values(dataclasses.asdict(example_format)),
            }
            done = self.file.open_checkpoint(name, settings)
        batches = predict(
            model,
            tokenizer,
            self.samples,
            example_format,
            self.rule,
            max_new_tokens=self.args.max_new_tokens,
            batch_size=self.args.batch_size,
            done=frozenset(done),
        )
        with _progress() as progress:
            task = progress.add_task(name, total=len(self.samples), correct="")
            try:
                while True:
                    correct = f"{accuracies(done.values(), self.samples)['all'].value:.1%}"
                    progress.update(task, completed=len(done), correct=correct if done else "")
                    batch = next(batches, None)
                    if batch is None:
                        break
                    if self.file is not None:
                        self.file.append(name, batch)
                    done |= {prediction.index: prediction for prediction in batch}
            except KeyboardInterrupt:
                progress.stop()
                self._interrupted(len(done))
        found = accuracies(done.values(), self.samples, self.split)
        if self.file is not None:
            split = None if self.split is None else str(self.split)
            self.file.report(name, {"split": split, "accuracy": _as_json(found)})
        return found

    def _interrupted(self, count: int) -> None:
        message = f"interrupted after {count} of {len(self.samples)}"
        if self.file is not None:
            message += f", which are in {self.file.path}: the same command goes on from there"
        print(message, file=sys.stderr)
        raise SystemExit(130)


def format_accuracies(results: dict[str, dict[str, Accuracy]], split: Split | None) -> str:
    """A line per checkpoint and part of the data, in plain text."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("checkpoint", overflow="fold")
    table.add_column("samples" if split is None else f"samples, split {split}")
    for header in ("accuracy", "95 % interval", "correct"):
        table.add_column(header, justify="right")
    for name, parts in results.items():
        for part, accuracy in parts.items():
            low, high = accuracy.interval()
            table.add_row(
                name,
                part.replace("_", " "),
                f"{accuracy.value:.1%}" if accuracy.total else "-",
                f"{low:.1%} to {high:.1%}" if accuracy.total else "-",
                f"{accuracy.correct} / {accuracy.total}",
            )
    return plain_text(table)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[correct]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _as_json(found: dict[str, Accuracy]) -> dict[str, dict[str, Any]]:
    return {
        part: {
            "correct": accuracy.correct,
            "total": accuracy.total,
            "accuracy": accuracy.value if accuracy.total else None,
            "interval_95": accuracy.interval(),
        }
        for part, accuracy in found.items()
    }


def _plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give them back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _device(name: str | None) -> torch.device:
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error
