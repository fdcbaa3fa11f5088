"""`llmjepa export`: a checkpoint without [PRED] tokens, and its model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from llmjepa_kernels.cli.export_options import ExportOptions
from llmjepa_kernels.cli.model_card import CARD, model_card
from llmjepa_kernels.cli.say import say
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.predictor_tokens import known_predictor_tokens, predictor_tokens
from llmjepa_kernels.files import share_as_umask_says
from llmjepa_kernels.hf.export import ADAPTER_CONFIG, export_adapter, export_model, kept_ids
from llmjepa_kernels.hf.load import load_pretrained, load_tokenizer


def export(options: ExportOptions) -> None:
    """Writes the directory.

    Raises:
        ValueError: The directory holds something, or an adapter cannot stay one.
        OSError: There is no such checkpoint, or the disk is full.
    """
    source, directory = Path(options.checkpoint), options.directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} must not hold anything yet")
    logging.disable_progress_bar()  # of reading and writing weights
    trust = options.trust_remote_code
    say(f"loading {options.checkpoint}")
    tokenizer = load_tokenizer(options.checkpoint, trust_remote_code=trust)
    removed = predictor_tokens(known_predictor_tokens(tokenizer))
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    if is_adapter and not options.merge:
        if options.dtype is not None:
            raise ValueError("--dtype is for whole models: an adapter needs --merge")
        export_adapter(source, tokenizer, removed, directory)
    else:
        model, _ = load_pretrained(
            options.checkpoint, options.dtype or "auto", trust_remote_code=trust
        )
        export_model(model, tokenizer, removed, directory)
    new = {old: i for i, old in enumerate(kept_ids(tokenizer, removed))}
    trained = ExampleFormat.load(options.checkpoint)
    replace(
        trained,
        pred_ids=(),
        separator_id=None if trained.separator_id is None else new[trained.separator_id],
        end_id=None if trained.end_id is None else new[trained.end_id],
    ).save(directory)
    card = model_card(source, is_adapter=is_adapter and not options.merge)
    (directory / CARD).write_text(card, encoding="utf-8")
    share_as_umask_says(directory)
    tokens = f"without {', '.join(removed)}" if removed else "which had no [PRED] tokens"
    print(f"{options.checkpoint}, {tokens}: {directory}/")
    print(f"next: llmjepa generate {directory}")
