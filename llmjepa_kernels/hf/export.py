"""Checkpoints that leave this package: without [PRED] tokens, readable by other programs.

Generation needs no [PRED] token, and neither their rows nor those that pad a vocabulary are of use
to anyone else. Files also say in the words of Transformers 4 what version 5 has new words for, as
converters and servers may read those.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKEN_ROWS = "token_adapter"  # in the names of weights that PEFT trains per token


def kept_ids(tokenizer: Any, removed: Collection[str]) -> list[int]:
    """The ids of all tokens but some, in order: the i-th becomes i.

    Raises:
        ValueError: One of these is needed for text, as it was not added.
    """
    added = tokenizer.get_added_vocab()
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    for token in removed:
        if token not in added or token in own:
            raise ValueError(f"{token!r} is no token that was added to the tokenizer")
    gone = {added[token] for token in removed}
    return [i for i in range(len(tokenizer)) if i not in gone]


def export_model(model: Any, tokenizer: Any, removed: Collection[str], directory: Path) -> None:
    """Writes a model of Transformers without tokens, and its tokenizer.

    The logits of the other tokens are the same bits. Rows beyond the tokenizer's tokens are gone.

    Args:
        model: Is changed.
        tokenizer: Its tokenizer.
        removed: Tokens that were added to it.
        directory: Is made.

    Raises:
        ValueError: See `kept_ids`.
    """
    kept = kept_ids(tokenizer, removed)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    tensors = [getattr(module, name, None) for module in modules for name in ("weight", "bias")]
    with torch.no_grad():
        for rows in {id(x): x for x in tensors if x is not None}.values():  # tied ones once
            rows[: len(kept)] = rows[kept]
    new = {old: i for i, old in enumerate(kept)}
    configs = (model.config, model.config.get_text_config(), model.generation_config)
    for config in {id(each): each for each in configs}.values():
        _renumber(config, new)
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    model.save_pretrained(directory)
    _edit(directory / "config.json", _say_in_old_words)
    export_tokenizer(tokenizer, removed, directory)


def _renumber(config: Any, new: dict[int, int]) -> None:
    """Gives the token ids that a config names their new numbers; those of no token are gone."""
    for name, ids in list(vars(config).items()):
        if not name.endswith(("_token_id", "suppress_tokens", "bad_words_ids")):
            continue
        if isinstance(ids, list) and ids:
            words = [i if isinstance(i, list) else [i] for i in ids]
            words = [[new[i] for i in word] for word in words if new.keys() >= set(word)]
            ids = words if isinstance(ids[0], list) else [i for (i,) in words]
            setattr(config, name, ids or None)
        elif isinstance(ids, int) and ids >= 0:
            setattr(config, name, new.get(ids))


def export_adapter(source: Path, tokenizer: Any, removed: Collection[str], directory: Path) -> None:
    """Writes a LoRA adapter without the rows of tokens, for its base model as it is.

    Args:
        source: Of the adapter.
        tokenizer, removed, directory: As in `export_model`.

    Raises:
        ValueError: It also trains rows of other tokens, which the base model may lack, or a whole
            head or embeddings that were resized, or tokens would get other ids than they have
            there.
        OSError: The weights cannot be read.
    """
    config = json.loads((source / ADAPTER_CONFIG).read_bytes())
    gone = set(tokenizer.convert_tokens_to_ids(list(removed)))
    trained = config.get("trainable_token_indices") or []
    if others := sorted(set(trained) - gone):
        names = tokenizer.convert_ids_to_tokens(others)
        raise ValueError(
            f"the adapter in {source} trains the rows of {names} too, which its base model may "
            "lack: --merge"
        )
    kept = kept_ids(tokenizer, removed)
    if kept != list(range(len(kept))):
        raise ValueError(
            f"the base model of the adapter in {source} has tokens behind {', '.join(removed)}, "
            "whose ids would change: --merge"
        )
    directory.mkdir(parents=True, exist_ok=True)
    try:
        weights = load_file(source / ADAPTER_WEIGHTS)
    except Exception as error:  # of safetensors
        raise OSError(f"{source / ADAPTER_WEIGHTS} cannot be read: {error}") from error
    plain = {name: w for name, w in weights.items() if _is_trained(name, config)}
    # PEFT also keeps the frozen embeddings and head of a base model that was resized.
    frozen = [w for name, w in weights.items() if name not in plain and name.endswith(".weight")]
    rows = {len(w) for w in frozen}
    if resized := sorted(name for name, w in plain.items() if rows & set(w.shape)):
        raise ValueError(
            f"the adapter in {source} has {', '.join(resized)} for more tokens than its base "
            "model: --merge"
        )
    save_file(plain, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config["trainable_token_indices"] = None
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    export_tokenizer(tokenizer, removed, directory)


def _is_trained(name: str, config: dict[str, Any]) -> bool:
    """Whether a weight of an adapter is more than rows of tokens or a copy of the base model's."""
    # The latter two PEFT keeps beside a module that is saved whole, if it was resized.
    if any(part in name for part in (TOKEN_ROWS, ".original_module.", ".modules_to_save.")):
        return False
    whole = (f".{module}." in name for module in config.get("modules_to_save") or ())
    has_biases = config.get("bias", "none") != "none"
    return "lora_" in name or any(whole) or (has_biases and name.endswith(".bias"))


def export_tokenizer(tokenizer: Any, removed: Collection[str], directory: Path) -> None:
    """Writes a tokenizer without tokens that were added to it."""
    kept = kept_ids(tokenizer, removed)
    new = {old: i for i, old in enumerate(kept)}
    tokenizer.save_pretrained(directory)

    def without(values: dict[str, Any]) -> None:
        values["added_tokens"] = [
            {**token, "id": new[token["id"]]}
            for token in values["added_tokens"]
            if token["content"] not in removed
        ]

    _edit(directory / "tokenizer.json", without)
    _edit(directory / "tokenizer_config.json", lambda values: _plain_config(values, removed))
    found = AutoTokenizer.from_pretrained(directory).get_vocab()
    expected = {token: new[i] for token, i in tokenizer.get_vocab().items() if i in new}
    if found != expected:
        differ = sorted(found.items() ^ expected.items())[:5]
        raise ValueError(f"the tokenizer cannot be written without {list(removed)}: {differ}")


def _plain_config(values: dict[str, Any], removed: Collection[str]) -> None:
    if values.get("tokenizer_class") == "TokenizersBackend":  # its name since Transformers 5
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    for leaked in ("is_local", "local_files_only"):  # of how it was loaded
        values.pop(leaked, None)
    extra = values.get("extra_special_tokens")
    if isinstance(extra, list):  # version 4 expects a mapping under that name
        del values["extra_special_tokens"]
        values["additional_special_tokens"] = [token for token in extra if token not in removed]


def _say_in_old_words(values: dict[str, Any]) -> None:
    if "dtype" in values:
        values["torch_dtype"] = values["dtype"]
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # else they are by type of layer
        values["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            values["rope_scaling"] = scaling


def _edit(path: Path, change: Any) -> None:
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
