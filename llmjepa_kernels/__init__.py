"""LLM-JEPA training in one forward pass of packed rows."""

from llmjepa_kernels.attention import view_attention
from llmjepa_kernels.block_mask import BlockMask
from llmjepa_kernels.loss import last_token_loss
from llmjepa_kernels.packing import Example, PackedBatch, Segment, llm_jepa_example, pack

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "Example",
    "PackedBatch",
    "Segment",
    "last_token_loss",
    "llm_jepa_example",
    "pack",
    "view_attention",
]
