"""Transformers' attention interface: how `patch_model` reaches every model but OpenELM.

The implementation has one name per back end. They are registered where this is imported, so that
a model that was patched elsewhere runs in a process that only unpickles it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from llmjepa_kernels.hf.layer import attention
from llmjepa_kernels.ops.choice import BACKENDS

# One of these at least a model supports besides eager attention if it calls the interface.
OTHERS = ("sdpa", "flash_attn", "flex_attn", "attention_backend")
# What some models do, which the interface does not show.
DEVIATING = {
    "doge": "adds scores of its own to the mask",
    "stablelm": "hands no further arguments on to its attention",
}

NAME = "view_attention"  # of the attention implementation, as in `config._attn_implementation`


def _name(impl: str | None) -> str:
    # Transformers takes any name with "flash" in it for one of its own.
    return NAME if impl is None else f"{NAME}_{impl.replace('flash', 'varlen')}"


def _mask(*args: Any, **kwargs: Any) -> Any:
    """Transformers' mask for sdpa, which may be none for a causal one.

    Not in Gemma 4, which cuts queries off in the layers that share keys, but leaves the
    implementations alone whose names say that no mask means a causal one from the first key on.
    """
    if getattr(kwargs.get("config"), "num_kv_shared_layers", None):
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


_IMPLS = {_name(impl): impl for impl in (None, *BACKENDS)}

for _registered, _impl in _IMPLS.items():
    AttentionInterface.register(_registered, functools.partial(attention, impl=_impl))
    AttentionMaskInterface.register(_registered, _mask)


def innermost(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models that hold the layers, and are called with keyword arguments by those around."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [m for m in models if not any(isinstance(x, PreTrainedModel) for x in _inside(m))]


def _inside(module: nn.Module) -> list[nn.Module]:
    return list(module.modules())[1:]


def check(model: PreTrainedModel) -> None:
    """Raises TypeError unless the attention of a model, and of all in it, can be replaced."""
    for part in innermost(model):
        if not part._can_set_attn_implementation() or not any(
            getattr(part, f"_supports_{other}") for other in OTHERS
        ):
            raise TypeError(
                f"{type(part).__name__} does not call attention through Transformers' "
                "AttentionInterface, so its attention cannot be replaced"
            )
        if reason := DEVIATING.get(part.config.model_type):
            raise TypeError(f"{type(part).__name__} {reason}, so its attention cannot be replaced")
        for layer in part.modules():
            arguments = inspect.signature(layer.forward).parameters
            kinds = {argument.kind for argument in arguments.values()}
            if (
                hasattr(layer, "layer_idx")
                and hasattr(layer, "is_causal")
                and "attention_mask" in arguments
                and inspect.Parameter.VAR_KEYWORD not in kinds
            ):
                raise TypeError(
                    f"{type(layer).__name__} takes no further keyword arguments, so the mask of "
                    "a packed row cannot reach it"
                )


def patch(model: PreTrainedModel, impl: str | None) -> None:
    """Lets a model, with all models in it, attend through `view_attention`."""
    previous: Any = _implementations(model.config)
    if previous[""] in _IMPLS:  # patched before, or by a model that shares the config
        previous = getattr(model, "_before_view_attention", None)
        previous = previous or model.get_correct_attn_implementation(None)
    cast(Any, model)._before_view_attention = previous
    _set_implementation(model, _name(impl))
    for part in innermost(model):
        try:
            impl_of(part)
        except RuntimeError as error:
            raise TypeError(f"{type(part).__name__} cannot be patched: {error}") from error
    if hasattr(model, "generate_batch"):  # models with a head
        vars(model)["generate_batch"] = functools.partial(_generate_batch, model)


def _implementations(config: Any) -> dict[str, str]:
    """That of each of its parts, as `set_attn_implementation` takes them, and its own for ""."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    found = {name: getattr(part, "_attn_implementation", None) for name, part in parts.items()}
    chosen = {name: implementation for name, implementation in found.items() if implementation}
    return {"": config._attn_implementation, **chosen}


def _set_implementation(model: PreTrainedModel, chosen: str | dict[str, str]) -> None:
    """Has a model attend by this implementation, or its parts by one each."""
    model.set_attn_implementation(chosen)
    # Of a class that is written in a notebook Transformers sets none, but shares its config.
    own = chosen if isinstance(chosen, str) else chosen[""]
    for part in innermost(model):
        if part.config is model.config and part.config._attn_implementation != own:
            part.set_attn_implementation(own)


def _generate_batch(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own, which takes none but its own implementations of attention."""
    ours = model.config._attn_implementation
    try:
        _set_implementation(model, model._before_view_attention)
        return type(model).generate_batch(model, *args, **kwargs)
    finally:
        _set_implementation(model, ours)


def unpatch(model: PreTrainedModel) -> None:
    """Undoes `patch`, if it was called."""
    previous = vars(model).get("_before_view_attention")
    if previous is not None:
        _set_implementation(model, previous)
        vars(model).pop("_before_view_attention")
        vars(model).pop("generate_batch", None)


def impl_of(model: PreTrainedModel) -> str | None:
    """The `impl` that an innermost model was patched with.

    Raises:
        RuntimeError: It does not attend through `view_attention`.
    """
    name = model.config._attn_implementation
    if name not in _IMPLS:
        raise RuntimeError(f"its attention implementation is {name!r}")
    return _IMPLS[name]
