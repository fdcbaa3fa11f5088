"""`llmjepa train`: fine-tunes or pretrains with LLM-JEPA, by default on built-in data."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NoReturn

import torch
from torch.nn.functional import cosine_similarity
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from llmjepa_kernels.cli.options import COMMON, FINE_TUNE, SCRATCH
from llmjepa_kernels.cli.report import write_report
from llmjepa_kernels.cli.run_record import RunRecord
from llmjepa_kernels.cli.training_data import TrainingData
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.predictor_tokens import add_tokens, predictor_token
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.evaluation.geometry import view_states
from llmjepa_kernels.evaluation.predict import evaluate
from llmjepa_kernels.evaluation.rules import RULE_OF_RECIPE, Rule, answer_rule
from llmjepa_kernels.hf import load as models
from llmjepa_kernels.training.checkpoints import saving
from llmjepa_kernels.training.collator import LLMJEPACollator, chat_tokens
from llmjepa_kernels.training.loss_dropout import LossDropout
from llmjepa_kernels.training.streaming import ExampleStream
from llmjepa_kernels.training.trainer import LLMJEPATrainer, ProgressBar

OBJECTIVES = {"NTP only": "ntp-only", "LLM-JEPA": "llm-jepa"}  # and their directories
# Options that change neither the weights that a run ends with nor what is measured of them.
UNRECORDED = {"command", "run", "traceback", "resume", "output_dir", "seeds", "compare"}


class Job:
    """One ``llmjepa train``: checks and loads everything at first, then trains.

    Raises:
        ValueError: An option or a sample is wrong.
        OSError: A file or a model is not there.
    """

    def __init__(self, args: Namespace, rest: list[str]):
        self.args, self.rest = args, rest
        self._check_options()
        self.seeds = args.seeds or [args.seed]
        self._training_arguments("check", self.seeds[0])
        self.data = TrainingData(args)
        self._built = model, tokenizer, example_format = self._build(self.seeds[0])
        self.data.tokenize(example_format, tokenizer, _max_positions(model))
        self.rule = self._rule()
        names = list(OBJECTIVES) if args.compare else ["LLM-JEPA"]
        self.records = [self._record(name, seed) for seed in self.seeds for name in names]
        for record in self.records:
            record.check(resume=args.resume)

    def run(self) -> None:
        """Trains, evaluates and saves each model, and reports on them together."""
        logging.disable_progress_bar()  # of reading and writing weights
        if not self.args.streaming:
            self._print_left_out()
        for record in self.records:
            if record.result is None:
                record.result = self._run(record)
            elif self._is_main:
                print(f"\n{record.title}: finished before, kept")
        if self._is_main:
            runs = [record.result for record in self.records]
            print("\n" + write_report(runs, self.args.output_dir))
            print(f"Checkpoints, report.txt, report.json and report.png: {self.args.output_dir}/")

    def _print_left_out(self) -> None:
        if self._is_main:
            for kind, count in self.data.left_out.counts().items():
                print(f"left out {count} samples: {kind}")

    def _check_options(self) -> None:
        args = self.args
        for name in (
            "train_samples",
            "eval_samples",
            "max_length",
            "lora_rank",
            "hidden_size",
            "num_layers",
            "shuffle_buffer",
        ):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"{_option(name)} must be at least 1, got {value}")
        if args.num_pred_tokens < 0:
            raise ValueError(f"--num-pred-tokens must be 0 or more, got {args.num_pred_tokens}")
        if not 0 <= args.loss_dropout <= 1:
            raise ValueError(f"--loss-dropout must be from 0 to 1, got {args.loss_dropout}")
        if args.from_scratch and args.model is None:
            raise ValueError("--from-scratch needs --model, whose architecture it takes")
        args.from_scratch |= args.model is None
        for name in ("hidden_size", "num_layers"):
            if args.model is not None and getattr(args, name) is not None:
                raise ValueError(f"{_option(name)} is for the small Llama, without --model")
        if args.vocab_size is not None and not args.from_scratch:
            raise ValueError("--vocab-size is for a model --from-scratch")
        if args.lora_rank is not None and args.from_scratch:
            raise ValueError("--lora-rank adapts a trained --model, not random weights")
        if args.template == "plain" and args.layout != "shared":
            raise ValueError(f"--format plain has the shared --layout only, got {args.layout}")
        if args.separator is not None and args.template != "plain":
            raise ValueError("--separator is for --format plain")
        if args.streaming:
            for name, given in (("data", args.data), ("max_steps", args.max_steps)):
                if given is None:
                    raise ValueError(f"--streaming needs {_option(name)}")
            if args.train_samples is not None:
                raise ValueError("--train-samples does not go with --streaming: see --max-steps")
            if args.loss_dropout_per == "step":
                raise ValueError("--loss-dropout-per step does not go with --streaming")
        if args.seeds and len(set(args.seeds)) < len(args.seeds):
            raise ValueError(f"--seeds must differ, got {args.seeds}")
        if args.compare is None:
            args.compare = args.model is None or args.seeds is not None

    def _training_arguments(self, directory: str, seed: int) -> TrainingArguments:
        """Transformers' options of one run: this module's defaults, its options, all others."""
        args = self.args
        parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)
        parser.error = _refuse  # instead of the usage of all its options
        parser.set_defaults(**COMMON, **(SCRATCH if args.from_scratch else FINE_TUNE))
        parser.set_defaults(use_cpu=not (torch.cuda.is_available() or torch.xpu.is_available()))
        known = {action.dest for action in parser._actions}
        given = {k: v for k, v in vars(args).items() if k in known and v is not None}
        given |= {"output_dir": str(args.output_dir / directory), "seed": seed}
        parser.set_defaults(**given)
        parsed, unknown = parser.parse_args_into_dataclasses(
            self.rest, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise ValueError(f"unknown options {' '.join(unknown)}: see llmjepa train --help")
        if parsed.resume_from_checkpoint is not None:
            raise ValueError("--resume-from-checkpoint is not supported: use --resume")
        self._is_main = parsed.process_index == 0
        return parsed

    def _rule(self) -> Rule | None:
        """What judges the held-out answers, after a look at each of them."""
        args, data = self.args, self.data
        if not data.held_out.samples:
            return None
        name = args.rule or RULE_OF_RECIPE.get(args.recipe, "exact")
        rule = answer_rule(name, databases=args.databases)
        for part in (data.held_out, data.out_of_distribution):
            for place, sample in zip(part.places, part.samples, strict=True):
                try:
                    rule.check(sample)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
        return rule

    def _record(self, name: str, seed: int) -> RunRecord:
        """What is kept of one run: every option that its numbers depend on, and the data."""
        args = self.args
        directory = Path(f"seed-{seed}" if args.seeds else "") / OBJECTIVES[name]
        options = {k: v for k, v in vars(args).items() if k not in UNRECORDED}
        options |= {"seed": seed, "data_seed": args.seed, "other": self.rest}
        options["samples"] = self.data.digest()
        return RunRecord(args.output_dir / directory, name, seed, options)

    def _build(self, seed: int) -> tuple[Any, Any, ExampleFormat]:
        """The model before training, its tokenizer and format: the same for the same seed."""
        args = self.args
        set_seed(seed)
        if not args.from_scratch:
            model, tokenizer = models.load_pretrained(args.model)
        else:
            if args.model is None or args.vocab_size is not None:
                size = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
                tokenizer = train_tokenizer(self.data.train.samples, **size)
            else:
                tokenizer = models.load_tokenizer(args.model)
            if args.model is None:
                size = {"hidden_size": args.hidden_size, "num_layers": args.num_layers}
                given = {name: n for name, n in size.items() if n is not None}
                model = models.small_llama(tokenizer, **given)
            else:
                model = models.from_scratch(args.model, tokenizer)
        if args.template == "chat" and not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of --model {args.model} has no chat template: train with "
                "--format plain, or give it one"
            )
        example_format, new_ids = self._format(model, tokenizer, seed)
        if args.lora_rank is not None:
            model = models.add_lora(model, args.lora_rank, new_ids=new_ids)
        return model, tokenizer, example_format

    def _format(self, model, tokenizer, seed: int) -> tuple[ExampleFormat, list[int]]:
        """The format, and the tokens that were added for it."""
        args = self.args
        tokens = [predictor_token(i + 1) for i in range(args.num_pred_tokens)]
        separator_id = None
        if args.template == "plain":
            separator = args.separator or "<|separator|>"
            known = tokenizer(separator, add_special_tokens=False)["input_ids"]
            if len(known) == 1:
                separator_id = known[0]
            else:
                tokens.append(separator)
        new_ids = add_tokens(model, tokenizer, tokens, seed=seed)
        example_format = ExampleFormat(
            template=args.template,
            layout=args.layout,
            direction=args.direction,
            pred_position=args.pred_position,
            pred_ids=new_ids[: args.num_pred_tokens],
            separator_id=new_ids[-1] if len(tokens) > args.num_pred_tokens else separator_id,
            supervise=args.supervise,
        )
        return example_format, new_ids

    def _train_dataset(self, seed: int) -> LossDropout | ExampleStream:
        args = self.args
        if args.streaming:
            return self.data.stream(seed=seed)
        return LossDropout(
            self.data.train.examples, args.loss_dropout, per=args.loss_dropout_per, seed=seed
        )

    def _run(self, record: RunRecord) -> dict[str, Any]:
        """Trains one model; what there is to report, in full in the main process only."""
        args, data = self.args, self.data
        views = record.name == "LLM-JEPA"
        built, self._built = self._built, None
        if built is None or record.seed != self.seeds[0]:
            built = self._build(record.seed)
        model, tokenizer, example_format = built
        checkpoint, faults = record.checkpoint() if args.resume else (None, [])
        trainer = LLMJEPATrainer(
            model,
            self._training_arguments(
                str(record.directory.relative_to(args.output_dir)), record.seed
            ),
            LLMJEPACollator(
                tokenizer,
                example_format,
                max_length=args.max_length,
                # Next-token loss alone stands for plain fine-tuning, which shares nothing.
                share_prefixes=args.share_prefixes and views,
                with_views=views,
            ),
            train_dataset=self._train_dataset(record.seed),
            eval_dataset=data.held_out.examples or None,
            processing_class=tokenizer,
            jepa_weight=args.jepa_weight,
            metric=args.metric,
            temperature=args.temperature,
            detach_target=args.detach_target,
        )
        if self._is_main:
            record.begin()
            for fault in faults:
                print(fault)
            if args.resume:
                print(f"resuming from {checkpoint or 'the beginning: there is no checkpoint'}")
            size = f"a stream of {args.data}" if args.streaming else f"{len(data.train)} examples"
            parameters, trained = (n / 1e6 for n in _count_parameters(model))
            print(
                f"\n{record.title}: {size}, {parameters:.1f} M parameters, "
                f"{trained:.1f} M of them trained",
                flush=True,
            )
        if trainer.pop_callback(ProgressCallback):
            trainer.add_callback(ProgressBar)
        metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
        if args.streaming:
            self._print_left_out()
        if data.held_out.examples:
            metrics |= trainer.evaluate()
        if data.out_of_distribution.examples:
            examples = data.out_of_distribution.examples
            metrics |= trainer.evaluate(examples, metric_key_prefix="ood")
        with saving(record.directory):
            self._save(trainer)
        if not self._is_main:
            return {}
        history = trainer.state.log_history
        logs = [log for log in history if "tokens_per_step" in log]
        metrics |= self._summary(logs, trainer.get_total_train_batch_size(trainer.args))
        cosines = []
        model = trainer.accelerator.unwrap_model(trainer.model)
        if data.held_out.samples:
            collator = LLMJEPACollator(tokenizer, example_format)
            cosines = _pair_cosines(model, collator, data.held_out.samples)
            metrics["pair_cosine"] = mean(cosines)
            collator = LLMJEPACollator(tokenizer, replace(example_format, pred_ids=()))
            metrics["view_cosine"] = mean(_pair_cosines(model, collator, data.held_out.samples))
        for part, key in ((data.held_out, "accuracy"), (data.out_of_distribution, "ood_accuracy")):
            if part.samples:
                predictions = evaluate(model, tokenizer, part.samples, example_format, self.rule)
                metrics[key] = mean(prediction.correct for prediction in predictions)
        return record.finish({"metrics": metrics, "history": history, "cosines": cosines})

    def _summary(self, logs: list[dict[str, float]], batch_size: int) -> dict[str, float]:
        """The last losses, and what an example costs."""
        tokens = sum(log["tokens_per_step"] for log in logs)
        seconds = sum(log["tokens_per_step"] / log["tokens_per_second"] for log in logs)
        cost = tokens / sum(log["tokens_per_step"] / log["relative_cost"] for log in logs)
        if self.args.streaming:  # whose batches are all full
            tokens_per_example = tokens / len(logs) / batch_size
        else:
            tokens_per_example = cost * mean(map(chat_tokens, self.data.train.examples))
        return {
            "loss": logs[-1]["loss"],
            "ntp_loss": logs[-1]["ntp_loss"],
            "relative_cost": cost,
            "tokens_per_example": tokens_per_example,
            "seconds_per_example": tokens_per_example * seconds / tokens,
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


def _pair_cosines(model, collator: LLMJEPACollator, samples: list[dict]) -> list[float]:
    """The cosine of every pair of views as `collator` makes them."""
    batches = (collator(chunk) for chunk in _chunks(samples, 64))
    return cosine_similarity(*view_states(model, batches)).tolist()


def _max_positions(model) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _count_parameters(model) -> tuple[int, int]:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
