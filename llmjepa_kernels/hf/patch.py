"""patch_model: runs Hugging Face models on view_attention, through Transformers' own interfaces.

A forward that is given `visible_until` never builds an attention mask. Its schedule travels to
every layer as keyword arguments that are tensors, which survive gradient checkpointing, DDP,
FSDP, PEFT and torch.compile. A forward without it, generation for example, runs on PyTorch's
scaled_dot_product_attention as if the model were not patched.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from llmjepa_kernels.hf.forward import adapter_of, add_hooks, has_hooks, remove_hooks
from llmjepa_kernels.hf.interface import innermost
from llmjepa_kernels.hf.layer import noise_of
from llmjepa_kernels.ops.choice import BACKENDS

# Layers that mix tokens by attention alone, under a causal mask with or without a window.
LAYER_TYPES = {"full_attention", "sliding_attention"}

Model = TypeVar("Model", bound=nn.Module)


def patch_model(model: Model, *, impl: str | None = None) -> Model:
    """Makes a model attend through `view_attention`, in place.

    Afterwards the model takes a `PackedBatch` (``model(**batch)``), and a loop that passes a
    dense 4D mask, bool or additive, takes the block-sparse path whenever that mask has the form
    ``j <= i < visible_until[j]``. Tokens that no token sees, itself included, count as padding:
    under an additive mask of finite numbers their outputs are those of the dense path, under others
    arbitrary. Everything else, `generate` included, works as before.

    Transformers keeps the implementation in the config. Of models that share one, each must be
    patched to take a `PackedBatch`; `unpatch_model` of one is felt by all.

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
    pretrained = pretrained_model(model)
    if impl is not None and impl not in BACKENDS:
        raise ValueError(f"impl must be one of {sorted(BACKENDS)} or None, got {impl!r}")
    layer_types = set(getattr(pretrained.config.get_text_config(), "layer_types", None) or ())
    if layer_types - LAYER_TYPES:
        raise ValueError(
            f"{type(pretrained).__name__} has layers of type {sorted(layer_types - LAYER_TYPES)}, "
            f"in which the views of a packed row would see each other; expected only "
            f"{sorted(LAYER_TYPES)}"
        )
    adapter = adapter_of(pretrained)
    adapter.check(pretrained)
    add_hooks(pretrained)
    adapter.patch(pretrained, impl)
    if noise := noise_of(pretrained.config.get_text_config()):
        warnings.warn(
            f"{type(pretrained).__name__} adds noise in training ({noise}): a packed row draws "
            "other numbers than separate passes, so their losses differ by chance",
            stacklevel=2,
        )
    inside = set(pretrained.modules())
    others = [x for x in model.modules() if isinstance(x, PreTrainedModel) and x not in inside]
    if others:
        warnings.warn(
            f"the first {type(pretrained).__name__} in {type(model).__name__} is patched, not the "
            f"{type(others[0]).__name__} beside it: call patch_model on the one that is trained",
            stacklevel=2,
        )
    return model


def unpatch_model(model: Model) -> Model:
    """Gives a model its former attention implementation back; returns the same model."""
    pretrained = pretrained_model(model)
    adapter_of(pretrained).unpatch(pretrained)
    remove_hooks(pretrained)
    return model


def patched_impl(model: nn.Module) -> str | None:
    """The `impl` that a model was patched with; raises RuntimeError if it was not patched."""
    pretrained = pretrained_model(model)
    adapter = adapter_of(pretrained)
    reason = ""
    try:
        impls = {adapter.impl_of(part) for part in innermost(pretrained) if has_hooks(part)}
    except RuntimeError as error:  # patched, and given another implementation since
        impls, reason = set(), f" ({error})"
    if len(impls) != 1:
        raise RuntimeError(
            f"{type(pretrained).__name__} is not patched{reason}, so it cannot keep the views of "
            "a packed row apart: call patch_model(model) first"
        )
    return impls.pop()


def pretrained_model(model: nn.Module) -> PreTrainedModel:
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
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                "PEFT's activated LoRA is not supported, since it begins at one place of a row, "
                "and a packed row has many: use LoRA without alora_invocation_tokens"
            )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model must be a Transformers model or wrap one, got {type(model).__name__}")
