"""The options of `llmjepa show`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmjepa_kernels.cli.option_parser import COUNT, Options, option
from llmjepa_kernels.cli.shared_options import (
    checkpoint_option,
    data_option,
    layout_option,
    needs_gguf,
    num_pred_tokens_option,
    recipe_option,
    trust_option,
)


@dataclass(frozen=True)
class ShowOptions(Options):
    """What ``llmjepa show`` is asked for; see `Options`."""

    arguments: ClassVar[str] = " CHECKPOINT"
    summary: ClassVar[str] = "see a packed row"
    description: ClassVar[str] = """\
Packs samples in the format that a checkpoint was trained with, and draws the rows: their tokens,
what each run of them is for, and who sees whom. Only the tokenizer is loaded. What a training would
pack is shown by llmjepa train --dry-run.
"""
    epilog: ClassVar[str] = """\
examples:
  llmjepa show outputs/train/llm-jepa
  llmjepa show outputs/train/llm-jepa --data train.jsonl --samples 3 --output row.png
"""

    checkpoint: str = checkpoint_option()
    data: str | None = data_option()
    recipe: str | None = recipe_option()
    samples: int = option(2, "pack the first N", metavar="N", range=COUNT)
    max_length: int | None = option(
        None, "tokens in a row at most", metavar="N", range=COUNT, default_is="one row"
    )
    share_prefixes: bool = option(True, "store equal prefixes once per row")
    num_pred_tokens: int | None = num_pred_tokens_option()
    layout: str | None = layout_option()
    output: Path | None = option(  # noqa: RUF009
        None, "gets a picture of the first row", metavar="FILE.png"
    )
    trust_remote_code: bool = trust_option()

    def check(self) -> None:
        if self.output is not None and self.output.suffix != ".png":
            raise ValueError(f"--output must end in .png, got {str(self.output)!r}")
        if self.recipe is not None and self.data is None:
            raise ValueError(f"--recipe {self.recipe} needs --data")

    def packages(self) -> dict[str, list[str]]:
        packages = ["transformers", "tokenizers", "rich", *needs_gguf(self.checkpoint)]
        return {"train": packages + ["matplotlib"] * (self.output is not None)}
