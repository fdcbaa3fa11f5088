"""OpenELM, whose remote code knows nothing of Transformers' attention interface, for `patch_model`.

Its attention takes no keyword arguments, counts positions by index and repeats keys and values.
Only the mask reaches every layer, through activation checkpointing as well, so all that a packed
row needs travels in its place. Calls without `visible_until` run the remote code as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llmjepa_kernels.hf.layer import attention

MODEL_TYPE = "openelm"

RemoteModule: TypeAlias = Any  # a module of the remote code, whose attributes no type knows

# What the adapter uses of an attention layer.
ATTENTION = {
    "head_dim",
    "k_norm",
    "num_k_heads",
    "num_q_heads",
    "num_v_heads",
    "out_proj",
    "pos_embedding",
    "q_norm",
    "qkv_proj",
}


def check(model: RemoteModule) -> None:
    """Raises an error unless `patch` fits the model, with or without a head.

    Raises:
        TypeError: It is not OpenELM as published.
        ValueError: `patch` would replace a forward that is not the remote code's own.
    """
    base = model.base_model
    found = getattr(base, "layers", None)
    layers: list[RemoteModule] = list(found) if isinstance(found, nn.ModuleList) else []
    if not (
        layers
        and hasattr(base, "_update_causal_mask")
        and all(_has(getattr(layer, "attn", None), ATTENTION) for layer in layers)
        and all(_has(layer.attn.pos_embedding, {"model_dim", "freq_constant"}) for layer in layers)
    ):
        raise TypeError(
            f"{type(base).__name__} does not call attention through Transformers' "
            "AttentionInterface and is not OpenELM as published, so its attention cannot be "
            "replaced"
        )
    for module in _replaced(model):
        if "forward" in vars(module) and not _is_own(module.forward):
            raise ValueError(
                f"{type(module).__name__} has a forward of its own, such as a device_map over "
                "several devices or Accelerate's prepare puts there, and patch_model would drop "
                "it: call patch_model first"
            )


def patch(model: RemoteModule, impl: str | None) -> None:
    """Lets a packed row, whose schedule is complete, reach every layer; in place."""
    unpatch(model)
    base = model.base_model
    attend = functools.partial(attention, impl=impl)
    base.forward = functools.partial(_base_forward, base)
    base._update_causal_mask = functools.partial(_update_causal_mask, base)
    base._attend = attend
    for layer in base.layers:
        layer.attn.forward = functools.partial(_attention_forward, layer.attn, attend)
    if model is not base:
        # generate asks a forward for its parameters.
        signature = inspect.signature(model.forward)
        model.forward = functools.partial(_causal_lm_forward, model)
        model.forward.__signature__ = signature


def unpatch(model: RemoteModule) -> None:
    """Undoes `patch`, if it was called."""
    for module in _replaced(model):
        if "forward" in vars(module) and _is_own(module.forward):
            del module.forward
    for name in ("_update_causal_mask", "_attend"):
        vars(model.base_model).pop(name, None)


def impl_of(model: RemoteModule) -> str | None:
    """The `impl` that a base model was patched with; raises RuntimeError if it was not."""
    if "_attend" not in vars(model):
        raise RuntimeError("its attention is that of its remote code")
    return model._attend.keywords["impl"]


def _replaced(model: RemoteModule) -> list[RemoteModule]:
    """The modules whose forward `patch` replaces."""
    base = model.base_model
    return [*(layer.attn for layer in base.layers), base, *([] if model is base else [model])]


def _is_own(forward: Callable) -> bool:
    own = (_attention_forward, _base_forward, _causal_lm_forward)
    return isinstance(forward, functools.partial) and forward.func in own


def _has(module: nn.Module | None, names: set[str]) -> bool:
    return all(hasattr(module, name) for name in names)


def _causal_lm_forward(
    self: RemoteModule, *args: Any, visible_until: Tensor | None = None, **kwargs: Any
) -> Any:
    if visible_until is None:
        return type(self).forward(self, *args, **kwargs)
    return _packed_forward(self, *args, visible_until=visible_until, **kwargs)


def _packed_forward(
    model: RemoteModule,
    *args: Any,
    labels: Tensor | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """The forward of a packed row, with the options of Transformers' own models."""
    outputs = model.base_model(*args, return_dict=True, **kwargs)
    logits = _head(model, outputs.last_hidden_state)
    loss = None
    if labels is not None:
        loss = model.loss_function(
            logits=logits, labels=labels, vocab_size=model.config.vocab_size, **kwargs
        )
    return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def _head(model: RemoteModule, hidden: Tensor) -> Tensor:
    if model.lm_head is not None:
        return model.lm_head(hidden)
    embeddings = model.base_model.token_embeddings
    # FSDP2 may have sharded them on their own, and anew since their forward.
    if hasattr(embeddings, "unshard"):
        embeddings.unshard()
    return functional.linear(hidden, embeddings.weight)


