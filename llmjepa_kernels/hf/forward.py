"""Once per forward of a patched model: hooks before and after the layers.

Before, a packed row is checked, or recognised in a dense mask, and completed to what the layers
need. After, the language model head is left the tokens that need logits. It happens where the
model that holds the layers ends, so it asks nothing of the head, of the loss or of Transformers'
version: whatever follows (final norm and soft cap aside: LoRA, tied or replaced weights, Liger's
forward) gets fewer tokens, and the last hidden state travels beside them in `hidden_states`.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llmjepa_kernels.hf import interface, openelm
from llmjepa_kernels.hf.dense_mask import recognise, warn_of_lost_labels
from llmjepa_kernels.hf.experts import names_real_tokens, returns_aux_loss
from llmjepa_kernels.hf.layer import dropout_field, is_empty, running
from llmjepa_kernels.ops.block_mask import BlockMask, int32_positions
from llmjepa_kernels.ops.schedule import FORMS, forms_of, is_given

CACHES = ("cache", "past_key_values")  # the latter until Transformers 5.23


def adapter_of(model: PreTrainedModel) -> ModuleType:
    """What makes a model attend through `view_attention`: check, patch, unpatch and impl_of."""
    return openelm if model.config.model_type == openelm.MODEL_TYPE else interface


def has_hooks(module: nn.Module) -> bool:
    """Whether `add_hooks` was called."""
    return any(hook is _before for hook in module._forward_pre_hooks.values())


def add_hooks(model: PreTrainedModel) -> None:
    """Lets the models that hold the layers take packed rows, once they are patched otherwise."""
    for part in interface.innermost(model):
        if not has_hooks(part):
            part.register_forward_pre_hook(_before, with_kwargs=True)
            part.register_forward_hook(_after, with_kwargs=True)
    if model not in interface.innermost(model) and (
        _before_loss not in model._forward_pre_hooks.values()
    ):
        model.register_forward_pre_hook(_before_loss, with_kwargs=True)
    for part in _composite(model):
        if _before_parts not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_before_parts, with_kwargs=True)


def remove_hooks(model: PreTrainedModel) -> None:
    """Undoes `add_hooks`, if it was called."""
    for module in [*interface.innermost(model), *_composite(model), model]:
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            ours = (_before, _after, _before_parts, _before_loss)
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key], with_kwargs[key]


def _composite(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models around a language model and others, such as an encoder of images."""
    inner = interface.innermost(model)
    return [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        and part not in inner
        and part.config is not part.config.get_text_config()
    ]


