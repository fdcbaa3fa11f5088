"""The options of `llmjepa evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmjepa_kernels.cli.option_parser import COUNT, NOT_NEGATIVE, Options, option
from llmjepa_kernels.cli.shared_options import (
    BUILT_IN_SEED,
    EVAL_SAMPLES,
    checkpoint_option,
    data_option,
    databases_option,
    device_option,
    dtype_option,
    load_in_option,
    needs_gguf,
    recipe_option,
    rule_option,
    split_option,
    trust_option,
)
from llmjepa_kernels.evaluation.predict import BATCH_SIZE, ROOM
from llmjepa_kernels.hf.dtypes import DTYPES


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """What ``llmjepa evaluate`` is asked for; see `Options`."""

    when_interrupted: ClassVar[str] = "interrupted: with --output nothing would be lost"
    arguments: ClassVar[str] = " CHECKPOINT [CHECKPOINT ...]"
    summary: ClassVar[str] = "measure the accuracy of checkpoints"
    description: ClassVar[str] = """\
Has checkpoints answer by greedy decoding, and reports how many answers are correct, with Wilson's
95 % interval.

rules for what is correct:
  exact       the answer to the letter
  startswith  it begins with the answer (Rotten Tomatoes, Yelp, models of --format plain)
  number      the number after the first #### that has one (GSM8K)
  sql         a query with the same result on --databases, read-only (Spider)
  any         it contains one of the answers listed with "; " between them (NQ-Open)
  choice      the most likely of A, B, C and D (HellaSwag)
"""
    epilog: ClassVar[str] = """\
examples:
  llmjepa evaluate outputs/train/ntp-only outputs/train/llm-jepa
  llmjepa evaluate outputs/train/llm-jepa --data test.jsonl --split depth:2 --output p.jsonl
  llmjepa evaluate Qwen/Qwen3-1.7B --data gsm8k.jsonl --rule number --dtype bfloat16
"""

    checkpoints: tuple[str, ...] = checkpoint_option()
    data: str | None = data_option()
    recipe: str | None = recipe_option()
    rule: str | None = rule_option()
    databases: str | None = databases_option()
    split: str | None = split_option("report samples out of distribution apart")
    samples: int | None = option(
        None,
        "evaluate on the first N",
        metavar="N",
        range=COUNT,
        default_is=f"all of --data, {EVAL_SAMPLES} built-in ones",
    )
    batch_size: int = option(BATCH_SIZE, "samples answered at once", metavar="N", range=COUNT)
    max_new_tokens: int | None = option(
        None,
        "longest completion",
        metavar="N",
        range=COUNT,
        default_is="one more than the longest answer of the data; where the rule looks at no more, "
        f"{ROOM} more than that of a batch",
    )
    output: str | None = option(
        None,
        "gets every prediction as soon as it is made; the same command goes on where it stopped. "
        "FILE.report.json gets settings and results",
        metavar="FILE.jsonl",
    )
    device: str | None = device_option()
    dtype: str = dtype_option(DTYPES)
    load_in: str | None = load_in_option()
    trust_remote_code: bool = trust_option()
    seed: int = option(BUILT_IN_SEED, "of the built-in data", metavar="SEED", range=NOT_NEGATIVE)

    def check(self) -> None:
        if self.output is not None and not self.output.endswith(".jsonl"):
            raise ValueError(f"--output must end in .jsonl, got {self.output!r}")
        if repeated := {name for name in self.checkpoints if self.checkpoints.count(name) > 1}:
            raise ValueError(f"checkpoints must differ, got {', '.join(repeated)} more than once")
        if self.recipe is not None and self.data is None:
            raise ValueError(f"--recipe {self.recipe} needs --data")

    def packages(self) -> dict[str, list[str]]:
        packages = ["transformers", "tokenizers", "rich", "scipy", "peft"]
        return {"train": packages + needs_gguf(*self.checkpoints)}
