"""`llmjepa train`: fine-tunes or pretrains with LLM-JEPA, by default on built-in data."""

from __future__ import annotations

import atexit
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils.memory import clear_device_cache
from torch import distributed
from transformers import TrainingArguments
from transformers.utils import logging

import llmjepa_kernels
from llmjepa_kernels.cli.fingerprints import source_fingerprint
from llmjepa_kernels.cli.held_out import check_answers, chosen_rule
from llmjepa_kernels.cli.objectives import OBJECTIVES, directory_name, terms_of
from llmjepa_kernels.cli.rehearsal import rehearsal
from llmjepa_kernels.cli.report import write_report
from llmjepa_kernels.cli.run_record import RunRecord
from llmjepa_kernels.cli.say import say
from llmjepa_kernels.cli.starting_point import StartingPoints, starting_point
from llmjepa_kernels.cli.train_options import TrainOptions
from llmjepa_kernels.cli.training_arguments import check_services, training_arguments
from llmjepa_kernels.cli.training_data import LeftOut, SampleReader, TrainingData
from llmjepa_kernels.cli.training_run import TrainingRun, print_left_out
from llmjepa_kernels.evaluation.rules import Rule
from llmjepa_kernels.files import only_process

# Of the run without options, which would otherwise raise hopes.
KNOWN = (
    "In our own runs of several seeds no objective was better than next-token loss alone at this "
    "scale: see docs/results.md."
)


def train(options: TrainOptions) -> None:
    """Checks and loads everything; then trains, evaluates and saves each model; reports on all.

    Raises:
        ValueError: An option or a sample is wrong.
        OSError: A file or a model is not there, or the disk is full.
        FloatingPointError: A training diverged; the others are reported on all the same.
    """
    seeds = options.all_seeds
    arguments = training_arguments(options, options.output_dir, seeds[0])
    check_services(arguments)
    is_main = arguments.process_index == 0
    if is_main and options.data is not None and options.data == options.eval_data:
        print("warning: --eval-data is --data: this measures what is remembered", file=sys.stderr)
    say(f"reading {options.data or 'the built-in pairs of English and regular expressions'}")
    reader = SampleReader(options, LeftOut())
    samples = reader.first()
    if options.streaming:  # whose beginning is counted as it is trained on
        reader = SampleReader(options, LeftOut())
    held_out = reader.held_out()
    chats = [each.sample for each in samples]
    say(f"loading {options.model or 'a small Llama of random weights'}")
    first = starting_point(options, chats, seeds[0])
    data = TrainingData(options, samples, held_out, first, reader.left_out)
    at_once = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and not options.streaming and len(data.train) < at_once:
        raise ValueError(
            f"{len(data.train)} samples make no batch of {at_once}, and --dataloader-drop-last "
            "drops incomplete ones"
        )
    rule = _rule(options, data)
    depends_on = options.recorded() | {
        "data_seed": options.seed,
        "samples": data.fingerprint(),
        "stream": source_fingerprint(str(options.data)) if options.streaming else None,
        "weights": first.weights,
        "processes": arguments.world_size,
        "epochs": arguments.num_train_epochs,
    }
    records = [
        _record(options, depends_on, objective, seed)
        for seed in seeds
        for objective in options.objectives
    ]
    runs = [
        TrainingRun(options, data, rule, record, first, terms_of(record.name))
        for record in records[: len(options.objectives)]
    ]
    lengths = _matched(options, runs, arguments)
    options_of = {name: replace(options, **length) for name, length in lengths.items()}
    for record in records:  # whose length another first objective would change
        record.options["matched"] = lengths[record.name]
    if is_main and (options.dry_run or options.streaming):
        print_left_out(data.left_out)
    if options.dry_run:
        for run in runs if is_main else ():
            own = options_of[run.record.name]
            matched = replace(run, options=own)
            print(rehearsal(matched, training_arguments(own, options.output_dir, seeds[0])))
        return
    # The main process alone writes; the others agree with it on what is finished already.
    if is_main:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    with only_process(options.output_dir) if is_main else nullcontext():
        if is_main or options.resume:
            for record in records:
                record.check(resume=options.resume, overwrite=options.overwrite)
        for record in records if is_main and options.overwrite else ():
            record.delete()  # all at once, as an interrupted command may be gone on with
        logging.disable_progress_bar()  # of reading and writing weights
        if is_main and not options.streaming:
            print_left_out(data.left_out)
        results: list[dict[str, Any]] = []
        diverged: dict[str, str] = {}  # why, by title
        starts = StartingPoints(options, chats, first, seeds[0])
        del first, runs  # and so the model, once its own run has ended
        for record in records:
            if record.result is not None:
                results.append(record.result)
                if is_main:
                    print(f"\n{record.title}: finished before, kept")
                continue
            try:
                results.append(
                    TrainingRun(
                        options_of[record.name],
                        data,
                        rule,
                        record,
                        starts.take(record.seed),
                        terms_of(record.name),
                    ).run()
                )
            except FloatingPointError as error:
                diverged[record.title] = f"{record.title}: {error}"
                if is_main:
                    good, _ = record.checkpoint()
                    print(
                        f"\n{diverged[record.title]}; last good checkpoint: {good or 'none'}",
                        flush=True,
                    )
            clear_device_cache(garbage_collection=True)  # before the next model comes
        if is_main and results:
            about = _about(options)
            about["remarks"] += [f"diverged, and not in the table: {title}" for title in diverged]
            print("\n" + write_report(results, options.output_dir, about))
            print(f"Checkpoints, report.txt, report.json and report.png: {options.output_dir}/")
            finished = [record for record in records if record.title not in diverged]
            print("next: llmjepa analyze", *(record.directory for record in finished))
    if arguments.world_size > 1 and distributed.is_initialized():
        distributed.barrier()  # one that ends earlier can take others down with it
        _leave_group_at_exit()
    if diverged:
        raise FloatingPointError("; ".join(diverged.values()))


