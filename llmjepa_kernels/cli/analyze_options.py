"""The options of `llmjepa analyze`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmjepa_kernels.cli.option_parser import Options, Range, option
from llmjepa_kernels.cli.report import COLORS
from llmjepa_kernels.cli.shared_options import (
    checkpoint_option,
    data_option,
    device_option,
    dtype_option,
    layout_option,
    load_in_option,
    needs_gguf,
    num_pred_tokens_option,
    recipe_option,
    trust_option,
)
from llmjepa_kernels.evaluation.geometry import POOLINGS
from llmjepa_kernels.hf.dtypes import DTYPES


@dataclass(frozen=True)
class AnalyzeOptions(Options):
    """What ``llmjepa analyze`` is asked for; see `Options`."""

    when_interrupted: ClassVar[str] = "interrupted: nothing is kept, start it again"
    arguments: ClassVar[str] = " CHECKPOINT [CHECKPOINT ...]"
    summary: ClassVar[str] = "see where checkpoints put Text and Code"
    description: ClassVar[str] = """\
Compares where checkpoints put the two views of the same examples: singular values of
Enc(Text) - Enc(Code), cosines of Text, prediction and Code, effective ranks, t-SNE.

The JSON defines every number. Nothing is trained or generated.
"""
    epilog: ClassVar[str] = """\
examples:
  llmjepa analyze outputs/train/ntp-only outputs/train/llm-jepa
  llmjepa analyze meta-llama/Llama-3.2-1B-Instruct outputs/train/llm-jepa --data test.jsonl
"""

    checkpoints: tuple[str, ...] = checkpoint_option()
    data: str | None = data_option()
    recipe: str | None = recipe_option()
    samples: int = option(500, "analyze the first N", metavar="N", range=Range(at_least=2))
    num_pred_tokens: int | None = num_pred_tokens_option()
    layout: str | None = layout_option()
    layer: int = option(
        -1,
        "whose states are compared: 0 is the embeddings, -1 the last layer after the final norm, "
        "which training compares",
        metavar="I",
    )
    pooling: str = option(
        "last",
        "last: the state of the token that training compares; mean: of all tokens that it sees",
        choices=POOLINGS,
    )
    answers: str | None = option(
        None,
        "the --output of llmjepa evaluate on the same data: cosines of right and of wrong answers",
        metavar="FILE.jsonl",
    )
    device: str | None = device_option()
    dtype: str = dtype_option(DTYPES)
    load_in: str | None = load_in_option()
    trust_remote_code: bool = trust_option()
    output_dir: Path = option(  # noqa: RUF009
        Path("outputs/analyze"),
        "gets analysis.json and analysis.png",
        metavar="DIR",
    )

    def check(self) -> None:
        if not 1 <= len(self.checkpoints) <= len(COLORS):
            found = len(self.checkpoints)
            raise ValueError(f"expected 1 to {len(COLORS)} checkpoints, got {found}")
        if self.recipe is not None and self.data is None:
            raise ValueError(f"--recipe {self.recipe} needs --data")

    def packages(self) -> dict[str, list[str]]:
        packages = ["transformers", "matplotlib", "rich", "peft", *needs_gguf(*self.checkpoints)]
        return {"train": packages, "analyze": ["scikit-learn", "threadpoolctl"]}
