"""One training of `llmjepa train`: from a starting point to a checkpoint and what is measured."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.functional import cosine_similarity
from transformers.trainer_callback import ProgressCallback

from llmjepa_kernels.cli.progress import TrainingBar, counted
from llmjepa_kernels.cli.run_record import RunRecord
from llmjepa_kernels.cli.say import is_first_process
from llmjepa_kernels.cli.starting_point import StartingPoint
from llmjepa_kernels.cli.train_options import TrainOptions
from llmjepa_kernels.cli.training_arguments import training_arguments
from llmjepa_kernels.cli.training_data import LeftOut, Part, TrainingData
from llmjepa_kernels.evaluation.geometry import view_states
from llmjepa_kernels.evaluation.predict import Accuracy, Prediction, accuracy, predict
from llmjepa_kernels.evaluation.rules import Rule
from llmjepa_kernels.example import Example
from llmjepa_kernels.files import share_as_umask_says
from llmjepa_kernels.packing import pack
from llmjepa_kernels.training.checkpoints import saving
from llmjepa_kernels.training.collator import LLMJEPACollator, chat_tokens
from llmjepa_kernels.training.loss_dropout import LossDropout
from llmjepa_kernels.training.trainer import LLMJEPATrainer
from llmjepa_kernels.training.view_head import add_view_head, remove_view_head, view_head_of
from llmjepa_kernels.tubes import TubeSampler

VIEW_BATCH_SIZE = 64  # samples whose views are encoded at once
MATCHED_BATCHES = 200  # whose tokens stand for those of all


@dataclass(frozen=True)
class TrainingRun:
    """Trains one model.

    Attributes:
        options: Of the command.
        data: Tokenized.
        rule: Judges the held-out answers, if there are any.
        record: Of this run; gets its result.
        start: Its model is changed.
        terms: Beside the next-token loss, out of ``TITLES``.
    """

    options: TrainOptions
    data: TrainingData
    rule: Rule | None
    record: RunRecord
    start: StartingPoint
    terms: Collection[str]

    def run(self) -> dict[str, Any]:
        """Trains, saves and measures; what there is to report, empty but in the main process.

        Raises:
            OSError: The disk is full.
        """
        checkpoint, faults = self.record.checkpoint() if self.options.resume else (None, [])
        left_out = LeftOut()
        trainer, bar = self.trainer(left_out), TrainingBar()
        if trainer.pop_callback(ProgressCallback):
            trainer.add_callback(bar)
        is_main = trainer.is_world_process_zero()
        if is_main:
            self.record.begin()
            self._announce(checkpoint, faults)
        from_checkpoint = None if checkpoint is None else str(checkpoint)
        try:
            metrics = trainer.train(resume_from_checkpoint=from_checkpoint).metrics
        finally:
            bar.close()
        if is_main and self.options.streaming:
            print_left_out(left_out)
        metrics |= self._held_out_losses(trainer)
        with saving(self.record.directory):
            model = self._save(trainer)
        history = trainer.state.log_history
        metrics |= self._last_losses_and_cost(trainer)
        result: dict[str, Any] = {"metrics": metrics, "history": history, "cosines": []}
        if _is_sharded(trainer):  # no process has a whole model that could answer
            if self.data.held_out.samples and is_main:
                print(f"for answers to held-out data: llmjepa evaluate {self.record.directory}")
            return self.record.finish(result) if is_main else {}
        cosines = self._pair_cosines(model, self.start.example_format, "cosines of pairs")
        if cosines:
            result["cosines"] = cosines
            metrics["pair_cosine"] = mean(cosines)
            views = replace(self.start.example_format, pred_ids=())
            metrics["view_cosine"] = mean(self._pair_cosines(model, views, "cosines of views"))
        found = self._accuracy(trainer, model, self.data.held_out, "accuracy")
        if found.total:
            metrics |= {"accuracy": found.value, "unfinished": found.unfinished / found.total}
            result["accuracy_interval"] = found.interval()
        outside, name = self.data.out_of_distribution, "accuracy out of distribution"
        found = self._accuracy(trainer, model, outside, name)
        if found.total:
            metrics["ood_accuracy"] = found.value
        return self.record.finish(result) if is_main else {}

    @property
    def _tubes(self) -> TubeSampler | None:
        if "stp" not in self.terms:
            return None
        options = self.options
        return TubeSampler(
            options.tube_form, options.tube_count, options.tube_max_length, self.record.seed
        )

    def _dataset(self, left_out: LeftOut) -> Any:
        """What is trained on; of a stream, what is left out is counted there."""
        options, seed = self.options, self.record.seed
        if options.streaming:
            return self.data.stream(left_out, seed=seed, tubes=self._tubes)
        return LossDropout(
            self.data.train.examples,
            options.loss_dropout,
            per=options.loss_dropout_per,
            seed=seed,
        )

    def _collator(self) -> LLMJEPACollator:
        """Makes rows of it."""
        return LLMJEPACollator(
            self.start.tokenizer,
            self.start.example_format,
            max_length=self.options.max_length,
            # Next-token loss alone stands for plain fine-tuning, which shares nothing.
            share_prefixes=self.options.share_prefixes and bool(self.terms),
            with_views="jepa" in self.terms,
            tubes=self._tubes,
        )

    def trainer(self, left_out: LeftOut) -> LLMJEPATrainer:
        """Trains it; of a stream, what is left out is counted there."""
        options, data, record, start = self.options, self.data, self.record, self.start
        self._add_head()
        return LLMJEPATrainer(
            start.model,
            training_arguments(options, record.directory, record.seed),
            self._collator(),
            train_dataset=self._dataset(left_out),
            eval_dataset=data.held_out.examples or None,
            processing_class=start.tokenizer,
            jepa_weight=options.jepa_weight,
            stp_weight=options.stp_weight,
            sigreg_weight=options.sigreg_weight if "sigreg" in self.terms else 0.0,
            vicreg_weight=options.vicreg_weight if "vicreg" in self.terms else 0.0,
            ntp_weight=options.ntp_weight,
            weight_warmup=options.weight_warmup,
            metric=options.metric,
            temperature=options.temperature,
            detach_target=options.detach_target,
            gather_negatives=options.gather_negatives,
        )

    def _add_head(self) -> None:
        """Gives the model the `ViewHead` that was asked for, if its losses have a use for any."""
        options, with_pairs = self.options, "jepa" in self.terms
        remove_view_head(self.start.model)  # of another objective's rehearsal
        projector_size = options.projector_size if with_pairs else None
        predictor = options.linear_predictor and with_pairs
        tube_predictor = options.linear_predictor and "stp" in self.terms
        if projector_size or predictor or tube_predictor:
            add_view_head(
                self.start.model,
                projector_size=projector_size,
                predictor=predictor,
                tube_predictor=tube_predictor,
                seed=self.record.seed,
            )

    def tokens_per_example(self) -> float:
        """Through the model, padding included, of the first of its batches in the data's order."""
        arguments = training_arguments(self.options, self.record.directory, self.record.seed)
        data, collate = self._dataset(LeftOut(silent=True)), self._collator()
        size = arguments.per_device_train_batch_size
        starts = range(0, len(data), size)[:MATCHED_BATCHES]
        batches = (
            [data[i, update] for i in range(start, min(start + size, len(data)))]
            for update, start in enumerate(starts)
        )
        tokens = sum(collate(batch)["input_ids"].numel() for batch in batches)
        return tokens / min(len(data), len(starts) * size)

    def _announce(self, checkpoint: Path | None, faults: list[str]) -> None:
        options = self.options
        for fault in faults:
            print(fault)
        if options.resume:
            print(f"resuming from {checkpoint or 'the beginning: there is no checkpoint'}")
        size = f"{len(self.data.train)} examples"
        if options.streaming:
            size = f"a stream of {options.data}"
        parameters, trained = (n / 1e6 for n in self.start.count_parameters())
        print(
            f"\n{self.record.title}: {size}, {parameters:.1f} M parameters, "
            f"{trained:.1f} M of them trained",
            flush=True,
        )

    def _held_out_losses(self, trainer: LLMJEPATrainer) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.data.held_out.examples:
            metrics |= trainer.evaluate()
        if self.data.out_of_distribution.examples:
            outside: Any = self.data.out_of_distribution.examples
            metrics |= trainer.evaluate(outside, metric_key_prefix="ood")
        return metrics

    def _save(self, trainer: LLMJEPATrainer) -> Any:
        """A checkpoint for ``AutoModelForCausalLM.from_pretrained``, LoRA merged into it.

        An adapter of quantised weights stays one, which is for the whole weights as well, and so
        does one under FSDP or DeepSpeed.

        Returns:
            The model in it.
        """
        directory = Path(str(trainer.args.output_dir))
        merged = self.options.lora_rank is not None and self.options.load_in is None
        merged = merged and not _is_sharded(trainer)
        trainer.save_model(str(directory / "adapter" if merged else directory))
        model = trainer.accelerator.unwrap_model(trainer.model)
        if merged:
            model = model.merge_and_unload()
        if merged and trainer.is_world_process_zero():
            model.save_pretrained(directory)
            if (head := view_head_of(model)) is not None:
                head.save(directory)
            share_as_umask_says(directory)
            self.start.tokenizer.save_pretrained(directory)
            self.start.example_format.save(directory)
        return model

    def _last_losses_and_cost(self, trainer: LLMJEPATrainer) -> dict[str, float]:
        """The last losses, and what an example costs."""
        logs = [log for log in trainer.state.log_history if "tokens_per_step" in log]
        if not logs:  # --logging-strategy no, or --logging-steps beyond the end
            return {}
        tokens = sum(log["tokens_per_step"] for log in logs)
        seconds = sum(log["tokens_per_step"] / log["tokens_per_second"] for log in logs)
        cost = tokens / sum(log["tokens_per_step"] / log["relative_cost"] for log in logs)
        steps = [0, *(log["step"] for log in logs)]
        updates = [step - before for before, step in pairwise(steps)]

        def per_update(key: str) -> float:  # those after the last log taken for like the others
            return sum(n * log[key] for n, log in zip(updates, logs, strict=True)) / sum(updates)

        if self.options.streaming:  # whose batches are all full
            batch_size = trainer.get_total_train_batch_size(trainer.args)
            tokens_per_example = tokens / len(logs) / batch_size
        else:
            tokens_per_example = cost * mean(map(chat_tokens, self.data.train.examples))
        return {
            "loss": logs[-1]["loss"],
            "ntp_loss": logs[-1]["ntp_loss"],
            "relative_cost": cost,
            "tokens": trainer.state.global_step * per_update("tokens_per_step"),
            "flops_per_step": per_update("flops_per_step"),
            "tokens_per_example": tokens_per_example,
            "seconds_per_example": tokens_per_example * seconds / tokens,
        }

    def _pair_cosines(self, model: Any, example_format: Any, name: str) -> list[float]:
        """The cosine of every held-out pair of views, in a format."""
        examples = [
            example_format.example(
                made.located.sample, self.start.tokenizer, max_length=made.max_length
            )
            for made in self.data.held_out.made
        ]
        if not examples:
            return []
        chunks: Iterable[Sequence[Example]] = _chunks(examples, VIEW_BATCH_SIZE)
        if is_first_process():
            chunks = counted(chunks, name, len(examples))
        batches = (pack(chunk) for chunk in chunks)
        predictors, targets = view_states(model, batches)
        head = view_head_of(model)
        if head is not None and example_format is self.start.example_format:
            weights = next(head.parameters())
            with torch.no_grad():
                predictors, targets = head(predictors.to(weights), targets.to(weights))
        return cosine_similarity(predictors, targets).tolist()

    def _accuracy(self, trainer: LLMJEPATrainer, model: Any, part: Part, name: str) -> Accuracy:
        """Of the answers to a part of the held-out data; of nothing where it has no samples.

        Each process has its model answer a share of them.
        """
        if not part.samples:
            return Accuracy(0, 0)
        tokenizer, example_format = self.start.tokenizer, self.start.example_format
        process, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
        everything = range(len(part.samples))
        mine = everything[process::processes]
        others = frozenset(everything) - frozenset(mine)
        batches: Iterable[Sequence[Prediction]]
        batches = predict(model, tokenizer, part.samples, example_format, self.rule, done=others)
        if is_first_process():
            batches = counted(batches, name, len(mine))
        return accuracy(gather_object([each for batch in batches for each in batch]))


def print_left_out(left_out: LeftOut) -> None:
    """A line per kind of samples that were left out or cut."""
    for kind, count in left_out.counts().items():
        print(
            f"truncated {count} samples"
            if kind == "truncated"
            else f"left out {count} samples: {kind}"
        )


def _is_sharded(trainer: LLMJEPATrainer) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
