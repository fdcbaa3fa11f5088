"""`llmjepa train`: fine-tunes or pretrains with LLM-JEPA, by default on built-in data."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging

from llmjepa_kernels.cli.held_out import check_answers, chosen_rule
from llmjepa_kernels.cli.report import write_report
from llmjepa_kernels.cli.run_record import RunRecord
from llmjepa_kernels.cli.starting_point import StartingPoint, starting_point
from llmjepa_kernels.cli.train_options import OBJECTIVES, TrainOptions, directory_name, terms_of
from llmjepa_kernels.cli.training_arguments import training_arguments
from llmjepa_kernels.cli.training_data import LeftOut, SampleReader, TrainingData
from llmjepa_kernels.cli.training_run import TrainingRun, print_left_out
from llmjepa_kernels.evaluation.rules import Rule


def train(options: TrainOptions) -> None:
    """Checks and loads everything; then trains, evaluates and saves each model; reports on all.

    Raises:
        ValueError: An option or a sample is wrong.
        OSError: A file or a model is not there.
    """
    seeds = options.all_seeds
    arguments = training_arguments(options, options.output_dir, seeds[0])
    is_main = arguments.process_index == 0
    reader = SampleReader(options, LeftOut())
    samples, held_out = reader.first(), reader.held_out()
    chats = [each.sample for each in samples]
    first = starting_point(options, chats, seeds[0])
    data = TrainingData(options, samples, held_out, first, reader.left_out)
    rule = _rule(options, data)
    records = [
        _record(options, data, objective, seed)
        for seed in seeds
        for objective in options.objectives
    ]
    for record in records:
        record.check(resume=options.resume)

    logging.disable_progress_bar()  # of reading and writing weights
    if is_main and not options.streaming:
        print_left_out(data.left_out)
    results = []
    untouched: StartingPoint | None = first  # by training, which changes the model
    for record in records:
        result = record.result
        if result is None:
            start, untouched = untouched, None
            if start is None or record.seed != seeds[0]:
                start = starting_point(options, chats, record.seed)
            terms = terms_of(record.name)
            result = TrainingRun(options, data, rule, record, start, terms).run()
        elif is_main:
            print(f"\n{record.title}: finished before, kept")
        results.append(result)
    if is_main:
        print("\n" + write_report(results, options.output_dir))
        print(f"Checkpoints, report.txt, report.json and report.png: {options.output_dir}/")


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


def _record(options: TrainOptions, data: TrainingData, objective: str, seed: int) -> RunRecord:
    """What is kept of one run: every option that its numbers depend on, and the data."""
    name = OBJECTIVES[objective]
    directory = Path(f"seed-{seed}" if options.seeds else "") / directory_name(name)
    depends_on = options.recorded() | {
        "seed": seed,
        "data_seed": options.seed,
        "samples": data.fingerprint(),
    }
    return RunRecord(options.output_dir / directory, name, seed, depends_on)
