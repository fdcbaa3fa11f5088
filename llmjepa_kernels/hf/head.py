"""The language model head apart from its model, for losses that take its logits in parts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmjepa_kernels.hf.patch import pretrained_model

_is_exact: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class Head:
    """From a model's last hidden states to its logits, as far as its config tells.

    Args:
        model: A patched causal language model, or a wrapper of one.

    Attributes:
        autocast: What products are cast to in `precision`, as they were in the model's forward,
            which Accelerate puts under autocast by itself. Default: as the caller has it.
    """

    autocast: torch.dtype | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = pretrained_model(model)
        self.embeddings: Any = self.model.get_output_embeddings()
        config = self.model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.factor = getattr(config, "logit_scale", None)  # Cohere
        self.divisor = getattr(config, "logits_scaling", None)  # Granite
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma

    def __call__(self, hidden: Tensor) -> Tensor:
        """(…, hidden_size) -> (…, vocab)."""
        logits = self.embeddings(hidden)
        if self.factor is not None:
            logits = logits * self.factor
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.to(hidden.device)  # a device_map may keep the head on another one

    def precision(self, device: torch.device) -> AbstractContextManager:
        """The context to call it in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    @property
    def is_exact(self) -> bool | None:
        """Whether it gives the model's own logits; None until `compare` has seen some."""
        return _is_exact.get(self.model)

    @torch.no_grad()
    def compare(self, hidden: Tensor, logits: Tensor) -> bool:
        """Sees whether it gives these logits, as the model did, and remembers it."""
        weight: Any = getattr(self.embeddings, "weight", None)
        # Outside the model's own forward, FSDP may hold a part of the weight, DeepSpeed none.
        whole = isinstance(weight, Tensor) and weight.numel() == weight.shape[0] * hidden.shape[-1]
        exact = whole and not hasattr(weight, "placements")
        with self.precision(hidden.device):
            casts = torch.is_autocast_enabled(hidden.device.type)
            exact = exact and (casts or weight.dtype == hidden.dtype)
            if exact:
                own = self(hidden)
                exact = own.shape == logits.shape and (casts or own.dtype == logits.dtype)
                tolerance = 16 * torch.finfo(own.dtype).eps * logits.abs().max()
                exact = exact and bool(((own - logits).abs() <= tolerance).all())
        _is_exact[self.model] = exact
        return exact
