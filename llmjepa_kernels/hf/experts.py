"""Mixtures of experts: the loss that balances their load, as their models define it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

FACTORS = ("router_aux_loss_coef", "aux_loss_coef")  # the latter is JetMoe's


def returns_aux_loss(config: PreTrainedConfig) -> bool:
    """Whether models of this config balance the load of their experts."""
    configs = config, config.get_text_config()
    return any(getattr(c, "output_router_logits", None) for c in configs)


def aux_weight_of(config: PreTrainedConfig) -> float:
    """The factor of the loss among the losses of the model."""
    text_config = config.get_text_config()
    for name in FACTORS:
        if getattr(text_config, name, None) is not None:
            return getattr(text_config, name)
    raise ValueError(
        "aux_weight must be given, since the model returns an aux_loss for which "
        f"{type(text_config).__name__} has no factor ({' or '.join(FACTORS)})"
    )


def names_real_tokens(mask: Any, config: PreTrainedConfig) -> bool:
    """Whether an `attention_mask` may stand beside packed rows, for the experts' sake alone.

    The loss is over all tokens but those that it leaves out. Attention does without it.
    """
    return isinstance(mask, Tensor) and mask.dim() == 2 and returns_aux_loss(config)
