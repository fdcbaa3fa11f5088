"""patch_model: runs Hugging Face models on view_attention, through Transformers' own interfaces.

A forward that is given `visible_until` never builds an attention mask. Its schedule travels to
every layer as keyword arguments that are tensors, which survive gradient checkpointing, DDP,
FSDP, PEFT and torch.compile. A forward without it, generation for example, runs on PyTorch's
scaled_dot_product_attention as if the model were not patched.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmjepa_kernels.hf import openelm as hf_openelm
from llmjepa_kernels.ops.attention import view_attention
from llmjepa_kernels.ops.block_mask import SCHEDULE_KEYS, BlockMask, int32_positions
from llmjepa_kernels.ops.choice import BACKENDS
from llmjepa_kernels.ops.dense import dense_attention, visible
from llmjepa_kernels.ops.flash_plan import FlashPlan, is_plan_key

NAME = "view_attention"  # of the attention implementation, as in `config._attn_implementation`

# Layers that mix tokens by attention alone, under a causal mask with or without a window.
LAYER_TYPES = {"full_attention", "sliding_attention"}

CACHES = ("cache", "past_key_values")  # the latter until Transformers 5.23

# Additive masks hide a pair by a score this low or lower.
HIDDEN = -1e4


def patch_model(model: nn.Module, *, impl: str | None = None) -> nn.Module:
    """Makes a model attend through `view_attention`, in place.

    Afterwards the model takes a `PackedBatch` (``model(**batch)``), and a loop that passes a
    dense 4D mask, bool or additive, takes the block-sparse path whenever that mask has the form
    ``j <= i < visible_until[j]``. Tokens that no token sees, itself included, count as padding,
    whose outputs are arbitrary. Everything else, `generate` included, works as before.

    The implementation is a property of the config: models that share one are patched together.

    Args:
        model: A Transformers model, or a wrapper of one such as PEFT's.
        impl: Back end of `view_attention`. Default: by the device of the activations. For "flash",
            let the data loader make the plan (``pack(..., flash_plan=True)``, or the same option of
            `LLMJEPACollator`): else each forward waits for the device to make it.

    Returns:
        The same model.

    Raises:
        TypeError: The model does not call attention through Transformers' interface, and is not
            OpenELM, which has an adapter of its own.
        ValueError: The model mixes tokens in other ways than causal attention, or is wrapped in
            what cannot carry a packed row (DataParallel, prompt-learning PEFT), or is an OpenELM
            whose forward was replaced before.
    """
    pretrained = _pretrained(model)
    layer_types = set(getattr(pretrained.config.get_text_config(), "layer_types", None) or ())
    if layer_types - LAYER_TYPES:
        raise ValueError(
            f"{type(pretrained).__name__} has layers of type {sorted(layer_types - LAYER_TYPES)}, "
            f"in which the views of a packed row would see each other; expected only "
            f"{sorted(LAYER_TYPES)}"
        )
    openelm = hf_openelm.is_openelm(pretrained)
    for part in _innermost(pretrained):
        if not openelm and not part._can_set_attn_implementation():
            raise TypeError(
                f"{type(part).__name__} does not call attention through Transformers' "
                "AttentionInterface, so its attention cannot be replaced"
            )

    if openelm:
        hf_openelm.check_forwards(pretrained)
    name = _register(impl)
    if openelm:
        _add_hooks(pretrained)
        hf_openelm.patch(pretrained, functools.partial(_attention, impl=impl))
        return model
    previous = pretrained.config._attn_implementation
    if previous.startswith(NAME):  # patched before, or by a model that shares the config
        previous = getattr(pretrained, "_before_view_attention", None)
        previous = previous or pretrained.get_correct_attn_implementation(None)
    pretrained._before_view_attention = previous
    pretrained.set_attn_implementation(name)
    _add_hooks(pretrained)
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Gives a model its former attention implementation back; returns the same model."""
    pretrained = _pretrained(model)
    if hf_openelm.is_openelm(pretrained):
        hf_openelm.unpatch(pretrained)
        _remove_hooks(pretrained)
    elif hasattr(pretrained, "_before_view_attention"):
        pretrained.set_attn_implementation(pretrained._before_view_attention)
        del pretrained._before_view_attention
        _remove_hooks(pretrained)
    return model


