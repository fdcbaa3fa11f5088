"""The models that `llmjepa` trains: pretrained ones, a small one from random weights, LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils.import_utils import is_bitsandbytes_available
from transformers.utils.peft_utils import find_adapter_config_file


def load_pretrained(
    name: str,
    dtype: str = "float32",
    *,
    load_in: str | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        name: A model of the Hugging Face hub, a directory, or a ``.gguf`` file, which holds the
            tokenizer as well and is dequantised. A LoRA adapter is merged into its base model.
        dtype: One of ``DTYPES``, of the weights; of quantised ones, of the products. "auto" is that
            of the checkpoint, or of an adapter's base model.
        load_in: One of ``QUANTIZATIONS``, by bitsandbytes: "4bit" is NF4, with quantised scales.
            An adapter then stays beside its base model. Default: weights stay whole.
        device: Default: the CPU.
        trust_remote_code: Run the Python code that comes with some models.

    Returns:
        model, tokenizer; the tokenizer has a padding token.

    Raises:
        ValueError: A ``.gguf`` file is to be quantised again.
        ImportError: bitsandbytes is needed, and not installed.
        OSError: There is no such file or directory, or no model in it or of that name on the hub;
            it is corrupt; it lacks weights, or embeddings of its tokenizer's tokens.
    """
    path, options = _location(name)
    trust = {"trust_remote_code": trust_remote_code}
    if _is_adapter(path, options):
        return _load_adapter(name, dtype, load_in=load_in, device=device, **trust)
    tokenizer = load_tokenizer(name, **trust)
    if load_in is not None:
        if options:
            raise ValueError(f"{name} cannot be loaded in {load_in}: it is quantised already")
        options["quantization_config"] = _quantization(load_in, dtype)
        options["device_map"] = {"": device or "cpu"}
    elif options and hasattr(transformers, "GgufConfig"):
        # Quantised weights cannot be trained; Transformers without this option never keeps them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _loading(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=_torch_dtype(dtype), output_loading_info=True, **options, **trust
        )
        model, found = loaded
        # Transformers would draw them at random.
        if missing := sorted(found["missing_keys"]):
            raise OSError(f"it lacks the weights {', '.join(missing)}")
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise OSError(f"its tokenizer has {len(tokenizer)} tokens, its embeddings {rows} rows")
    model.name_or_path = name  # which an adapter's configuration then gives as its base model
    return model if load_in or device is None else model.to(device), tokenizer


