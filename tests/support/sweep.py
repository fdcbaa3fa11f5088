"""Every causal language model of the installed Transformers, tiny and with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 64

# What makes a model small, under the names that configurations have for it.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim"), 32),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_inner", "dff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dim_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "attention_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups"), 1),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("pad_token_id", "boi_token_id", "image_token_id", "image_token_index"), 0),
    "bos_token_id": 1,
    "eos_token_id": 3,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 12,
    "sliding_window": 5,
    "hidden_size_per_layer_input": 8,
    "rotary_dim": 4,
    "zero_expert_num": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "hc_mult": 2,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    "num_kv_shared_layers": 0,
}


OWN: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "reformer": {"is_decoder": True},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}


@dataclass(frozen=True)
class Family:
    """A model type of Transformers and what builds a tiny model of it."""

    model_type: str

    def config(self, **more: Any) -> Any:
        kind = CONFIG_MAPPING[self.model_type]
        arguments = _small(kind())
        if "v_head_dim" in arguments:  # values of another width, always in as many heads as queries
            arguments["num_key_value_heads"] = SIZES["num_attention_heads"]
        own = OWN.get(self.model_type, {})
        return kind(**{**arguments, **own, **more})

    def model(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(self.config())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        return model


def _small(config: Any) -> dict[str, Any]:
    """The arguments that make a configuration small, those of the parts that it has included."""
    arguments: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = vars(config).get(name)
        if hasattr(part, "to_dict"):
            arguments[name] = _small(part)
        elif name in SIZES and not isinstance(value, (list, dict)):
            if value is not None or name == "pad_token_id":
                arguments[name] = SIZES[name]
        elif (
            "dropout" in name
            or name.endswith(("pdrop", "layerdrop", "dropout_p", "dropout_prob", "jitter_noise"))
        ) and isinstance(value, float):
            arguments[name] = 0.0
    return arguments


# Of tens of millions of parameters however small the rest; it runs for none of these sizes.
LARGE = {"blt"}


def families() -> list[str]:
    """The model types to try."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - LARGE)
