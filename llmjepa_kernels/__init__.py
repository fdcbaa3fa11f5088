"""LLM-JEPA training in one forward pass of packed rows.

The names in the order of the data: examples are packed into rows, attention and loss run on them,
and Hugging Face models and the Trainer are patched to use both.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import llmjepa_kernels.versions  # noqa: F401  refuses old ones before anything stumbles
from llmjepa_kernels.example import Example, Segment, llm_jepa_example
from llmjepa_kernels.ops.attention import view_attention
from llmjepa_kernels.ops.block_mask import BlockMask
from llmjepa_kernels.ops.flash_plan import FlashPlan
from llmjepa_kernels.ops.loss import last_token_loss
from llmjepa_kernels.ops.tubes import semantic_tube_loss
from llmjepa_kernels.packing import PackedBatch, pack
from llmjepa_kernels.tubes import TokenPath, TubeSampler

if TYPE_CHECKING:  # what `_LAZY` says, for type checkers and editors
    from llmjepa_kernels.data.chat import chat_example
    from llmjepa_kernels.data.example_format import ExampleFormat
    from llmjepa_kernels.data.predictor_tokens import add_predictor_tokens
    from llmjepa_kernels.hf.patch import patch_model, unpatch_model
    from llmjepa_kernels.training.collator import LLMJEPACollator
    from llmjepa_kernels.training.objective import LLMJEPAOutput, llm_jepa_loss
    from llmjepa_kernels.training.trainer import LLMJEPATrainer
    from llmjepa_kernels.training.view_head import add_view_head

__version__ = "0.1.0"  # the only place; pyproject.toml reads it here

# Most of these need transformers, so they are imported when they are asked for.
_LAZY = {
    "chat_example": "data.chat",
    "ExampleFormat": "data.example_format",
    "patch_model": "hf.patch",
    "unpatch_model": "hf.patch",
    "LLMJEPAOutput": "training.objective",
    "llm_jepa_loss": "training.objective",
    "add_predictor_tokens": "data.predictor_tokens",
    "LLMJEPACollator": "training.collator",
    "LLMJEPATrainer": "training.trainer",
    "add_view_head": "training.view_head",
}

__all__ = [
    "BlockMask",
    "Example",
    "ExampleFormat",
    "FlashPlan",
    "LLMJEPACollator",
    "LLMJEPAOutput",
    "LLMJEPATrainer",
    "PackedBatch",
    "Segment",
    "TokenPath",
    "TubeSampler",
    "add_predictor_tokens",
    "add_view_head",
    "chat_example",
    "last_token_loss",
    "llm_jepa_example",
    "llm_jepa_loss",
    "pack",
    "patch_model",
    "semantic_tube_loss",
    "unpatch_model",
    "view_attention",
]


if not TYPE_CHECKING:  # so that type checkers know the names that are not there

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
        except ModuleNotFoundError as error:
            if error.name == "transformers":
                raise ImportError(
                    f"{name} needs the package transformers: pip install 'llmjepa_kernels[train]'"
                ) from error
            raise
        return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
