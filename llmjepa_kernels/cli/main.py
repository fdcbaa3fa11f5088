"""The ``llmjepa`` command: the options of every subcommand, and what happens on a mistake."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from llmjepa_kernels.cli.options import EVAL_SAMPLES, FINE_TUNE, SCRATCH, TRAIN_SAMPLES
from llmjepa_kernels.data.recipes import RECIPES
from llmjepa_kernels.evaluation.rules import RULES

# Transformers takes seconds to import: a subcommand imports what needs it when it runs, so that
# --help and mistakes in the options answer at once.

TRAIN_DESCRIPTION = """\
Trains a language model with next-token loss + λ · JEPA loss, in one forward pass per batch.

Without options it makes pairs of English and regular expressions, trains a small Llama from random
weights on them, once with next-token loss alone and once with LLM-JEPA, and compares the two on
held-out pairs: about three minutes on two cores.
"""
TRAIN_EPILOG = """\
Every other option of transformers.TrainingArguments is accepted as well, for example
--weight-decay 0.01 --lr-scheduler-type linear --activation-checkpointing True --save-steps 200.

examples:
  llmjepa train
  llmjepa train --model meta-llama/Llama-3.2-1B-Instruct --data train.jsonl --eval-data test.jsonl
  llmjepa train --model SmolLM2-135M-Instruct.Q4_1.gguf --data train.jsonl --lora-rank 64
  llmjepa train --seeds 1 2 3 --split depth:2
  torchrun --nproc-per-node 8 -m llmjepa_kernels train --model Qwen/Qwen3-1.7B --data a.jsonl
"""
EVALUATE_DESCRIPTION = """\
Has checkpoints answer by greedy decoding, and reports how many answers are correct, with Wilson's
95 % interval.

rules for what is correct:
  exact   the answer to the letter
  number  the number after #### (GSM8K)
  sql     a query with the same result on --databases, read-only (Spider)
  any     one of the answers listed with "; " between them (NQ-Open)
  choice  the most likely of A, B, C and D (HellaSwag)
"""
EVALUATE_EPILOG = """\
examples:
  llmjepa evaluate outputs/train/ntp-only outputs/train/llm-jepa
  llmjepa evaluate outputs/train/llm-jepa --data test.jsonl --split depth:2 --output p.jsonl
  llmjepa evaluate Qwen/Qwen3-1.7B --data gsm8k.jsonl --rule number --bf16
"""
ANALYZE_DESCRIPTION = """\
Compares where checkpoints put the two views of the same examples: singular values of
Enc(Text) - Enc(Code), cosines of Text, prediction and Code, effective ranks, t-SNE.

The JSON defines every number. Nothing is trained or generated.
"""
ANALYZE_EPILOG = """\
examples:
  llmjepa analyze outputs/train/ntp-only outputs/train/llm-jepa
  llmjepa analyze meta-llama/Llama-3.2-1B-Instruct outputs/train/llm-jepa --data test.jsonl
"""
ANALYZE_SAMPLES = 500


def main(argv: list[str] | None = None) -> int:
    """Runs the ``llmjepa`` command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "llmjepa",
        description="LLM-JEPA training in one forward pass of packed rows.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_train_arguments(commands)
    add_evaluate_arguments(commands)
    add_analyze_arguments(commands)
    args, rest = parser.parse_known_args(argv)
    try:
        if rest and args.command != "train":  # which hands them to TrainingArguments
            raise ValueError(f"unknown options {' '.join(rest)}: see llmjepa {args.command} --help")
        args.run(args, rest)
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"llmjepa {args.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def require(*packages: str, extra: str = "train") -> None:
    """Raises an ImportError that says how to install, if a package is missing."""
    for package in packages:
        module = {"scikit-learn": "sklearn"}.get(package, package)
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                f"the package {package} is missing: pip install 'llmjepa_kernels[{extra}]'"
            )


