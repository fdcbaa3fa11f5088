"""A miniature of OpenELM's remote code, for Transformers 5: what matters to attention is kept.

Heads and feed-forward widths vary by layer, q, k and v are one projection, q and k are normalised,
RoPE counts positions by index, keys and values are repeated, no keyword argument is passed on, the
mask is a buffer, and the head is the input embeddings. The original is
https://huggingface.co/apple/OpenELM-270M/blob/main/modeling_openelm.py.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


def make_divisible(v, divisor):
    rounded = max(divisor, int(v + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * v else rounded


class OpenELMConfig(PreTrainedConfig):
    model_type = "openelm"
    attribute_map: ClassVar = {
        "num_hidden_layers": "num_transformer_layers",
        "hidden_size": "model_dim",
    }

    def __init__(
        self,
        vocab_size=64,
        max_context_length=128,
        num_transformer_layers=3,
        model_dim=32,
        head_dim=8,
        num_gqa_groups=2,
        qkv_multipliers=(0.5, 1.0),
        ffn_multipliers=(0.5, 4.0),
        ffn_dim_divisor=16,
        ffn_with_glu=True,
        normalize_qk_projections=True,
        share_input_output_layers=True,
        activation_fn_name="swish",
        rope_freq_constant=10000,
        rope_max_length=256,
        initializer_range=0.02,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.max_context_length = max_context_length
        self.num_transformer_layers = num_transformer_layers
        self.model_dim = model_dim
        self.head_dim = head_dim
        self.ffn_dim_divisor = ffn_dim_divisor
        self.ffn_with_glu = ffn_with_glu
        self.normalize_qk_projections = normalize_qk_projections
        self.share_input_output_layers = share_input_output_layers
        self.activation_fn_name = activation_fn_name
        self.rope_freq_constant = rope_freq_constant
        self.rope_max_length = rope_max_length
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        steps = torch.linspace(0, 1, num_transformer_layers).tolist()
        low, high = qkv_multipliers
        widths = [
            make_divisible(model_dim * (low + (high - low) * step), head_dim * num_gqa_groups)
            for step in steps
        ]
        self.num_query_heads = [width // head_dim for width in widths]
        self.num_kv_heads = [heads // num_gqa_groups for heads in self.num_query_heads]
        low, high = ffn_multipliers
        self.ffn_multipliers = [round(low + (high - low) * step, 2) for step in steps]
        super().__init__(tie_word_embeddings=share_input_output_layers, **kwargs)


class OpenELMRMSNorm(nn.Module):
    def __init__(self, num_features, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def rotate(x, sin, cos):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class OpenELMRotaryEmbedding(nn.Module):
    def __init__(self, model_dim, max_seq_length, freq_constant=10000):
        super().__init__()
        self.model_dim = model_dim
        self.freq_constant = freq_constant
        self.max_seq_length = max_seq_length
        inv_freq = 1.0 / freq_constant ** (torch.arange(0, model_dim, 2).float() / model_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        angle = torch.outer(torch.arange(max_seq_length).float(), inv_freq)
        angle = torch.cat([angle, angle], dim=-1)
        self._cached_sin, self._cached_cos = angle.sin(), angle.cos()

    def forward(self, query, key):
        query_len, key_len = query.shape[2], key.shape[2]
        sin, cos = self._cached_sin[:key_len], self._cached_cos[:key_len]
        rotated = rotate(query.float(), sin[-query_len:], cos[-query_len:])
        return rotated.type_as(query), rotate(key.float(), sin, cos).type_as(key)


class OpenELMMultiHeadCausalAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_q_heads = config.num_query_heads[layer_idx]
        self.num_k_heads = self.num_v_heads = config.num_kv_heads[layer_idx]
        self.num_groups = self.num_q_heads // self.num_k_heads
        heads = self.num_q_heads + self.num_k_heads + self.num_v_heads
        self.qkv_proj = nn.Linear(config.model_dim, heads * self.head_dim, bias=False)
        self.pos_embedding = OpenELMRotaryEmbedding(
            config.head_dim, config.rope_max_length, config.rope_freq_constant
        )
        norm = config.normalize_qk_projections
        self.q_norm = OpenELMRMSNorm(config.head_dim) if norm else None
        self.k_norm = OpenELMRMSNorm(config.head_dim) if norm else None
        self.out_proj = nn.Linear(self.num_q_heads * self.head_dim, config.model_dim, bias=False)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        cache_position=None,
    ):
        batch_size, seq_length, _ = hidden_states.size()
        heads = [self.num_q_heads, self.num_k_heads, self.num_v_heads]
        qkv = self.qkv_proj(hidden_states)
        qkv = qkv.reshape(batch_size, seq_length, sum(heads), self.head_dim).transpose(1, 2)
        queries, keys, values = qkv.split(heads, dim=1)
        if self.q_norm is not None:
            queries = self.q_norm(queries)
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        if past_key_value is not None:
            keys, values = past_key_value.update(keys, values, self.layer_idx)
        queries, keys = self.pos_embedding(queries, keys)
        if self.num_groups != 1:
            keys = keys.repeat_interleave(self.num_groups, dim=1)
            values = values.repeat_interleave(self.num_groups, dim=1)
        causal_mask = attention_mask
        if attention_mask is not None and cache_position is not None:
            causal_mask = causal_mask[:, :, cache_position, : keys.shape[-2]]
        out = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=causal_mask, dropout_p=0
        )
        out = out.transpose(1, 2).reshape(batch_size, seq_length, -1)
        return self.out_proj(out), None, past_key_value


class OpenELMFeedForwardNetwork(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        width = config.ffn_multipliers[layer_idx] * config.model_dim
        width = int(make_divisible(width, config.ffn_dim_divisor))
        self.ffn_with_glu = config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, width * (1 + self.ffn_with_glu), bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)
        self.act = ACT2FN[config.activation_fn_name]

    def forward(self, x):
        if not self.ffn_with_glu:
            return self.proj_2(self.act(self.proj_1(x)))
        gate, y = self.proj_1(x).chunk(2, dim=-1)
        return self.proj_2(self.act(gate) * y)


class OpenELMDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attn = OpenELMMultiHeadCausalAttention(config, layer_idx)
        self.ffn = OpenELMFeedForwardNetwork(config, layer_idx)
        self.ffn_norm = OpenELMRMSNorm(config.model_dim)
        self.attn_norm = OpenELMRMSNorm(config.model_dim)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        cache_position=None,
        **kwargs,
    ):
        attended, weights, present = self.attn(
            hidden_states=self.attn_norm(hidden_states),
            attention_mask=attention_mask,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            cache_position=cache_position,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.ffn(self.ffn_norm(hidden_states))
        outputs = (hidden_states,)
        outputs += (weights,) if output_attentions else ()
        return outputs + ((present,) if use_cache else ())


class OpenELMPreTrainedModel(PreTrainedModel):
    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["OpenELMDecoderLayer"]


class OpenELMModel(OpenELMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            OpenELMDecoderLayer(config, i) for i in range(config.num_transformer_layers)
        )
        self.norm = OpenELMRMSNorm(config.model_dim)
        self.gradient_checkpointing = False
        length = config.max_context_length
        causal_mask = torch.full((length, length), True).triu(diagonal=1)
        self.register_buffer("causal_mask", causal_mask, persistent=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.token_embeddings

    def set_input_embeddings(self, value):
        self.token_embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache_position=None,
    ):
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if inputs_embeds is None:
            inputs_embeds = self.token_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if cache_position is None:
            past = past_key_values.get_seq_length() if use_cache else 0
            cache_position = torch.arange(past, past + inputs_embeds.shape[1])
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        causal_mask = self._update_causal_mask(attention_mask, inputs_embeds)
        hidden_states = inputs_embeds
        all_hidden_states = () if output_hidden_states else None
        for decoder_layer in self.layers:
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if self.gradient_checkpointing and self.training:
                layer_outputs = self._gradient_checkpointing_func(
                    decoder_layer.__call__,
                    hidden_states,
                    causal_mask,
                    position_ids,
                    past_key_values,
                    output_attentions,
                    use_cache,
                    cache_position,
                )
            else:
                layer_outputs = decoder_layer(
                    hidden_states,
                    attention_mask=causal_mask,
                    position_ids=position_ids,
                    past_key_value=past_key_values,
                    output_attentions=output_attentions,
                    use_cache=use_cache,
                    cache_position=cache_position,
                )
            hidden_states = layer_outputs[0]
        hidden_states = self.norm(hidden_states)
        if output_hidden_states:
            all_hidden_states += (hidden_states,)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=all_hidden_states,
        )

    def _update_causal_mask(self, attention_mask, input_tensor):
        dtype, lowest = input_tensor.dtype, torch.finfo(input_tensor.dtype).min
        mask = self.causal_mask[None, None].repeat(len(input_tensor), 1, 1, 1).to(dtype) * lowest
        if attention_mask is not None and attention_mask.dim() == 2:
            length = attention_mask.shape[-1]
            padding = mask[..., :length].eq(0.0) * attention_mask[:, None, None, :].eq(0.0)
            mask[..., :length] = mask[..., :length].masked_fill(padding, lowest)
        return mask


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = None
        if not config.share_input_output_layers:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.token_embeddings

    def set_input_embeddings(self, value):
        self.transformer.token_embeddings = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache_position=None,
    ):
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            cache_position=cache_position,
        )
        hidden_states = outputs[0]
        if self.lm_head is None:
            logits = functional.linear(hidden_states, self.transformer.token_embeddings.weight)
        else:
            logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            shifted = logits[..., :-1, :].flatten(0, 1), labels[..., 1:].flatten()
            loss = functional.cross_entropy(*shifted)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, **kwargs
    ):
        past_key_values = kwargs.get("cache", past_key_values)  # its name since Transformers 5.24
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, past:].contiguous(),
            "cache_position": torch.arange(past, input_ids.shape[1]),
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "attention_mask": attention_mask,
        }


AutoConfig.register("openelm", OpenELMConfig)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM)
