"""The options of `llmjepa generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmjepa_kernels.cli.option_parser import COUNT, NOT_NEGATIVE, Options, option
from llmjepa_kernels.cli.shared_options import (
    checkpoint_option,
    device_option,
    dtype_option,
    load_in_option,
    needs_gguf,
    trust_option,
)
from llmjepa_kernels.hf.dtypes import DTYPES

LEAST_TEMPERATURE = 1e-3  # by which float32 can divide logits


@dataclass(frozen=True)
class GenerateOptions(Options):
    """What ``llmjepa generate`` is asked for; see `Options`."""

    arguments: ClassVar[str] = " CHECKPOINT"
    summary: ClassVar[str] = "ask a checkpoint"
    description: ClassVar[str] = """\
Answers a prompt in the format that the checkpoint was trained with. Without --prompt it chats in a
terminal, until an empty line or Ctrl-D; elsewhere standard input is the prompt.
"""
    epilog: ClassVar[str] = """\
examples:
  llmjepa generate outputs/train/llm-jepa --prompt "lines with a vowel"
  llmjepa generate Qwen/Qwen3-1.7B --dtype bfloat16 --temperature 0.7 --system "Answer in one word."
"""

    checkpoint: str = checkpoint_option()
    prompt: str | None = option(
        None,
        "what the user says",
        metavar="TEXT",
        default_is="a chat, or standard input",
    )
    system: str | None = option(None, "the system prompt", metavar="TEXT", default_is="none")
    max_new_tokens: int = option(256, "longest answer", metavar="N", range=COUNT)
    temperature: float = option(
        0.0,
        "of the tokens that are drawn; 0 takes the most likely",
        metavar="T",
        range=NOT_NEGATIVE,
    )
    seed: int = option(0, "of the draws", metavar="SEED", range=NOT_NEGATIVE)
    device: str | None = device_option()
    dtype: str = dtype_option(DTYPES)
    load_in: str | None = load_in_option()
    trust_remote_code: bool = trust_option()

    def check(self) -> None:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"--temperature must be 0 or at least {LEAST_TEMPERATURE}, got {self.temperature}"
            )

    def packages(self) -> dict[str, list[str]]:
        packages = ["transformers", "tokenizers", "peft", *needs_gguf(self.checkpoint)]
        return {"train": packages}
