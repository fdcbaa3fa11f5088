"""How many floating point operations a training step takes, counted from its model and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmjepa_kernels.hf.dtypes import weight_shape
from llmjepa_kernels.hf.patch import pretrained_model
from llmjepa_kernels.training.view_head import view_head_of

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "num_experts_per_token")


class FlopCount:
    """Operations of matrix products in one forward and one backward pass over packed rows.

    A weight takes 2 of them for each token in the forward, 2 for the gradient of its input, and 2
    for its own if it is trained; the head takes them for supervised tokens only; attention takes 12
    for each unit of each query head and each query that sees a key. What is computed again, as
    under checkpointing, does not count; nor do sliding windows, embeddings, a `ViewHead` and all
    that is elementwise.

    Args:
        model: A causal language model, or a wrapper of one, whose parameters are whole.

    Source: the counting of model FLOPs in PaLM, arXiv:2204.02311, appendix B.
    """

    def __init__(self, model: nn.Module) -> None:
        pretrained = pretrained_model(model)
        config: Any = pretrained.config.get_text_config()
        head: Any = pretrained.get_output_embeddings() or pretrained.get_input_embeddings()
        # Of a model of images too, only its language model sees a packed row.
        decoder: Any = pretrained.get_decoder()
        apart = {id(p) for p in head.parameters()}
        embeddings = [m for m in decoder.modules() if isinstance(m, nn.Embedding)]
        for module in (pretrained.get_input_embeddings(), view_head_of(model), *embeddings):
            apart |= set() if module is None else {id(p) for p in module.parameters()}
        # One for each layer, where they may differ and this version of Transformers says so.
        layers = getattr(config, "per_layer_config", None)
        layers = layers or [config] * getattr(config, "num_hidden_layers", 0)
        chosen = None
        if layers:
            found = (getattr(layers[0], name, None) for name in EXPERTS_PER_TOKEN)
            chosen = next((count for count in found if count), None)
        self.per_token = sum(_passes(p, chosen) for p in _used(decoder) if id(p) not in apart)
        self.per_label = sum(_passes(p, None) for p in _used(head))
        self.per_seen = 12 * _query_width(config, layers)

    def __call__(self, batch: Mapping[str, Tensor], num_items: Tensor) -> Tensor:
        """Of one batch with so many supervised tokens, a scalar on its device."""
        visible_until = batch["visible_until"]
        own = torch.arange(visible_until.shape[1], device=visible_until.device)
        seen = (visible_until - own).sum(dtype=torch.float32)
        return (
            self.per_seen * seen
            + self.per_label * num_items
            + float(self.per_token * visible_until.numel())
        )


def _used(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that its forward uses: PEFT keeps the originals of modules that it trains."""
    unused: set[int] = set()
    for part in module.modules():
        trained: Any = getattr(part, "modules_to_save", None)
        if isinstance(trained, nn.ModuleDict):
            active: Any = part.active_adapters
            kept: list[Any] = [x for name, x in trained.items() if name not in active]
            kept += [part.original_module] if len(kept) < len(trained) else []
            unused |= {id(p) for each in kept for p in each.parameters()}
    return [p for p in module.parameters() if id(p) not in unused]


def _query_width(config: Any, layers: Sequence[Any]) -> int:
    """Units of all query heads of all layers; 0 where the configs do not tell."""
    heads = getattr(config, "num_query_heads", None)
    if heads is not None:  # of each layer, OpenELM's
        return sum(heads) * config.head_dim
    width = 0
    for layer in layers:
        count = getattr(layer, "num_attention_heads", None) or 0
        size = getattr(layer, "head_dim", None) or layer.hidden_size // max(count, 1)
        width += count * size
    return width


def _passes(parameter: nn.Parameter, chosen: int | None) -> float:
    """Operations of a weight for a token, which takes so many of a layer's experts."""
    shape = weight_shape(parameter)
    if len(shape) < 2:
        return 0.0
    # All experts of a layer are one parameter.
    used = chosen / shape[0] if chosen and len(shape) == 3 else 1.0
    return used * shape.numel() * (4 + 2 * parameter.requires_grad)
