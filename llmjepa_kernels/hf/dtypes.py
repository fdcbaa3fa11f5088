"""The forms that weights can be loaded in, by name."""

from __future__ import annotations

import torch

DTYPES = ("float32", "bfloat16", "float16")
TRAINABLE_DTYPES = ("float32", "bfloat16")  # float16 overflows without scaled gradients
QUANTIZATIONS = ("8bit", "4bit")


def weight_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """What it stands for: bitsandbytes stores two weights of 4 bits in a byte, in one column."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.shape if packed is None else packed.shape
