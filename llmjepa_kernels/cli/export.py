"""`llmjepa export`: a checkpoint without [PRED] tokens, and its model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging

from llmjepa_kernels.cli.export_options import ExportOptions
from llmjepa_kernels.cli.model_card import CARD, model_card
from llmjepa_kernels.cli.say import say
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.predictor_tokens import known_predictor_tokens, predictor_tokens
from llmjepa_kernels.files import share_as_umask_says
from llmjepa_kernels.hf.export import export_adapter, export_model, kept_ids
from llmjepa_kernels.hf.load import is_adapter, load_pretrained, load_tokenizer


def export(options: ExportOptions) -> None:
    """Writes the directory, whole or not at all.

    Raises:
        ValueError: The directory holds something, an adapter cannot stay one, or what is beside
            the checkpoint is corrupt.
        OSError: There is no such checkpoint, or the disk is full.
    """
    source, directory = Path(options.checkpoint), options.directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} must not hold anything yet")
    logging.disable_progress_bar()  # of reading and writing weights
    say(f"loading {options.checkpoint}")
    tokenizer = load_tokenizer(options.checkpoint, trust_remote_code=options.trust_remote_code)
    removed = predictor_tokens(known_predictor_tokens(tokenizer))
    stays_adapter = is_adapter(options.checkpoint) and not options.merge
    if stays_adapter and options.dtype is not None:
        raise ValueError("--dtype is for whole models: an adapter needs --merge")
    if stays_adapter and not source.is_dir():
        raise ValueError(
            f"{options.checkpoint} is no directory: an adapter of the hub needs --merge"
        )
    example_format = _without_preds(options.checkpoint, kept_ids(tokenizer, removed))
    card = model_card(source, removed, is_adapter=stays_adapter)
    directory.parent.mkdir(parents=True, exist_ok=True)
    exists = directory.is_dir()
    with TemporaryDirectory(dir=directory if exists else directory.parent) as folder:
        made = Path(folder) / "made"
        if stays_adapter:
            export_adapter(source, tokenizer, removed, made)
        else:
            model, _ = load_pretrained(
                options.checkpoint,
                options.dtype or "auto",
                trust_remote_code=options.trust_remote_code,
            )
            export_model(model, tokenizer, removed, made)
        example_format.save(made)
        (made / CARD).write_text(card, encoding="utf-8")
        share_as_umask_says(made)
        for path in made.iterdir() if exists else ():
            path.replace(directory / path.name)
        if not exists:
            made.replace(directory)
    tokens = f"without {', '.join(removed)}" if removed else "which had no [PRED] tokens"
    print(f"{options.checkpoint}, {tokens}: {directory}/")
    print(f"next: llmjepa generate {directory}")


def _without_preds(checkpoint: str, kept: list[int]) -> ExampleFormat:
    """The format of a checkpoint whose tokens have new ids."""
    trained = ExampleFormat.load(checkpoint)
    new = {old: i for i, old in enumerate(kept)}
    moved = {}
    for name in ("separator_id", "end_id"):
        old = getattr(trained, name)
        if old is not None and old not in new:
            raise ValueError(f"{name} of {checkpoint} is no token that is kept, got {old}")
        moved[name] = None if old is None else new[old]
    return replace(trained, pred_ids=(), separator_id=moved["separator_id"], end_id=moved["end_id"])
