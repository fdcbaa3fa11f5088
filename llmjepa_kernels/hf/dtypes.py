"""The forms that weights can be loaded in, by name."""

from __future__ import annotations

DTYPES = ("float32", "bfloat16", "float16")
TRAINABLE_DTYPES = ("float32", "bfloat16")  # float16 overflows without scaled gradients
QUANTIZATIONS = ("8bit", "4bit")
