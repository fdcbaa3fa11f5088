"""Loading the checkpoints that commands only read."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from llmjepa_kernels.hf.load import load_pretrained


class LoadOptions(Protocol):
    """The options of a command about that."""

    @property
    def dtype(self) -> str: ...
    @property
    def load_in(self) -> str | None: ...
    @property
    def trust_remote_code(self) -> bool: ...


def load_checkpoint(name: str, options: LoadOptions, device: torch.device) -> tuple[Any, Any]:
    """The model and its tokenizer, as the options say; raises as `load_pretrained` does."""
    return load_pretrained(
        name,
        options.dtype,
        load_in=options.load_in,
        device=device,
        trust_remote_code=options.trust_remote_code,
    )
