"""The models that `llmjepa` trains: pretrained ones, a small one from random weights, LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils.peft_utils import find_adapter_config_file


def load_pretrained(name: str):
    """A causal language model in float32, and its tokenizer.

    Args:
        name: A model of the Hugging Face hub, a directory, or a ``.gguf`` file, which holds the
            tokenizer as well and is dequantised. A LoRA adapter is merged into its base model.

    Returns:
        model, tokenizer; the tokenizer has a padding token.

    Raises:
        FileNotFoundError: There is no such ``.gguf`` file.
    """
    source, options = name, {}
    if name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"no file {name!r}")
        name, options = str(path.parent), {"gguf_file": path.name}
    elif find_adapter_config_file(name) is not None:
        return _load_adapter(name)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if options:  # quantised weights cannot be trained
        options["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    model.name_or_path = source  # which an adapter's configuration then gives as its base model
    return model, tokenizer


def _load_adapter(name: str):
    from peft import PeftConfig, PeftModel

    model, _ = load_pretrained(PeftConfig.from_pretrained(name).base_model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # by [PRED] tokens
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return PeftModel.from_pretrained(model, name).merge_and_unload(), tokenizer


def small_llama(tokenizer, *, hidden_size: int = 192, num_layers: int = 4) -> LlamaForCausalLM:
    """A Llama with random weights (from torch's global generator) that trains in minutes on a CPU.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        hidden_size: A multiple of 64; heads are 32 wide, twice as many for q as for k and v.
        num_layers: Decoder layers.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def add_lora(model, rank: int, *, pred_ids: Sequence[int] = ()):
    """Freezes a model and adds LoRA as in the paper: all attention and MLP projections, α = 2r.

    The embedding rows of [PRED] tokens are trained, and tied weights stay tied.

    Args:
        model: A causal language model of Transformers.
        rank: r ≥ 1.
        pred_ids: From `add_predictor_tokens`.

    Returns:
        A PEFT model around `model`.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.1,
        target_modules="all-linear",
        trainable_token_indices=list(pred_ids) or None,
    )
    return get_peft_model(model, config)
