"""The attention function of every layer, on `view_attention` or under a dense mask."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmjepa_kernels.hf.dense_mask import seen_pairs
from llmjepa_kernels.ops.attention import view_attention
from llmjepa_kernels.ops.dense import biased_attention
from llmjepa_kernels.ops.schedule import forms_of, is_given, masks_for


class _Running(threading.local):
    """The forward of a model that this thread is in."""

    attended: set[int] | None = None  # modules whose attention was `view_attention`
    autocast: torch.dtype | None = None  # where the head of the last forward ran; None if not known


running = _Running()


def is_empty(mask: Any) -> bool:
    """Whether an `attention_mask` is no mask, or the one that stands in for it in packed rows."""
    if isinstance(mask, dict):  # one for each type of layer
        return all(map(is_empty, mask.values()))
    return mask is None or (isinstance(mask, Tensor) and mask.shape[1:] == (1, 0, 0))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    impl: str | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    window_positions: Tensor | None = None,
    visible_until: Tensor | None = None,
    ignore_window: bool = False,
    blind: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, with the arguments and result that Transformers expects."""
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave q and k in float32 where v already is in low precision.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    is_planned = any(is_given(form, kwargs) for form in forms_of(impl))
    packed = visible_until is not None
    if is_empty(attention_mask):
        if packed:
            _check_layer(
                module, query, key, dropout, sliding_window, ignore_window, is_planned, kwargs
            )
        elif attention_mask is not None:
            raise TypeError(
                f"{type(module).__name__} is not given the keyword arguments of its model's "
                "forward, so visible_until cannot reach it"
            )
    elif packed:  # recognised in a dense mask, which can do for any layer
        packed = _fits(
            module, query, key, dropout, sliding_window, ignore_window, is_planned, kwargs
        )
    if visible_until is None or not packed:
        return _dense(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            softcap=softcap,
            sinks=s_aux,
            **kwargs,
        )

    if not torch.compiler.is_compiling() and running.attended is not None:
        running.attended.add(id(module))
    window = None if ignore_window else sliding_window
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    width = value.shape[-1]
    query, key, value = _of_one_width(query, key, value)
    out = view_attention(
        query,
        key,
        value,
        visible_until,
        position_ids=window_positions if window is not None else None,
        window=window,
        softcap=softcap,
        softmax_scale=scale,
        sinks=s_aux,
        impl=impl,
        **masks_for(impl, visible_until, kwargs, window),
    )
    out = out[..., :width]
    if blind is not None:
        mean = value[..., :width].mean(dim=2, keepdim=True)
        mean = mean.repeat_interleave(out.shape[1] // mean.shape[1], dim=1)
        # A sink, which no mask lowers, would take the whole weight.
        mean = mean if s_aux is None else torch.zeros_like(mean)
        out = torch.where(blind[:, None, :, None], mean, out)
    return out.transpose(1, 2), None


def _of_one_width(*qkv: Tensor) -> list[Tensor]:
    """q, k and v with zeros behind those that are narrower, as values of latent attention are."""
    width = max(x.shape[-1] for x in qkv)
    return [x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in qkv]


def _check_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    dropout: float,
    sliding_window: int | None,
    ignore_window: bool,
    is_planned: bool,
    kwargs: dict[str, Any],
) -> None:
    """Refuses what view_attention would otherwise leave out."""
    name = type(module).__name__
    if not is_planned:
        raise RuntimeError(f"the model around {name} is not patched: call patch_model(model) first")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"a packed row cannot continue a KV cache: {name} got {query.shape[2]} queries and "
            f"{key.shape[2]} keys; pass use_cache=False"
        )
    if dropout > 0:
        field = dropout_field(module.config) or "the attention dropout"
        raise ValueError(
            f"attention dropout is not supported with visible_until: set {field} of the model's "
            f"config to 0 before it is built, got {dropout}"
        )
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ValueError(f"visible_until needs causal attention, {name} is bidirectional")
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"view_attention has no position_bias, which {name} passes")
    if sliding_window is None and not ignore_window and _has_window(module):
        raise ValueError(
            f"{name} leaves its sliding window to a dense mask, so a packed row would ignore it"
        )


def _fits(*layer: Any) -> bool:
    """Whether `_check_layer` lets a layer pass."""
    try:
        _check_layer(*layer)
    except (RuntimeError, ValueError):
        return False
    return True


def _has_window(module: nn.Module) -> bool:
    if not hasattr(module, "config"):  # OpenELM's
        return False
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types is not None:
        return layer_types[module.layer_idx] == "sliding_attention"
    window = getattr(module.config, "sliding_window", None)
    hides = window and window < getattr(module.config, "max_position_embeddings", math.inf)
    return bool(hides) and getattr(module.config, "use_sliding_window", True)


_ATTENTION_DROPOUT = (
    "attention_dropout",
    "attn_pdrop",
    "attn_dropout",
    "attention_probs_dropout_prob",
)
_NOISE = ("dropout", "pdrop", "jitter")


def dropout_field(config: Any) -> str | None:
    """Name of the config's field of attention dropout, if that is not 0."""
    return next((field for field in _ATTENTION_DROPOUT if getattr(config, field, None)), None)


def noise_of(config: Any) -> dict[str, float]:
    """The config's fields of other noise in training, by their names."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, float) and value > 0 and any(map(name.__contains__, _NOISE))
        if name not in _ATTENTION_DROPOUT and not name.startswith(("summary_", "classifier_"))
    }


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention under a dense mask, as Transformers' sdpa; where that cannot do it, as its eager.

    That is with soft cap and sinks, and where the weights are asked for.
    """
    config = getattr(module, "config", None)
    wants_weights = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    if softcap is None and sinks is None and not wants_weights:
        if mask is not None and mask.is_floating_point() and mask.dtype != query.dtype:
            # Unlike eager attention, PyTorch wants the mask in the dtype of q. The lowest
            # value of one dtype may be an infinity in another.
            mask = mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )

    q_len, kv_len = query.shape[2], key.shape[2]
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if mask is not None:
        seen = seen_pairs(mask)
        mask = mask if seen is None else seen
    elif q_len > 1 and is_causal:
        # As in sdpa: no mask means causal from the first key on, or all keys for one query.
        mask = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, weights = biased_attention(
        query,
        key,
        value,
        mask,
        softcap=softcap,
        softmax_scale=scale,
        sinks=sinks,
        dropout=dropout if module.training else 0.0,
    )
    return out.transpose(1, 2).contiguous(), weights
