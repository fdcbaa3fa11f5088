"""The model card of an exported checkpoint: what its run is known to have been."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from llmjepa_kernels import __version__
from llmjepa_kernels.cli.run_record import RECORD
from llmjepa_kernels.cli.train_options import TrainOptions
from llmjepa_kernels.cli.training_defaults import FINE_TUNE, SCRATCH

CARD = "README.md"
PAPER = "https://arxiv.org/abs/2509.14252"
RECORDED = ("options", "result")
METRICS = {
    "accuracy": "accuracy on held-out data",
    "ood_accuracy": "accuracy out of distribution",
    "unfinished": "answers to held-out data that do not end",
    "eval_ntp_loss": "next-token loss on held-out data",
    "ntp_loss": "last next-token loss in training",
    "pair_cosine": "cosine of prediction and target, held out",
    "relative_cost": "tokens of training, relative to plain fine-tuning",
}


def model_card(source: Path, removed: Sequence[str], *, is_adapter: bool) -> str:
    """Markdown, with the metadata that the Hugging Face hub reads in front of it.

    Args:
        source: Of the checkpoint, or its adapter; without a record of its run there is less to say.
        removed: Tokens that have been taken out.
        is_adapter: Whether that is what leaves.

    Raises:
        ValueError: The record is corrupt.
    """
    record = _record(source)
    options, result = record.get("options") or {}, record.get("result") or {}
    base = options.get("model")
    data = _public(options.get("data")) or "built-in pairs of English and regular expressions"
    metadata = ModelCardData(
        base_model=None if base is None or base != _public(base) else base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["llm-jepa"],
    )
    lines = ["---", metadata.to_yaml(), "---", "", f"# {result.get('name', 'LLM-JEPA')}", ""]
    if not record:
        return "\n".join([*lines, f"No record of its training was beside `{source}`.", ""])
    seed = result.get("seed", options.get("seed"))
    lines += [
        f"Trained with llmjepa_kernels {__version__} on {data}, from "
        f"{_public(base) or 'random weights'}, seed {seed}. The method: [LLM-JEPA]"
        f"({PAPER}). {_taken_out(removed)}",
        "",
    ]
    metrics = result.get("metrics") or {}
    found = [(words, metrics[key]) for key, words in METRICS.items() if key in metrics]
    if found:
        lines += ["## Results", "", "| | |", "|---|---|"]
        lines += [f"| {words} | {value:.4g} |" for words, value in found]
        interval = result.get("accuracy_interval")
        if interval:
            low, high = interval
            lines.append(f"| 95 % interval of the accuracy | {low:.3f} to {high:.3f} |")
        lines.append("")
    changed = {key: _public(value) for key, value in options.items() if _differs(key, value)}
    if changed:
        lines += ["## Options other than the defaults", "", "```"]
        lines += [f"{key}: {json.dumps(value)}" for key, value in sorted(changed.items())]
        lines += ["```", ""]
    return "\n".join(lines)


def _public(value: Any) -> Any:
    """An option without the directories of the machine that it was given on."""
    if isinstance(value, list):
        return [_public(each) for each in value]
    is_path = isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists())
    return Path(value).name if is_path else value


def _record(source: Path) -> dict[str, Any]:
    for directory in (source, source.parent):  # an adapter is in the directory of its run
        path = directory / RECORD
        if path.is_file():
            try:
                record = json.loads(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path} is no record of a run: {error}") from error
            parts = [record.get(key) for key in RECORDED] if isinstance(record, dict) else [()]
            if not all(part is None or isinstance(part, dict) for part in parts):
                raise ValueError(f"{path} is no record of a run: expected objects {RECORDED}")
            return record
    return {}


def _taken_out(removed: Sequence[str]) -> str:
    if not removed:
        return ""
    return "[PRED] tokens, which training needs and generation does not, have been taken out."


def _differs(name: str, value: Any) -> bool:
    defaults = json.loads(json.dumps(TrainOptions().recorded(), default=str))
    if name == "epochs":  # is kept as it was resolved
        return value not in (SCRATCH["num_train_epochs"], FINE_TUNE["num_train_epochs"])
    return name in defaults and value != defaults[name]
