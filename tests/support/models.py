"""Tiny random models of every supported family, in float32 or float64, without dropout."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

from tests.support.openelm import OpenELMConfig

VOCAB = 64
# Of Transformers: what its own code does there in some places is not what the tests expect.
BEFORE_5_17 = Version(transformers.__version__) < Version("5.17")
# The option of TrainingArguments, whose name Transformers has changed.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
HEAD = {"head_dim": 8}
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"]}
WINDOW = 5  # shorter than most sequences of the tests

FAMILIES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", HEAD),
    "qwen3_window": (
        "qwen3",
        {**HEAD, "use_sliding_window": True, "sliding_window": WINDOW, **ALTERNATE},
    ),
    "mistral": ("mistral", {**HEAD, "sliding_window": None}),
    "mistral_window": ("mistral", {**HEAD, "sliding_window": WINDOW}),
    "gemma2": (
        "gemma2",
        {
            **HEAD,
            **ALTERNATE,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 4,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {**HEAD, **ALTERNATE, "sliding_window": WINDOW, "query_pre_attn_scalar": 4},
    ),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "granite": ("granite", {"logits_scaling": 3.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**ALTERNATE, "sliding_window": WINDOW}),
    "phi": ("phi", {"partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "smollm3": (
        "smollm3",
        {
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            **ALTERNATE,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **HEAD,
            **ALTERNATE,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# With a loss that balances the load of experts.
MIXTURES = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**HEAD, **EXPERTS}),
    "olmoe": ("olmoe", EXPERTS),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": FAMILIES["gpt_oss"],
}


def tiny_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **options
) -> PreTrainedModel:
    """A model in training mode, with weights large enough for attention to be far from uniform."""
    if family == "openelm":  # remote code, with its own names
        special = {key: COMMON[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
        config = OpenELMConfig(**{**special, **options})
    else:
        model_type, own = (FAMILIES | MIXTURES)[family]
        config = CONFIG_MAPPING[model_type](**{**COMMON, **own, **options})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * noise)
    return model.to(dtype).train()


def checkpoint_activations(model: PreTrainedModel, *, reentrant: bool = False) -> None:
    """Activations are computed again in the backward pass, under either name of the method."""
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
