"""Transformers' attention interface: how `patch_model` reaches every model but OpenELM.

The implementation has one name per back end. They are registered where this is imported, so that
a model that was patched elsewhere runs in a process that only unpickles it.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator
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
    models = {  # by all of their names
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PreTrainedModel)
    }
    found = {
        id(module): module
        for name, module in models.items()
        if not any(other != name and other.startswith(name) for other in models)
    }
    return list(found.values())


def check(model: PreTrainedModel) -> None:
    """Raises TypeError unless the attention of a model, and of all in it, can be replaced."""
    if model.config.is_encoder_decoder:
        raise TypeError(
            f"{type(model).__name__} has an encoder, whose attention is not causal: a packed row "
            "needs a causal language model"
        )
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
        for layer in _attention_layers(part):
            arguments = inspect.signature(layer.forward).parameters
            kinds = {argument.kind for argument in arguments.values()}
            if "attention_mask" in arguments and inspect.Parameter.VAR_KEYWORD not in kinds:
                raise TypeError(
                    f"{type(layer).__name__} takes no further keyword arguments, so the mask of "
                    "a packed row cannot reach it"
                )


def _attention_layers(part: PreTrainedModel) -> Iterator[nn.Module]:
    return (x for x in part.modules() if hasattr(x, "layer_idx") and hasattr(x, "is_causal"))


def patch(model: PreTrainedModel, impl: str | None) -> None:
    """Lets a model, with all models in it, attend through `view_attention`."""
    cast(Any, model)._before_view_attention = _implementations(model)
    _set_implementation(model, _name(impl))
    for part in innermost(model):
        try:
            impl_of(part)
        except RuntimeError as error:
            raise TypeError(f"{type(part).__name__} cannot be patched: {error}") from error
    if hasattr(model, "generate_batch"):  # models with a head
        vars(model)["generate_batch"] = _GenerateBatch(model)


def _configs(model: PreTrainedModel) -> list[Any]:
    """All that say how a model, or a part of it, attends; those of parts behind the whole's."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
        for each in (config, *parts):
            if hasattr(each, "_attn_implementation"):
                found.setdefault(id(each), each)
    return list(found.values())


def _implementations(model: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """Each config with the implementation that it names when its model is not patched."""
    known = {
        id(config): implementation
        for module in model.modules()
        for config, implementation in vars(module).get("_before_view_attention", ())
    }
    found = []
    for config in _configs(model):
        implementation = config._attn_implementation
        if implementation in _IMPLS:  # patched before, or by a model that shares the config
            implementation = known.get(id(config)) or model.get_correct_attn_implementation(None)
        found.append((config, implementation))
    return found


def _set_implementation(model: PreTrainedModel, name: str) -> None:
    """Has a model, with all models in it, attend by this implementation."""
    model.set_attn_implementation(name)
    for part in innermost(model):
        # Transformers sets none of a class that is written in a notebook, and 5.5 none of a part
        # whose config is another of the same class.
        if part.config._attn_implementation != name:
            part.set_attn_implementation(name)
        for layer in _attention_layers(part):  # a copied one has a config of its own
            own: Any = getattr(layer, "config", part.config)
            if own is not part.config:
                own._attn_implementation = part.config._attn_implementation


def _restore(model: Any) -> None:
    for config, implementation in model._before_view_attention:
        config._attn_implementation = implementation
    _, former = model._before_view_attention[0]
    for config in _configs(model):  # which may have taken the place of one since
        if config._attn_implementation in _IMPLS:
            config._attn_implementation = former


class _GenerateBatch:
    """Transformers' own, which takes none but its own implementations of attention."""

    def __init__(self, model: Any) -> None:
        # So that the model is freed with its last reference.
        self._model = (lambda: None) if model is None else weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        if model is None:
            raise RuntimeError(
                "the patched model that this is a shallow copy of is gone: call patch_model(model) "
                "on the copy before generate_batch"
            )
        ours = model.config._attn_implementation
        try:
            _restore(model)
            return type(model).generate_batch(model, *args, **kwargs)
        finally:
            _set_implementation(model, ours)

    def __deepcopy__(self, memo: dict[int, Any]) -> _GenerateBatch:
        model = self._model()
        return _GenerateBatch(memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return _GenerateBatch, (self._model(),)


def unpatch(model: PreTrainedModel) -> None:
    """Undoes `patch`, if it was called."""
    if "_before_view_attention" in vars(model):
        _restore(model)
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
