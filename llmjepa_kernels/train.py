"""`llmjepa train`: fine-tunes or pretrains with LLM-JEPA, by default on built-in data."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llmjepa_kernels.example_format import ExampleFormat
    from llmjepa_kernels.packing import Example

# Transformers takes seconds to import: everything that needs it is imported when it is needed,
# so that --help and mistakes in the options answer at once.

# Options of TrainingArguments that differ from its own defaults.
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
TRAIN_SAMPLES, EVAL_SAMPLES = 4000, 200


class Job:
    """One ``llmjepa train``: checks and loads everything at first, then trains.

    Raises:
        ValueError: An option or a sample is wrong.
        OSError: A file or a model is not there.
    """

    def __init__(self, args: argparse.Namespace, rest: list[str]):
        self.args, self.rest = args, rest
        self._check_options()
        self._training_arguments("check")
        self.train_samples, self.eval_samples = self._samples()
        self._built = self._build()
        self.train_examples = self._examples(self.train_samples, args.data)
        self.eval_examples = self._examples(self.eval_samples, args.eval_data)

    def run(self) -> None:
        """Trains, evaluates and saves each model, and reports on them together."""
        from transformers.utils import logging

        from llmjepa_kernels.report import write_report

        logging.disable_progress_bar()  # of reading and writing weights
        names = ["NTP only", "LLM-JEPA"] if self.args.compare else ["LLM-JEPA"]
        runs = []
        for name in names:
            runs.append(self._run(name, views=name == "LLM-JEPA"))
        if None not in runs:  # in the main process
            print("\n" + write_report(runs, self.args.output_dir))
            print(f"Checkpoints, report.txt, report.json and report.png: {self.args.output_dir}/")

    def _check_options(self) -> None:
        args = self.args
        for name in ("train_samples", "eval_samples", "max_length", "lora_rank"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if args.num_pred_tokens < 0:
            raise ValueError(f"--num-pred-tokens must be 0 or more, got {args.num_pred_tokens}")
        if not 0 <= args.loss_dropout <= 1:
            raise ValueError(f"--loss-dropout must be from 0 to 1, got {args.loss_dropout}")
        if args.compare is None:
            args.compare = args.model is None

    def _training_arguments(self, directory: str):
        """Transformers' options of one run: this module's defaults, its options, all others."""
        import torch
        from transformers import HfArgumentParser, TrainingArguments

        args = self.args
        parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)
        parser.error = _refuse  # instead of the usage of all its options
        parser.set_defaults(**COMMON, **(FINE_TUNE if args.model else SCRATCH))
        parser.set_defaults(use_cpu=not (torch.cuda.is_available() or torch.xpu.is_available()))
        known = {action.dest for action in parser._actions}
        given = {k: v for k, v in vars(args).items() if k in known and v is not None}
        parser.set_defaults(**given | {"output_dir": str(args.output_dir / directory)})
        parsed, unknown = parser.parse_args_into_dataclasses(
            self.rest, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise ValueError(f"unknown options {' '.join(unknown)}: see llmjepa train --help")
        if parsed.resume_from_checkpoint is not None:
            raise ValueError("--resume-from-checkpoint is not supported: use --resume")
        return parsed

    def _samples(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The chats to train on and to evaluate with."""
        from llmjepa_kernels import data, grammar

        args = self.args
        if args.data is not None:
            train = list(islice(data.read_chats(args.data), args.train_samples))
        else:
            train = grammar.generate(args.train_samples or TRAIN_SAMPLES, seed=args.seed)
        if not train:
            raise ValueError(f"--data {args.data} has no samples")
        held_out = []
        if args.eval_data is not None:
            held_out = list(islice(data.read_chats(args.eval_data), args.eval_samples))
        elif args.data is None:
            held_out = grammar.generate(args.eval_samples, seed=args.seed, split="heldout")
        return train, held_out

    def _build(self):
        """The model before training, its tokenizer and format: the same at every call."""
        from transformers import set_seed

        from llmjepa_kernels import models
        from llmjepa_kernels.data import train_tokenizer
        from llmjepa_kernels.predictor_tokens import add_predictor_tokens

        args = self.args
        set_seed(args.seed)
        if args.model is not None:
            model, tokenizer = models.load_pretrained(args.model)
        else:
            tokenizer = train_tokenizer(self.train_samples)
            model = models.small_llama(tokenizer)
        pred_ids = add_predictor_tokens(model, tokenizer, args.num_pred_tokens, seed=args.seed)
        if args.lora_rank is not None:
            model = models.add_lora(model, args.lora_rank, pred_ids=pred_ids)
        return model, tokenizer, self._format(pred_ids)

    def _examples(self, samples: list[dict[str, Any]], source: str | None) -> list[Example]:
        """Tokenized once, and checked before hours of training depend on it."""
        from llmjepa_kernels.packing import pack

        _, tokenizer, example_format = self._built
        limit = self.args.max_length
        examples = []
        for index, sample in enumerate(samples):
            try:
                example = example_format.example(sample, tokenizer)
                if limit and sum(len(s.input_ids) for s in example.segments) > limit:
                    row = pack([example], share_prefixes=self.args.share_prefixes)
                    size = row["input_ids"].shape[1]
                    if size > limit:
                        raise ValueError(f"it takes {size} tokens, more than --max-length {limit}")
            except ValueError as error:
                raise ValueError(f"{_place(source, index)}: {error}") from error
            examples.append(example)
        return examples

    def _format(self, pred_ids: Sequence[int]) -> ExampleFormat:
        from llmjepa_kernels.example_format import ExampleFormat

        args = self.args
        return ExampleFormat(
            layout=args.layout,
            direction=args.direction,
            pred_position=args.pred_position,
            pred_ids=pred_ids,
        )

    def _run(self, name: str, *, views: bool) -> dict[str, Any] | None:
        """Trains one model; what there is to report in the main process, None in others."""
        from transformers.trainer_callback import ProgressCallback
        from transformers.trainer_utils import get_last_checkpoint

        from llmjepa_kernels.evaluate import evaluate
        from llmjepa_kernels.loss_dropout import LossDropout
        from llmjepa_kernels.trainer import LLMJEPACollator, LLMJEPATrainer, ProgressBar

        args = self.args
        model, tokenizer, example_format = self._built or self._build()
        self._built = None
        collator = LLMJEPACollator(
            tokenizer,
            example_format,
            max_length=args.max_length,
            # Next-token loss alone stands for plain fine-tuning, which shares nothing.
            share_prefixes=args.share_prefixes and views,
            views=views,
        )
        trainer = LLMJEPATrainer(
            model,
            self._training_arguments(name.lower().replace(" ", "-")),
            collator,
            train_dataset=LossDropout(
                self.train_examples,
                args.loss_dropout,
                per=args.loss_dropout_per,
                seed=args.seed,
            ),
            eval_dataset=self.eval_examples or None,
            processing_class=tokenizer,
            jepa_weight=args.jepa_weight,
            metric=args.metric,
            temperature=args.temperature,
            detach_target=args.detach_target,
        )
        if trainer.is_world_process_zero():
            parameters, trained = (n / 1e6 for n in _count_parameters(model))
            print(
                f"\n{name}: {len(self.train_examples)} examples, {parameters:.1f} M parameters, "
                f"{trained:.1f} M of them trained",
                flush=True,
            )
        if trainer.pop_callback(ProgressCallback):
            trainer.add_callback(ProgressBar)
        directory = trainer.args.output_dir
        resumed = self.args.resume and Path(directory).is_dir() and get_last_checkpoint(directory)
        metrics = trainer.train(resume_from_checkpoint=resumed or None).metrics
        if self.eval_examples:
            metrics |= trainer.evaluate()
        self._save(trainer)
        if not trainer.is_world_process_zero():
            return None
        history = trainer.state.log_history
        metrics |= self._summary([log for log in history if "tokens_per_step" in log])
        if rate := metrics["train_samples_per_second"]:  # 0 where a finished run was resumed
            metrics["seconds_per_example"] = 1 / rate
        cosines = []
        if self.eval_examples:
            model = trainer.accelerator.unwrap_model(trainer.model)
            cosines = self._view_cosines(model, LLMJEPACollator(tokenizer, example_format))
            metrics["pair_cosine"] = mean(cosines)
            without_pred = LLMJEPACollator(tokenizer, replace(example_format, pred_ids=()))
            metrics["view_cosine"] = mean(self._view_cosines(model, without_pred))
            predictions = evaluate(model, tokenizer, self.eval_samples, example_format)
            metrics["exact_match"] = mean(prediction.correct for prediction in predictions)
        return {"name": name, "metrics": metrics, "history": history, "cosines": cosines}

    def _summary(self, logs: list[dict[str, float]]) -> dict[str, float]:
        """The last losses, and what an example costs."""
        from llmjepa_kernels.trainer import chat_tokens

        tokens = sum(log["tokens_per_step"] for log in logs)
        cost = tokens / sum(log["tokens_per_step"] / log["relative_cost"] for log in logs)
        return {
            "loss": logs[-1]["loss"],
            "ntp_loss": logs[-1]["ntp_loss"],
            "relative_cost": cost,
            "tokens_per_example": cost * mean(map(chat_tokens, self.train_examples)),
        }

    def _save(self, trainer) -> None:
        """A checkpoint for ``AutoModelForCausalLM.from_pretrained``, LoRA merged into it."""
        directory = Path(trainer.args.output_dir)
        if self.args.lora_rank is None:
            trainer.save_model()
            return
        trainer.save_model(str(directory / "adapter"))
        if trainer.is_world_process_zero():
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            merged.save_pretrained(directory)
            trainer.processing_class.save_pretrained(directory)
            trainer.data_collator.example_format.save(directory)
            trainer.model = merged

    def _view_cosines(self, model, collator) -> list[float]:
        """The cosine of every held-out pair as `collator` makes them."""
        from torch.nn.functional import cosine_similarity

        from llmjepa_kernels.analysis import view_states

        batches = (collator(chunk) for chunk in _chunks(self.eval_samples, 64))
        return cosine_similarity(*view_states(model, batches)).tolist()


def _count_parameters(model) -> tuple[int, int]:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _place(source: str | None, index: int) -> str:
    """Where a sample is from: the file and line, blank lines not being samples."""
    if source is None:
        return f"built-in sample {index}"
    with open(source, "rb") as file:
        lines = (number for number, line in enumerate(file, start=1) if line.strip())
        return f"{source}:{next(islice(lines, index, None))}"


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