@cache
def _leave_group_at_exit() -> None:
    """Before torch's own destructors, which may abort; till then the process may train again."""
    atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())


def _matched(
    options: TrainOptions, runs: list[TrainingRun], arguments: TrainingArguments
) -> dict[str, dict[str, Any]]:
    """How long each objective is trained, where --match tokens says so."""
    if options.match == "steps":
        return {run.record.name: {} for run in runs}
    tokens = [run.tokens_per_example() for run in runs]
    matched: dict[str, dict[str, Any]] = {}
    for run, own in zip(runs, tokens, strict=True):
        share = tokens[0] / own
        matched[run.record.name] = (
            {"max_steps": max(round(arguments.max_steps * share), 1)}
            if arguments.max_steps > 0
            else {"epochs": arguments.num_train_epochs * share}
        )
    return matched


def _about(options: TrainOptions) -> dict[str, Any]:
    """What a report says of where its numbers are from."""
    return {
        "model": options.model or "a small Llama from random weights",
        "data": options.data or "built-in pairs of English and regular expressions",
        "options": options.recorded(),
        "objectives": [OBJECTIVES[name] for name in options.objectives],
        "remarks": [KNOWN] if options.model is None and options.data is None else [],
        "versions": {
            module.__name__: str(module.__version__)
            for module in (llmjepa_kernels, torch, transformers)
        },
    }


def _rule(options: TrainOptions, data: TrainingData) -> Rule | None:
    """What judges the held-out answers, after a look at each of them."""
    if not data.held_out.samples:
        return None
    rule = chosen_rule(
        options.rule,
        recipe=options.recipe,
        template=options.template,
        databases=options.databases,
    )
    check_answers(data.held_out.located + data.out_of_distribution.located, rule)
    return rule


def _record(
    options: TrainOptions, depends_on: dict[str, Any], objective: str, seed: int
) -> RunRecord:
    """What is kept of one run: every option that its numbers depend on, and the data."""
    name = OBJECTIVES[objective]
    directory = Path(f"seed-{seed}" if options.seeds else "") / directory_name(name)
    return RunRecord(options.output_dir / directory, name, seed, {**depends_on, "seed": seed})
