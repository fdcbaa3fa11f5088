"""The models that `llmjepa` trains: pretrained ones, a small one from random weights, LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
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
        OSError: There is no such file or directory, or no model in it or of that name on the hub.
    """
    path, options = _location(name)
    if not options and find_adapter_config_file(path) is not None:
        return _load_adapter(name)
    tokenizer = load_tokenizer(name)
    if options and hasattr(transformers, "GgufConfig"):
        # Quantised weights cannot be trained; Transformers without this option never keeps them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    model.name_or_path = name  # which an adapter's configuration then gives as its base model
    return model, tokenizer


def load_tokenizer(name: str):
    """The tokenizer of a model, with a padding token; `name` as in `load_pretrained`."""
    path, options = _location(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except OSError as error:
        raise OSError(f"{name!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def from_scratch(name: str, tokenizer):
    """A model of a given architecture, with random weights from torch's global generator.

    Args:
        name: As in `load_pretrained`, or a ``config.json``; only the configuration is read.
        tokenizer: Gives the vocabulary and the special tokens.
    """
    path, options = _location(name)
    config = AutoConfig.from_pretrained(path, **options)
    config.vocab_size = len(tokenizer)
    for role in ("bos", "eos", "pad"):
        setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _location(name: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes for a name."""
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise FileNotFoundError(f"no file {name!r}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        configs = [path / "config.json", path / "adapter_config.json"]
        if not any(config.is_file() for config in configs):
            inside = sorted(str(config.parent) for config in path.glob("*/config.json"))
            hint = f", which is in {', '.join(inside)}" if inside else ""
            raise FileNotFoundError(f"no model in {name!r}: expected a config.json{hint}")
    elif path.is_file():
        if path.suffix != ".json":
            raise NotADirectoryError(f"expected a directory or a .gguf file, got {name!r}")
    else:
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise FileNotFoundError(
                f"no directory {name!r}, which cannot be a model of the hub either"
            ) from None
    return name, {}


def _load_adapter(directory: str):
    from peft import PeftConfig, PeftModel

    tokenizer = load_tokenizer(directory)
    model, _ = load_pretrained(PeftConfig.from_pretrained(directory).base_model_name_or_path)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # it has [PRED] tokens
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return PeftModel.from_pretrained(model, directory).merge_and_unload(), tokenizer


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


def add_lora(model, rank: int, *, new_ids: Sequence[int] = ()):
    """Freezes a model and adds LoRA as in the paper: all attention and MLP projections, α = 2r.

    The embedding rows of new tokens are trained, and tied weights stay tied.

    Args:
        model: A causal language model of Transformers.
        rank: r ≥ 1.
        new_ids: From `add_predictor_tokens`, and a separator if it is new.

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
        trainable_token_indices=list(new_ids) or None,
    )
    return get_peft_model(model, config)