def patched_impl(model: nn.Module) -> str | None:
    """The `impl` that a model was patched with; raises RuntimeError if it was not patched."""
    pretrained = _pretrained(model)
    attends = {_attend_of(part) for part in _innermost(pretrained) if _has_hook(part)}
    attend = attends.pop() if len(attends) == 1 else None
    if attend is None:
        raise RuntimeError(
            f"{type(pretrained).__name__} is not patched, so it cannot keep the views of a packed "
            "row apart: call patch_model(model) first"
        )
    return attend.keywords["impl"]


def _attend_of(part: PreTrainedModel) -> functools.partial | None:
    """The `_attention` that a model without models in it was patched with, or None."""
    if (attend := hf_openelm.attend_of(part)) is not None:
        return attend
    name = part.config._attn_implementation
    return ALL_ATTENTION_FUNCTIONS[name] if name.startswith(NAME) else None


def _pretrained(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside any wrappers that can carry a packed row."""
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "DataParallel is not supported, since it cuts a batch apart between threads: use "
            "DistributedDataParallel, or one GPU"
        )
    for config in (getattr(model, "peft_config", None) or {}).values():
        if config.is_prompt_learning:
            raise ValueError(
                f"PEFT's {config.peft_type.value} is not supported, since it puts virtual tokens "
                "in front of the packed row: use LoRA or another adapter of weights"
            )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model must be a Transformers model or wrap one, got {type(model).__name__}")


def _innermost(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models that hold the layers, and are called with keyword arguments by those around."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [m for m in models if not any(isinstance(x, PreTrainedModel) for x in _inside(m))]


def _inside(module: nn.Module) -> list[nn.Module]:
    return list(module.modules())[1:]


def _has_hook(module: nn.Module) -> bool:
    return any(hook is _prepare for hook in module._forward_pre_hooks.values())


def _add_hooks(model: PreTrainedModel) -> None:
    for part in _innermost(model):
        if not _has_hook(part):
            part.register_forward_pre_hook(_prepare, with_kwargs=True)


def _remove_hooks(model: PreTrainedModel) -> None:
    for part in _innermost(model):
        hooks = part._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _prepare]:
            del hooks[key], part._forward_pre_hooks_with_kwargs[key]


def _register(impl: str | None) -> str:
    if impl is not None and impl not in BACKENDS:
        raise ValueError(f"impl must be one of {sorted(BACKENDS)} or None, got {impl!r}")
    # Transformers takes any name with "flash" in it for one of its own.
    name = NAME if impl is None else f"{NAME}_{impl.replace('flash', 'varlen')}"
    AttentionInterface.register(name, functools.partial(_attention, impl=impl))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


# Once per forward: a hook that checks a packed row, or recognises one in a dense mask


def _prepare(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    visible_until = kwargs.get("visible_until")
    if visible_until is not None:
        _check_packed(module, args, kwargs)
    else:
        recognised = _recognised(module, args, kwargs)
        if recognised is None:
            return None
        kwargs = {**kwargs, **recognised}
        visible_until = kwargs["visible_until"]
    schedule = _schedule(module, visible_until, kwargs)
    if kwargs.get("position_ids") is not None:  # for windows; once, not in every layer
        schedule["window_positions"] = int32_positions(kwargs["position_ids"])
    # Transformers hands a 4D mask to every layer untouched instead of building one. Nothing can
    # apply an empty mask unnoticed, should a layer not attend through view_attention.
    empty = visible_until.new_empty((len(visible_until), 1, 0, 0), dtype=torch.bool)
    return args, {**kwargs, **schedule, "attention_mask": empty}


def _schedule(
    module: nn.Module, visible_until: Tensor, kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """What the layers need besides the mask itself, if it is not among the arguments."""
    if _attend_of(module).keywords["impl"] == "flash":
        if any(map(is_plan_key, kwargs)):
            return {}
        positions = kwargs.get("position_ids")
        if positions is None:  # with a recognised dense mask
            positions = torch.arange(visible_until.shape[1])
        positions = positions.expand_as(visible_until)
        return FlashPlan.from_visible_until(visible_until, position_ids=positions).schedule()
    given = [key for key in SCHEDULE_KEYS if kwargs.get(key) is not None]
    if not given:
        return BlockMask.from_visible_until(visible_until).schedule()
    if len(given) < len(SCHEDULE_KEYS):
        missing = [key for key in SCHEDULE_KEYS if key not in given]
        raise ValueError(f"the schedule of visible_until is incomplete, it lacks {missing}")
    if not torch.compiler.is_compiling():  # the answer depends on data
        BlockMask.from_schedule(visible_until, kwargs).check()
    return {}


def _check_packed(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if getattr(module, "_is_replica", False):
        raise ValueError("DataParallel is not supported: use DistributedDataParallel, or one GPU")
    tokens = _tokens(args, kwargs)
    if tokens is None:
        return  # the model's own forward says what is missing
    if "position_ids" not in inspect.signature(type(module).forward).parameters:
        raise ValueError(
            f"{type(module).__name__} takes no position_ids, so the positions of a packed row "
            "would run on from one segment to the next"
        )
    visible_until, position_ids = kwargs["visible_until"], kwargs.get("position_ids")
    shape = tuple(tokens.shape[:2])
    if visible_until.dtype != torch.int32 or visible_until.shape != shape:
        raise ValueError(
            f"visible_until must be int32 of shape {shape} like the tokens, got "
            f"{visible_until.dtype} of shape {tuple(visible_until.shape)}"
        )
    if position_ids is None:
        raise ValueError(
            "position_ids must be given with visible_until, since the positions of a packed row "
            "are not those of its tokens; got None"
        )
    if position_ids.shape != shape:
        raise ValueError(
            f"position_ids must have the shape {shape} of the tokens, got "
            f"{tuple(position_ids.shape)}"
        )
    if not _is_empty(kwargs.get("attention_mask")):
        raise ValueError(
            "attention_mask must not be given with visible_until, which is the whole mask"
        )
    for name in CACHES:
        if kwargs.get(name) is None:
            continue
        raise ValueError(
            f"{name} must not be given with visible_until: a packed row cannot continue a KV cache"
        )


def _is_empty(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.shape[1:] == (1, 0, 0))


def _tokens(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Token ids or embeddings, whose first dimensions are (batch, seq)."""
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    return next((tokens for tokens in candidates if tokens is not None), None)


def _recognised(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What takes the place of the dense mask among the arguments, if that can be replaced."""
    given = kwargs.get("attention_mask")
    per_layer_type = isinstance(given, dict) and given.keys() <= LAYER_TYPES
    mask = given.get("full_attention") if per_layer_type else given
    tokens = _tokens(args, kwargs)
    if (
        not isinstance(mask, Tensor)
        or tokens is None
        or mask.shape[1:] != (1, tokens.shape[1], tokens.shape[1])
        or mask.requires_grad
        or any(kwargs.get(name) is not None for name in CACHES)
        or (module.training and _dropout_field(module.config) is not None)
        or torch.compiler.is_compiling()  # the answer depends on data
    ):
        return None
    visible_until = visible_until_of(mask[:, 0])
    if visible_until is None:
        return None
    visible_until = visible_until.expand(len(tokens), -1).contiguous()
    if not per_layer_type:
        # Transformers applies one 4D mask as it is, also in layers with a sliding window.
        return {"visible_until": visible_until, "ignore_window": True}

    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(tokens.shape[1], device=mask.device)
    position_ids = position_ids.expand(len(tokens), -1)
    if "sliding_attention" in given:
        seen = _seen(given["sliding_attention"])
        window = visible(visible_until, position_ids, module.config.sliding_window)
        if seen is None or seen.shape != mask.shape or not _same(window, seen[:, 0]):
            return None
    return {"visible_until": visible_until, "position_ids": position_ids}


def visible_until_of(mask: Tensor) -> Tensor | None:
    """The vector that describes a dense mask, or None if no vector does.

    Args:
        mask: (batch, seq, seq), queries before keys: bool, True where visible, or floating
            point, 0 where visible and −10⁴ or less where not.

    Returns:
        visible_until: (batch, seq) int32.
    """
    seen = _seen(mask)
    if seen is None:
        return None
    viewers = seen.sum(dim=1)
    padding = viewers == 0
    index = torch.arange(mask.shape[-1], device=mask.device)
    visible_until = (index + viewers + padding).clamp(max=mask.shape[-1]).int()
    return visible_until if _same(visible(visible_until), seen) else None


def _seen(mask: Tensor) -> Tensor | None:
    """A dense mask as bool, or None if it does more than to hide pairs."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    return seen if (seen | (mask <= HIDDEN)).all() else None


def _same(expected: Tensor, seen: Tensor) -> bool:
    """Whether two masks agree, but for the queries of tokens that `seen` shows to nobody."""
    padding = ~seen.any(dim=1)
    return bool(((expected == seen) | padding[:, :, None]).all())


# In every layer: the attention function


def _attention(
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, with the arguments and result that Transformers expects."""
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave q and k in float32 where v already is in low precision.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    if visible_until is None:
        if attention_mask is not None and _is_empty(attention_mask):
            raise TypeError(
                f"{type(module).__name__} is not given the keyword arguments of its model's "
                "forward, so visible_until cannot reach it"
            )
        out = _dense(
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
        return out, None

    has_plan = impl in (None, "flash") and any(map(is_plan_key, kwargs))
    if not has_plan and SCHEDULE_KEYS[0] not in kwargs:
        name = type(module).__name__
        raise RuntimeError(f"the model around {name} is not patched: call patch_model(model) first")
    _check_layer(module, query, key, dropout, sliding_window, kwargs)
    window = None if ignore_window else sliding_window
    block_mask = None if impl == "flash" else BlockMask.from_schedule(visible_until, kwargs)
    out = view_attention(
        query,
        key,
        value,
        visible_until,
        position_ids=window_positions if window is not None else None,
        window=window,
        softcap=softcap,
        softmax_scale=scaling,
        sinks=s_aux,
        block_mask=block_mask,
        flash_plan=FlashPlan.from_schedule(visible_until, kwargs) if has_plan else None,
        impl=impl,
    )
    return out.transpose(1, 2), None


def _check_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    dropout: float,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuses what view_attention would otherwise leave out."""
    name = type(module).__name__
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"a packed row cannot continue a KV cache: {name} got {query.shape[2]} queries and "
            f"{key.shape[2]} keys; pass use_cache=False"
        )
    if dropout > 0:
        field = _dropout_field(module.config) or "the attention dropout"
        raise ValueError(
            f"attention dropout is not supported with visible_until: set {field} of the model's "
            f"config to 0 before it is built, got {dropout}"
        )
    if not getattr(module, "is_causal", True):
        raise ValueError(f"visible_until needs causal attention, {name} is bidirectional")
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"view_attention has no position_bias, which {name} passes")
    if sliding_window is None and _has_window(module):
        raise ValueError(
            f"{name} leaves its sliding window to a dense mask, so a packed row would ignore it"
        )


def _has_window(module: nn.Module) -> bool:
    if not hasattr(module, "config"):  # OpenELM's
        return False
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types is not None:
        return layer_types[module.layer_idx] == "sliding_attention"
    window = getattr(module.config, "sliding_window", None)
    return bool(window) and getattr(module.config, "use_sliding_window", True)


def _dropout_field(config: Any) -> str | None:
    """Name of the config's field of attention dropout, if that is not 0."""
    fields = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
    return next((field for field in fields if getattr(config, field, None)), None)


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
) -> Tensor:
    """Attention under a dense mask, as Transformers' sdpa, and with soft cap and sinks as well."""
    if softcap is None and sinks is None:
        if mask is not None and mask.is_floating_point() and mask.dtype != query.dtype:
            # Unlike eager attention, PyTorch wants the mask in the dtype of q. The lowest
            # value of one dtype may be an infinity in another.
            mask = mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out

    if dropout > 0:
        field = _dropout_field(module.config) or "the attention dropout"
        raise ValueError(
            f"attention dropout is not supported with soft cap or sinks: set {field} of the "
            f"model's config to 0 before it is built, got {dropout}"
        )
    q_len, kv_len = query.shape[2], key.shape[2]
    if mask is None:
        # As in sdpa: no mask means causal from the first key on, or all keys for one query.
        seen = None
        if q_len > 1 and getattr(module, "is_causal", True):
            seen = torch.ones(1, q_len, kv_len, dtype=torch.bool, device=query.device).tril()
    elif mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask must have one head with soft cap or sinks, got {mask.shape[1]}"
        )
    else:
        seen = _seen(mask[:, 0])
        if seen is None:
            raise ValueError(
                "attention_mask must be bool, or 0 where visible and -1e4 or less elsewhere, with "
                "soft cap or sinks; got other values"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, _ = dense_attention(
        query, key, value, seen, softcap=softcap, softmax_scale=scale, sinks=sinks
    )
    return out.transpose(1, 2)