def _base_forward(
    self: RemoteModule, *args: Any, head_positions: Tensor | None = None, **kwargs: Any
) -> Any:
    """Puts what the remote code has no argument for in the place of the mask.

    `head_positions` are for the hook behind it.
    """
    forward = type(self).forward
    if kwargs.get("visible_until") is None:
        if isinstance(mask := kwargs.get("attention_mask"), Tensor) and mask.dim() == 4:
            raise ValueError(
                "attention_mask must have 2 dimensions, or be a causal mask of views that "
                f"patch_model recognises: {type(self).__name__} ignores others of shape "
                f"{tuple(mask.shape)}"
            )
        return forward(self, *args, **kwargs)
    known = inspect.signature(forward).parameters
    packed = {name: value for name, value in kwargs.items() if name not in known}
    position_ids = kwargs.get("position_ids")
    if position_ids is None:  # with a recognised dense mask
        until = kwargs["visible_until"]
        position_ids = torch.arange(until.shape[1], device=until.device).expand_as(until)
    packed["position_ids"] = position_ids
    rest = {name: value for name, value in kwargs.items() if name in known}
    rest |= {"attention_mask": packed, "use_cache": False}
    return forward(self, *args, **rest)


def _update_causal_mask(
    module: RemoteModule, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    if isinstance(attention_mask, dict):
        return attention_mask
    return type(module)._update_causal_mask(module, attention_mask, *args, **kwargs)


def _attention_forward(
    self: RemoteModule,
    attend: Callable[..., tuple[Tensor, Any]],
    hidden_states: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None, None]:
    """Attention of one layer.

    Returns:
        out, no weights and no cache, as the remote code.
    """
    if not isinstance(attention_mask, dict):
        return type(self).forward(self, hidden_states, attention_mask, *args, **kwargs)
    heads = (self.num_q_heads, self.num_k_heads, self.num_v_heads)
    qkv = self.qkv_proj(hidden_states).unflatten(-1, (sum(heads), self.head_dim))
    q, k, v = qkv.transpose(1, 2).split(heads, dim=1)  # each (batch, heads, seq, head_dim)
    if self.q_norm is not None:
        q = self.q_norm(q)
    if self.k_norm is not None:
        k = self.k_norm(k)
    q, k = _rotate(self.pos_embedding, q, k, attention_mask["position_ids"])
    out, _ = attend(self, q, k, v, None, scaling=self.head_dim**-0.5, **attention_mask)
    return self.out_proj(out.flatten(2)), None, None


def _rotate(
    embedding: RemoteModule, q: Tensor, k: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotary embeddings of the given positions, in float32 as in the remote code.

    Frequencies are computed anew: the module's buffer follows the dtype of the model.
    """
    dim = embedding.model_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=q.device) / dim
    frequency = 1.0 / embedding.freq_constant**exponent
    angle = position_ids[..., None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)  # (batch, seq, head_dim)
    rotated_q, rotated_k = apply_rotary_pos_emb(q.float(), k.float(), angle.cos(), angle.sin())
    return rotated_q.type_as(q), rotated_k.type_as(k)