def _add_command(
    commands,
    name: str,
    run: Callable[[argparse.Namespace, list[str]], None],
    summary: str,
    description: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """A subcommand with what all of them have; `run` gets its options and the unknown ones."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where in the code an error was found"
    )
    parser.set_defaults(run=run)
    return parser


def add_train_arguments(commands) -> None:
    """Adds ``llmjepa train``."""
    parser = _add_command(
        commands, "train", _train, "train with LLM-JEPA", TRAIN_DESCRIPTION, TRAIN_EPILOG
    )
    data = parser.add_argument_group("model and data")
    data.add_argument(
        "--model",
        metavar="NAME",
        help="model of the Hugging Face hub, directory or .gguf file (default: a small Llama from "
        "random weights, with a tokenizer trained on the data)",
    )
    data.add_argument(
        "--from-scratch",
        action="store_true",
        help="take the architecture of --model, or of a config.json, with random weights",
    )
    data.add_argument("--hidden-size", type=int, metavar="N", help="of the small Llama (192)")
    data.add_argument("--num-layers", type=int, metavar="N", help="of the small Llama (4)")
    data.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="train a tokenizer of N tokens on the data (default: the one of --model, else 512)",
    )
    data.add_argument(
        "--data",
        metavar="SOURCE",
        help='JSONL, a line being {"messages": [{"role": "system", "content": …}, user, '
        'assistant]}; "text" and "code" may give other views, "views": {"name": "content", …} '
        'further ones, which Text predicts too unless "pairs": [["text", "name"], …] says which '
        "view predicts which. Also a directory of src.txt and targ.txt or saved by the datasets "
        "library, or hub:NAME:SPLIT, see --recipe (default: built-in pairs of English and regular "
        "expressions)",
    )
    _add_recipe(data)
    data.add_argument("--eval-data", metavar="SOURCE", help="the same, held out")
    _add_judgement(
        data, "train without the samples out of distribution, and evaluate on them apart"
    )
    data.add_argument(
        "--train-samples",
        type=int,
        metavar="N",
        help=f"train on the first N (default: all of --data, {TRAIN_SAMPLES} built-in ones)",
    )
    data.add_argument(
        "--eval-samples",
        type=int,
        metavar="N",
        default=EVAL_SAMPLES,
        help="evaluate on the first N held-out ones (default: %(default)s)",
    )
    data.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens in a packed row at most (default: one row per batch, without padding)",
    )
    data.add_argument(
        "--streaming",
        action="store_true",
        help="read --data again and again during training, needs --max-steps: for data larger than "
        "memory; --dataloader-num-workers tokenize",
    )
    data.add_argument(
        "--shuffle-buffer",
        type=int,
        metavar="N",
        default=10_000,
        help="samples of a stream in memory, from which the next is drawn (default: %(default)s)",
    )
    data.add_argument(
        "--skip-bad-lines", action="store_true", help="leave malformed samples out and count them"
    )
    data.add_argument(
        "--skip-too-long",
        action="store_true",
        help="leave samples longer than --max-length or the model's positions out and count them",
    )
    data.add_argument(
        "--no-share-prefixes",
        dest="share_prefixes",
        action="store_false",
        help="store every copy of a common prefix, such as the system prompt",
    )

    objective = parser.add_argument_group("objective")
    objective.add_argument(
        "--format",
        dest="template",
        choices=("chat", "plain"),
        default="chat",
        help="chat: the tokenizer's chat template; plain: user content, a separator token, "
        "assistant content (default: %(default)s)",
    )
    objective.add_argument(
        "--separator",
        metavar="TOKEN",
        help="of --format plain, added to the tokenizer if it is none of its tokens "
        "(default: <|separator|>)",
    )
    objective.add_argument(
        "--supervise",
        choices=("assistant", "all"),
        default="assistant",
        help="next-token loss on the assistant's answer, or on all tokens (default: %(default)s)",
    )
    objective.add_argument(
        "--layout",
        choices=("shared", "official"),
        default="shared",
        help="shared: the Text view is the prefix of the chat; official: the authors' three "
        "sequences (default: %(default)s)",
    )
    objective.add_argument(
        "--direction",
        choices=("text_to_code", "code_to_text", "both"),
        default="text_to_code",
        help="which view predicts which (default: %(default)s)",
    )
    objective.add_argument(
        "--num-pred-tokens",
        type=int,
        metavar="K",
        default=1,
        help="[PRED] tokens of a predicting view (default: %(default)s)",
    )
    objective.add_argument(
        "--pred-position",
        choices=("append", "prepend"),
        default="append",
        help="[PRED] tokens behind the view, or in front of a copy (default: %(default)s)",
    )
    objective.add_argument(
        "--jepa-weight",
        type=float,
        metavar="WEIGHT",
        default=1.0,
        help="λ, the weight of the JEPA loss (default: %(default)s)",
    )
    objective.add_argument(
        "--metric",
        choices=("cosine", "l2", "mse", "infonce"),
        default="cosine",
        help="distance of prediction and Code view (default: %(default)s)",
    )
    objective.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        default=0.07,
        help="of infonce (default: %(default)s)",
    )
    objective.add_argument(
        "--detach-target",
        action="store_true",
        help="let no gradient flow into the predicted view",
    )
    objective.add_argument(
        "--loss-dropout",
        type=float,
        metavar="RATE",
        default=0.0,
        help="fraction of the examples, drawn anew every epoch, that go without views and so "
        "without their cost (default: %(default)s)",
    )
    objective.add_argument(
        "--loss-dropout-per",
        choices=("example", "step"),
        default="example",
        help="draw for every example, or as the paper for all examples of an update at once "
        "(default: %(default)s)",
    )
    objective.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="train with next-token loss alone as well (default: without --model or with --seeds)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--lora-rank",
        type=int,
        metavar="R",
        help="train LoRA of all attention and MLP projections, alpha 2R (default: all weights)",
    )
    for option, destination, kind, metavar in (
        ("--epochs", "num_train_epochs", float, "N"),
        ("--batch-size", "per_device_train_batch_size", int, "N"),
        ("--learning-rate", "learning_rate", float, "LR"),
    ):
        training.add_argument(
            option,
            dest=destination,
            type=kind,
            metavar=metavar,
            help=f"default: {FINE_TUNE[destination]:g} with --model, else {SCRATCH[destination]:g}",
        )
    training.add_argument(
        "--max-steps", type=int, metavar="N", help="stop after N updates, whatever --epochs says"
    )
    training.add_argument(
        "--gradient-accumulation-steps",
        type=int,
        metavar="N",
        default=1,
        help="batches that make up an update (default: %(default)s)",
    )
    training.add_argument(
        "--bf16", action="store_true", help="bfloat16 autocast; weights stay in float32"
    )
    training.add_argument(
        "--seed",
        type=int,
        default=42,
        help="of weights, data order and built-in data (default: %(default)s)",
    )
    training.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="train once for each of these, on the same data, and report mean ± standard deviation",
    )
    training.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoints in --output-dir (see --save-steps), if there are "
        "any, and keep the results of runs that are finished",
    )
    training.add_argument(
        "--output-dir",
        metavar="DIR",
        type=Path,
        default=Path("outputs/train"),
        help="gets a checkpoint per run, report.txt, report.png and report.json "
        "(default: %(default)s)",
    )


def _add_judgement(parser, what_a_split_does: str) -> None:
    """The options of how answers are judged."""
    parser.add_argument(
        "--rule",
        choices=RULES,
        help="which answers are correct (default: that of the --recipe's dataset, else exact)",
    )
    parser.add_argument(
        "--databases",
        metavar="DIR",
        help="of Spider, with DB_ID/DB_ID.sqlite; for --rule sql",
    )
    parser.add_argument(
        "--split",
        metavar="SPEC",
        help=f"{what_a_split_does}: depth:N, regexes nested deeper than N; length:N, answers of "
        "more than N characters; pairs:F, regexes with one of the fraction F of all operator "
        "pairs, or 'pairs:outer>inner,…', with one of these",
    )


def _add_recipe(parser) -> None:
    parser.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        help="makes chats of data with the columns of this dataset (default: they are chats)",
    )


def _add_checkpoints_and_data(parser) -> None:
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="directory of a model or LoRA adapter, model of the Hugging Face hub, or .gguf file",
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="as for llmjepa train (default: its built-in held-out pairs)",
    )
    _add_recipe(parser)


def _train(args: argparse.Namespace, rest: list[str]) -> None:
    packages = ["transformers", "accelerate", "tokenizers", "matplotlib", "rich"]
    packages += ["peft"] * (args.lora_rank is not None)
    packages += ["gguf"] * (args.model or "").endswith(".gguf")
    require(*packages)
    from llmjepa_kernels.cli.train import Job

    Job(args, rest).run()


def add_evaluate_arguments(commands) -> None:
    """Adds ``llmjepa evaluate``."""
    parser = _add_command(
        commands,
        "evaluate",
        _evaluate,
        "measure the accuracy of checkpoints",
        EVALUATE_DESCRIPTION,
        EVALUATE_EPILOG,
    )
    _add_checkpoints_and_data(parser)
    _add_judgement(parser, "report samples out of distribution apart")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help=f"evaluate on the first N (default: all of --data, {EVAL_SAMPLES} built-in ones)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        default=64,
        help="samples answered at once (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest completion (default: one more than the longest answer of the data)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.jsonl",
        help="gets every prediction as soon as it is made; the same command goes on where it "
        "stopped. FILE.report.json gets settings and results",
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="such as cuda:1 (default: a GPU if there is one)"
    )
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16, not float32")
    parser.add_argument(
        "--seed", type=int, default=42, help="of the built-in data (default: %(default)s)"
    )


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    packages = ["transformers", "tokenizers", "rich", "scipy", "peft"]
    packages += ["gguf"] * any(name.endswith(".gguf") for name in args.checkpoints)
    require(*packages)

    from llmjepa_kernels.cli.evaluate import EvaluateJob

    EvaluateJob(args).run()


def add_analyze_arguments(commands) -> None:
    """Adds ``llmjepa analyze``."""
    parser = _add_command(
        commands,
        "analyze",
        _analyze,
        "see where checkpoints put Text and Code",
        ANALYZE_DESCRIPTION,
        ANALYZE_EPILOG,
    )
    _add_checkpoints_and_data(parser)
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        default=ANALYZE_SAMPLES,
        help="analyze the first N (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=Path,
        default=Path("outputs/analyze"),
        help="gets analysis.json and analysis.png (default: %(default)s)",
    )


def _analyze(args: argparse.Namespace, rest: list[str]) -> None:
    require("transformers", "matplotlib", "rich", "peft")
    require(*["gguf"] * any(name.endswith(".gguf") for name in args.checkpoints))
    require("scikit-learn", "threadpoolctl", extra="analyze")
    from transformers.utils import logging

    from llmjepa_kernels.cli.analyze import analyze

    logging.disable_progress_bar()  # of reading weights
    table = analyze(
        args.checkpoints,
        args.data,
        samples=args.samples,
        output_dir=args.output_dir,
        recipe=args.recipe,
    )
    print(f"\n{table}\nanalysis.json and analysis.png: {args.output_dir}/")