def _before_parts(
    module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Keeps a composite model from building masks for the language model in it."""
    visible_until, mask = kwargs.get("visible_until"), kwargs.get("attention_mask")
    of_experts = names_real_tokens(mask, module.config)
    if visible_until is None or not (is_empty(mask) or of_experts):
        return None
    for name, value in kwargs.items():
        if value is not None and name.startswith(("pixel_values", "input_features")):
            raise ValueError(
                f"{name} must not be given with visible_until: rows are packed of text alone"
            )
    if of_experts and module.get_output_embeddings() is not None:
        return None  # the loss of the experts is computed here
    return args, {**kwargs, "attention_mask": _empty_mask(visible_until)}


def _before_loss(module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    packed = kwargs.get("visible_until") is not None and is_empty(kwargs.get("attention_mask"))
    wanted = kwargs.get("output_router_logits") is not False
    if packed and wanted and returns_aux_loss(module.config):
        raise ValueError(
            f"{type(module).__name__} returns a loss that balances its experts "
            "(output_router_logits=True), for which it must know the padding of a packed row: call "
            "llm_jepa_loss, or LLMJEPATrainer, which tell it"
        )
    if not torch.compiler.is_compiling():
        warn_of_lost_labels(kwargs.get("attention_mask"), kwargs.get("labels"))


def _before(
    module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    running.attended = None
    visible_until = kwargs.get("visible_until")
    if visible_until is not None:
        _check_packed(module, args, kwargs)
    else:
        recognised = _recognised(module, args, kwargs)
        if recognised is None:
            return None
        kwargs = {**kwargs, **recognised}
        visible_until = kwargs["visible_until"]
    kwargs = {**kwargs, **_schedule(module, visible_until, kwargs)}
    if kwargs.get("position_ids") is not None:  # for windows; once, not in every layer
        kwargs["window_positions"] = int32_positions(kwargs["position_ids"])
        within = _schedule_within(module, visible_until, kwargs)
        mark_varying(within.values())  # where the layers are compiled one by one
        kwargs |= within
    mask = kwargs.get("attention_mask")
    if not (is_empty(mask) or names_real_tokens(mask, module.config)):
        return args, kwargs  # recognised; layers that cannot do without the dense mask take it
    if not torch.compiler.is_compiling():
        running.attended = set()
    return args, {**kwargs, "attention_mask": _empty_mask(visible_until)}


def _empty_mask(visible_until: Tensor) -> Tensor:
    """What stands in for a dense mask.

    Transformers hands a 4D mask to every layer untouched instead of building one. Nothing can
    apply an empty one unnoticed, should a layer not attend through view_attention.
    """
    return visible_until.new_empty((len(visible_until), 1, 0, 0), dtype=torch.bool)


def _after(module: PreTrainedModel, args: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
    if not torch.compiler.is_compiling():
        _check_attended(module)
    positions = kwargs.get("head_positions")
    if positions is None:
        return
    if not isinstance(outputs, ModelOutput) or "last_hidden_state" not in outputs:
        raise RuntimeError(
            f"{type(module).__name__} must return a last_hidden_state, of which the head gets "
            f"head_positions, got {type(outputs).__name__}"
        )
    hidden = outputs["last_hidden_state"]
    if not torch.compiler.is_compiling() and torch.is_autocast_enabled(hidden.device.type):
        running.autocast = torch.get_autocast_dtype(hidden.device.type)
    outputs["last_hidden_state"] = gather_tokens(hidden, positions)
    # Those of the layers too, if they are asked for.
    of_layers = outputs.get("hidden_states") if kwargs.get("output_hidden_states") else None
    outputs["hidden_states"] = (*(of_layers or ())[:-1], hidden)


def gather_tokens(hidden: Tensor, positions: Tensor) -> Tensor:
    """(batch, seq, hidden_size) and (batch, n) -> (batch, n, hidden_size); −1 takes the first."""
    # Unlike this, indexing and torch.take_along_dim are compiled anew for each length.
    index = positions.clamp(min=0).to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)


def mark_varying(tensors: Iterable[Tensor]) -> None:
    """Tells torch.compile that all sizes may differ in the next batch: one graph is for all.

    Left alone, it would compile again for each size that first changes later than others.
    """
    dynamo = sys.modules.get("torch._dynamo")  # where it is in use; its import takes seconds
    if dynamo is not None and not torch.compiler.is_compiling():
        for x in tensors:
            dynamo.maybe_mark_dynamic(x, list(range(x.dim())))


def _check_attended(module: PreTrainedModel) -> None:
    """Raises RuntimeError if a layer attended to a packed row by itself, past `view_attention`."""
    attended, running.attended = running.attended, None
    layers = _self_attending_layers(module.config)
    if attended is None or layers is None or len(attended) >= layers:
        return
    if any(map(_is_compiled, module.modules())):  # compiled code does not count
        return
    raise RuntimeError(
        f"only {len(attended)} of the {layers} layers of {type(module).__name__} attended through "
        "view_attention, so views of a packed row saw each other in the others: something else "
        "has replaced their forward, or not all run (layerdrop, or layers that were removed while "
        "the config still counts them in num_hidden_layers)"
    )


def _self_attending_layers(config: Any) -> int | None:
    # Some name the layers of an encoder so; and a layer of cross-attention is left out of text.
    layers = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    return layers and layers - len(getattr(config, "cross_attention_layers", None) or ())


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(
        module.forward, "_torchdynamo_orig_callable"
    )


def _attends(module: PreTrainedModel) -> bool:
    """Whether the model was given no other attention after `patch_model`."""
    try:
        adapter_of(module).impl_of(module)
    except RuntimeError:
        return False
    return True


def _recognised(
    module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """What takes the place of a dense mask among the arguments, if that can be replaced."""
    tokens = _tokens(args, kwargs)
    if (
        tokens is None
        or is_empty(kwargs.get("attention_mask"))
        or torch.compiler.is_compiling()  # the answer depends on data
        or any(kwargs.get(name) is not None for name in CACHES)
        or _wants_more(module, kwargs)
        or (module.training and dropout_field(module.config) is not None)
        or not _attends(module)
    ):
        return None
    return recognise(
        kwargs["attention_mask"],
        *tokens.shape[:2],
        position_ids=kwargs.get("position_ids"),
        window=getattr(module.config, "sliding_window", None),
    )


def _wants_more(module: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether a forward is asked for what the kernels do not know.

    That are the weights of attention, and positions of several dimensions, by which a window would
    be measured.
    """
    weights = kwargs.get("output_attentions")
    if weights is None:
        weights = getattr(module.config, "output_attentions", False)
    positions = kwargs.get("position_ids")
    return bool(weights) or (positions is not None and positions.dim() > 2)


def _schedule(
    module: PreTrainedModel, visible_until: Tensor, kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """What the layers need besides the mask itself, if it is not among the arguments."""
    form = forms_of(adapter_of(module).impl_of(module))[0]
    if not is_given(form, kwargs):
        positions = kwargs.get("position_ids")
        if positions is None:  # with a recognised dense mask
            positions = torch.arange(visible_until.shape[1])
        positions = positions.expand_as(visible_until)
        return FORMS[form].from_visible_until(visible_until, position_ids=positions).schedule()
    if not torch.compiler.is_compiling():  # the answer depends on data
        FORMS[form].from_schedule(visible_until, kwargs).check()
    return {}


def _schedule_within(
    module: PreTrainedModel, visible_until: Tensor, kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """The tiles that the model's sliding window leaves, for the layers that have it."""
    window = getattr(module.config, "sliding_window", None)
    if not window or kwargs.get("ignore_window") or not is_given("block_mask", kwargs):
        return {}
    mask = BlockMask.from_schedule(visible_until, kwargs, window)
    if mask.window is not None:  # given
        return {}
    positions = kwargs["window_positions"]
    on_host = positions.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and int(positions.max() - positions.min()) < window:  # it hides nothing
        return dataclasses.replace(mask, window=window).schedule()
    return mask.within(window, positions).schedule()


def _check_packed(module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    if getattr(module, "_is_replica", False):
        raise ValueError("DataParallel is not supported: use DistributedDataParallel, or one GPU")
    tokens = _tokens(args, kwargs)
    if tokens is None:
        return  # the model's own forward says what is missing
    try:
        adapter_of(module).impl_of(module)
    except RuntimeError as error:
        raise RuntimeError(
            f"{type(module).__name__} cannot keep the views of a packed row apart any more, since "
            f"{error}: call patch_model(model) again"
        ) from error
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
    mask = kwargs.get("attention_mask")
    if not (is_empty(mask) or names_real_tokens(mask, module.config)):
        raise ValueError(
            "attention_mask must not be given with visible_until, which is the whole mask"
        )
    for name in CACHES:
        if kwargs.get(name) is None:
            continue
        raise ValueError(
            f"{name} must not be given with visible_until: a packed row cannot continue a KV cache"
        )


def _tokens(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Token ids or embeddings, whose first dimensions are (batch, seq)."""
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    return next((tokens for tokens in candidates if tokens is not None), None)
