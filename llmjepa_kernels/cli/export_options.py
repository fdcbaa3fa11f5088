"""The options of `llmjepa export`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

from llmjepa_kernels.cli.option_parser import Options, option
from llmjepa_kernels.cli.shared_options import needs_gguf, trust_option
from llmjepa_kernels.hf.dtypes import DTYPES


@dataclass(frozen=True)
class ExportOptions(Options):
    """What ``llmjepa export`` is asked for; see `Options`."""

    arguments: ClassVar[str] = " CHECKPOINT DIR"
    summary: ClassVar[str] = "write a checkpoint for other programs"
    description: ClassVar[str] = """\
Writes a checkpoint without [PRED] tokens, which generation does not need, and without rows that pad
its vocabulary, as Transformers, vLLM or converters to GGUF read it. The logits of all other tokens
are the same bits. A model card beside it says what it was trained on, how, and with what result.
"""
    epilog: ClassVar[str] = """\
examples:
  llmjepa export outputs/train/llm-jepa my-model
  llmjepa export outputs/train/llm-jepa/adapter my-adapter
"""

    checkpoint: str = option(
        MISSING,
        "directory of a model or LoRA adapter, or model of the Hugging Face hub",
        metavar="CHECKPOINT",
    )
    directory: Path = option(  # noqa: RUF009
        MISSING, "is made; must not hold anything yet", metavar="DIR"
    )
    merge: bool = option(False, "merge an adapter into its base model")
    dtype: str | None = option(
        None, "of the weights", choices=DTYPES, default_is="that of the checkpoint"
    )
    trust_remote_code: bool = trust_option()

    def packages(self) -> dict[str, list[str]]:
        packages = ["transformers", "tokenizers", "peft", *needs_gguf(self.checkpoint)]
        return {"train": packages}
