"""`llmjepa evaluate`: the accuracy of checkpoints, in and out of distribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging

from llmjepa_kernels.cli.checkpoint import load_checkpoint
from llmjepa_kernels.cli.device import chosen_device
from llmjepa_kernels.cli.evaluate_options import EvaluateOptions
from llmjepa_kernels.cli.fingerprints import data_fingerprint, weights_fingerprint
from llmjepa_kernels.cli.held_out import check_answers, chosen_rule, held_out_samples
from llmjepa_kernels.cli.prediction_file import PredictionFile
from llmjepa_kernels.cli.progress import bars
from llmjepa_kernels.cli.report import plain_text
from llmjepa_kernels.cli.say import say
from llmjepa_kernels.cli.shared_options import EVAL_SAMPLES
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.splits import Split
from llmjepa_kernels.evaluation.predict import Accuracy, Prediction, accuracies, predict
from llmjepa_kernels.evaluation.rules import RULE_OF_RECIPE, Rule
from llmjepa_kernels.hf.load import check_model


def evaluate(options: EvaluateOptions) -> None:
    """Checks and loads all but the models at first, then evaluates one after the other.

    Raises:
        ValueError: An option or a sample is wrong, or ``--output`` belongs to something else.
        OSError: A file or a model is not there.
    """
    evaluation = Evaluation.prepare(options)
    logging.disable_progress_bar()  # of reading weights
    with evaluation.file or nullcontext():
        for name in options.checkpoints[1:]:  # the first one is loaded next
            check_model(name, trust_remote_code=options.trust_remote_code)
        results: dict[str, dict[str, Accuracy]] = {}
        try:
            for name in options.checkpoints:
                results[name] = evaluation.run(name)
        finally:  # of those that are through, if another one fails
            if results:
                print(format_accuracies(results, evaluation.split), end="")
                print(f"judged by --rule {evaluation.rule.name}")
    if evaluation.file is not None:
        file = evaluation.file
        print(f"Predictions: {file.path}, settings and results: {file.report_path}")
    print(f"next: llmjepa generate {options.checkpoints[-1]}")


@dataclass(frozen=True)
class Evaluation:
    """What all checkpoints are asked, and where their answers go."""

    options: EvaluateOptions
    device: torch.device
    samples: list[dict[str, Any]]
    places: list[str]
    rule: Rule
    split: Split | None
    file: PredictionFile | None

    @classmethod
    def prepare(cls, options: EvaluateOptions) -> Evaluation:
        """Reads the data and checks all of it; raises as `evaluate` does."""
        device = chosen_device(options.device)
        given = options.rule or RULE_OF_RECIPE.get(options.recipe or "")
        rule = chosen_rule(
            options.rule,
            recipe=options.recipe,
            template="chat" if given else _template(options.checkpoints),
            databases=options.databases,
        )
        split = None if options.split is None else Split.parse(options.split)
        say(f"reading {options.data or 'the built-in held-out pairs'}")
        located = held_out_samples(
            options.data,
            recipe=options.recipe,
            count=options.samples or (EVAL_SAMPLES if options.data is None else None),
            seed=options.seed,
            split=split,
        )
        check_answers(located, rule, split)
        samples = [sample for _, sample in located]
        file = None
        if options.output is not None:
            settings = {
                "data": data_fingerprint(samples),
                "samples": len(samples),
                "rule": rule.name,
                "max_new_tokens": options.max_new_tokens,
                "dtype": options.dtype,
                "load_in": options.load_in,
            }
            file = PredictionFile(options.output, settings, samples, rule)
        places = [place for place, _ in located]
        return cls(options, device, samples, places, rule, split, file)

    def run(self, name: str) -> dict[str, Accuracy]:
        """Has one checkpoint answer what it has not answered yet."""
        say(f"loading {name}")
        model, tokenizer = load_checkpoint(name, self.options, self.device)
        example_format = ExampleFormat.load(name)
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
            max_new_tokens=self.options.max_new_tokens,
            batch_size=self.options.batch_size,
            done=frozenset(done),
            places=self.places,
        )
        with bars() as progress:
            task = progress.add_task(name, total=len(self.samples), note="")
            try:
                while True:
                    correct = f"{accuracies(done.values(), self.samples)['all'].value:.1%}"
                    progress.update(task, completed=len(done), note=correct if done else "")
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

    def _interrupted(self, count: int) -> NoReturn:
        message = f"interrupted after {count} of {len(self.samples)}"
        if self.file is not None:
            message += f", which are in {self.file.path}: the same command goes on from there"
        raise KeyboardInterrupt(message) from None


def format_accuracies(results: dict[str, dict[str, Accuracy]], split: Split | None) -> str:
    """A line per checkpoint and part of the data, in plain text."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("checkpoint", overflow="fold")
    table.add_column("samples" if split is None else f"samples, split {split}")
    for header in ("accuracy", "95 % interval", "correct", "do not end"):
        table.add_column(header, justify="right")
    for name, parts in results.items():
        for part, accuracy in parts.items():
            low, high = accuracy.interval()
            table.add_row(
                escape(name),
                part.replace("_", " "),
                f"{accuracy.value:.1%}" if accuracy.total else "-",
                f"{low:.1%} to {high:.1%}" if accuracy.total else "-",
                f"{accuracy.correct} / {accuracy.total}",
                str(accuracy.unfinished),
            )
    return plain_text(table)


def _as_json(found: dict[str, Accuracy]) -> dict[str, dict[str, Any]]:
    return {
        part: {
            "correct": accuracy.correct,
            "total": accuracy.total,
            "unfinished": accuracy.unfinished,
            "accuracy": accuracy.value if accuracy.total else None,
            "interval_95": accuracy.interval(),
        }
        for part, accuracy in found.items()
    }


def _plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give them back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _template(checkpoints: Sequence[str]) -> str:
    """The template that checkpoints were trained with; "chat" where nothing says so.

    Raises:
        ValueError: They were trained with different ones.
    """
    templates = {
        name: ExampleFormat.load(name).template if Path(name).is_dir() else "chat"
        for name in checkpoints
    }
    if len(set(templates.values())) > 1:
        raise ValueError(
            "--rule must be given for checkpoints of several formats, by which it is chosen: "
            + ", ".join(f"{name} is {template}" for name, template in templates.items())
        )
    return templates[checkpoints[0]]