@torch.no_grad()
def cast_weights(model: torch.nn.Module, dtype: str) -> None:
    """Casts the parameters; not the buffers, such as frequencies, whose digits count."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_torch_dtype(dtype))


def _torch_dtype(dtype: str) -> Any:
    return dtype if dtype == "auto" else getattr(torch, dtype)


def check_model(name: str, *, trust_remote_code: bool = False) -> None:
    """Raises an OSError that `load_pretrained` would raise, as far as the weights need no look."""
    path, options = _location(name)
    trust = {"trust_remote_code": trust_remote_code}
    load_tokenizer(name, **trust)
    with _loading(name):
        if _is_adapter(path, options):
            from peft import PeftConfig

            check_model(PeftConfig.from_pretrained(path).base_model_name_or_path, **trust)
        else:
            AutoConfig.from_pretrained(path, **options, **trust)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, with a padding token; arguments as in `load_pretrained`."""
    path, options = _location(name)
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(
            path, **options, trust_remote_code=trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def from_scratch(name: str, tokenizer: Any, *, trust_remote_code: bool = False) -> Any:
    """A model of a given architecture, with random weights from torch's global generator.

    Args:
        name: As in `load_pretrained`, or a ``config.json``; only the configuration is read.
        tokenizer: Gives the vocabulary and the special tokens.
        trust_remote_code: As in `load_pretrained`.
    """
    path, options = _location(name)
    trust = {"trust_remote_code": trust_remote_code}
    with _loading(name):
        config = AutoConfig.from_pretrained(path, **options, **trust)
        config.vocab_size = len(tokenizer)
        for role in ("bos", "eos", "pad"):
            setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **trust)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Names the model that cannot be loaded, in one line, whatever a library raised."""
    try:
        yield
    except ImportError:
        raise  # says what to install
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            reason = (
                "it comes with Python code, which runs only if you trust its authors: "
                "trust_remote_code=True, or --trust-remote-code"
            )
        raise OSError(f"{name!r} cannot be loaded: {reason}") from error


def is_adapter(name: str) -> bool:
    """Whether that is a LoRA adapter, on disk or of the hub."""
    return _is_adapter(*_location(name))


def _is_adapter(path: str, options: dict[str, Any]) -> bool:
    return not options and find_adapter_config_file(path) is not None


def _location(name: str) -> tuple[str, dict[str, Any]]:
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
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            try:  # at once, where Transformers would try again for minutes
                model_info(name, timeout=10)
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise OSError(
                    f"{name!r} is no directory and not in the cache, and the hub did not give it "
                    f"({reason}): give a directory, or check its name, the network and your login"
                ) from error
    return name, {}


def _quantization(load_in: str, dtype: str) -> Any:
    if not is_bitsandbytes_available():
        raise ImportError(
            f"weights in {load_in} need the package bitsandbytes: "
            "pip install 'llmjepa_kernels[quantized]'"
        )
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _load_adapter(
    directory: str,
    dtype: str,
    *,
    load_in: str | None,
    device: torch.device | None,
    **trust: bool,
) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel, load_peft_weights

    tokenizer = load_tokenizer(directory, **trust)
    with _loading(directory):
        base = PeftConfig.from_pretrained(directory).base_model_name_or_path
    # Merged in float32, as sums of a large and a small number would lose the small one.
    base_dtype = "float32" if load_in is None else dtype
    model, _ = load_pretrained(base, base_dtype, load_in=load_in, device=device, **trust)
    with _loading(directory):
        saved = load_peft_weights(directory, device="cpu")
    # It has [PRED] tokens, and maybe padding, if its base was resized for it: PEFT then keeps all
    # embeddings, in one of two places.
    embeddings = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    kept = (f".{embeddings}.weight", f".{embeddings}.token_adapter.base_layer.weight")
    sizes = [len(x) for name, x in saved.items() if name.endswith(kept)]
    rows = max([len(tokenizer), *sizes])
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with _loading(directory), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted: Any = PeftModel.from_pretrained(model, directory)
    if load_in is None:
        adapted = adapted.merge_and_unload()
        cast_weights(adapted, _stored_dtype(base, **trust) if dtype == "auto" else dtype)
    return adapted, tokenizer


def _stored_dtype(name: str, **trust: bool) -> str:
    path, options = _location(name)
    with _loading(name):
        stored = AutoConfig.from_pretrained(path, **options, **trust).dtype
    return str(stored or torch.float32).removeprefix("torch.")


def small_llama(tokenizer: Any, *, hidden_size: int = 192, num_layers: int = 4) -> LlamaForCausalLM:
    """A Llama with random weights (from torch's global generator) that trains in minutes on a CPU.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        hidden_size: A multiple of 64; heads are 32 wide, twice as many for q as for k and v.
        num_layers: Decoder layers.
    """
    if hidden_size < 64 or hidden_size % 64:
        raise ValueError(f"hidden_size must be a multiple of 64, got {hidden_size}")
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


def add_lora(model: Any, rank: int, *, new_ids: Sequence[int] = ()) -> Any:
    """Freezes a model and adds LoRA as in the paper: all attention and MLP projections, α = 2r.

    The embedding rows of new tokens are trained, and tied weights stay tied.

    Args:
        model: A causal language model of Transformers. What is not quantised of one that is, such
            as its embeddings, is cast to float32 (QLoRA, arXiv:2305.14314).
        rank: r ≥ 1.
        new_ids: From `add_predictor_tokens`, and a separator if it is new.

    Returns:
        A PEFT model around `model`.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.1,
        target_modules="all-linear",
        trainable_token_indices=list(new_ids) or None,
    )
    return get_peft_model(model, config)
