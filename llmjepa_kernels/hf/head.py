"""The language model head apart from its model, for losses that take its logits in parts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmjepa_kernels.hf.patch import pretrained_model

SCALE_TOLERANCE = 1e-3  # of the logits of a few tokens, all together

_is_exact: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_uses: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


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
        """Whether it gives the model's own logits; None until `gives` has seen some."""
        return _is_exact.get(self.model)

    def gives(self, hidden: Tensor, logits: Tensor) -> bool:
        """Whether it gives these logits of a few tokens, as the model did; remembers if not.

        They are compared at first, and again ever more seldom, since a cap that no config names
        shows only in large logits.
        """
        if not self._is_whole(hidden):
            _is_exact[self.model] = False
            return False
        uses = _uses[self.model] = _uses.get(self.model, 0) + 1
        is_due = uses & (uses - 1) == 0  # powers of two
        # Of a training that diverged nothing is to be learnt.
        if self.is_exact is None or (is_due and bool(logits.isfinite().all())):
            _is_exact[self.model] = self._compare(hidden, logits)
        return bool(self.is_exact)

    def _is_whole(self, hidden: Tensor) -> bool:
        """Outside the model's own forward, FSDP may hold a part of the weight, DeepSpeed none."""
        weight: Any = getattr(self.embeddings, "weight", None)
        if not isinstance(weight, Tensor) or hasattr(weight, "placements"):
            return False
        return weight.numel() == weight.shape[0] * hidden.shape[-1]

    @torch.no_grad()
    def _compare(self, hidden: Tensor, logits: Tensor) -> bool:
        with self.precision(hidden.device):
            casts = torch.is_autocast_enabled(hidden.device.type)
            if not casts and self.embeddings.weight.dtype != hidden.dtype:
                return False
            own = self(hidden)
        if own.shape != logits.shape or not (casts or own.dtype == logits.dtype):
            return False
        rounding = torch.finfo(own.dtype).eps
        own, logits = own.float(), logits.float()
        # Each logit, and their scale, in which the rounding of many cancels. NaN is no equality.
        tolerance = 4 * rounding * logits.abs() + 16 * torch.finfo().eps * logits.abs().max()
        scale = (own * logits).sum() / own.square().sum().clamp(min=torch.finfo().tiny)
        equal = ((own - logits).abs() <= tolerance).all() & ((scale - 1).abs() <= SCALE_TOLERANCE)
        return bool(equal & logits.isfinite().all())
