"""`llmjepa analyze`: the geometry of Text and Code in one or more checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from llmjepa_kernels.cli.analysis_figure import draw
from llmjepa_kernels.cli.report import COLORS, format_table
from llmjepa_kernels.data import grammar
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.data.samples import read_chats
from llmjepa_kernels.evaluation.geometry import DEFINITIONS, embed_views, view_geometry, view_states
from llmjepa_kernels.files import write_whole
from llmjepa_kernels.hf.load import load_pretrained
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.packing import pack

# Key of an analysis, column of the table, format.
COLUMNS = (
    ("text_code_cosine", "cosine\nText, Code", ".4f"),
    ("other_text_code_cosine", "of other\nexamples", ".4f"),
    ("pred_code_cosine", "cosine\nPred, Code", ".4f"),
    ("other_pred_code_cosine", "of other\nexamples", ".4f"),
    ("relative_difference", "relative\ndifference", ".3f"),
    ("text_rank", "effective\nrank Text", ".1f"),
    ("code_rank", "effective\nrank Code", ".1f"),
    ("linear_residual", "linear\nresidual", ".3f"),
)
BATCH_SIZE = 32
BUILT_IN_SEED = 42  # that of llmjepa train


def analyze(
    checkpoints: Sequence[str],
    data: str | PathLike[str] | None,
    *,
    samples: int,
    output_dir: Path,
    recipe: str | None = None,
) -> str:
    """Compares checkpoints on the same samples; writes ``analysis.json`` and ``analysis.png``.

    Args:
        checkpoints: At least one, each as `load_pretrained` takes it.
        data: As `read_chats` takes it; None for built-in held-out pairs.
        samples: The first so many are used, at least two.
        output_dir: Made if it does not exist.
        recipe: Of `read_chats`.

    Returns:
        A table of the numbers that are no lists.

    Raises:
        ValueError: Too many checkpoints or too few samples; a sample is malformed or does not fit
            a checkpoint, or its states are not finite.
        OSError: A file or a model is not there.
    """
    if not 1 <= len(checkpoints) <= len(COLORS):
        raise ValueError(f"expected 1 to {len(COLORS)} checkpoints, got {len(checkpoints)}")
    if samples < 2:
        raise ValueError(f"--samples must be at least 2, got {samples}")
    if data is not None:
        chats = list(islice(read_chats(data, recipe=recipe), samples))
    elif recipe is None:
        chats = grammar.generate(samples, seed=BUILT_IN_SEED, split="heldout")
    else:
        raise ValueError(f"--recipe {recipe} needs --data")
    if len(chats) < 2:
        raise ValueError(f"--data {data} must have at least 2 samples, got {len(chats)}")
    analyses = []
    for name, checkpoint in zip(short_names(checkpoints), checkpoints, strict=True):
        try:
            numbers = analyze_checkpoint(checkpoint, chats, progress=name)
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from error
        analyses.append({"name": name, "checkpoint": checkpoint, **numbers})
    output_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "data": "built-in held-out pairs" if data is None else str(data),
        "samples": len(chats),
        "definitions": DEFINITIONS,
        "checkpoints": analyses,
    }
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    write_whole(output_dir / "analysis.json", text)
    picture = BytesIO()
    draw(analyses).savefig(picture, dpi=200)
    write_whole(output_dir / "analysis.png", picture.getvalue())
    return format_table([(analysis["name"], analysis) for analysis in analyses], COLUMNS)


def analyze_checkpoint(
    checkpoint: str, chats: Sequence[Mapping[str, Any]], *, progress: str | None = None
) -> dict[str, Any]:
    """The numbers of one checkpoint: those of `view_geometry`, and t-SNE of both views.

    Text and Code are the views alone, in the layout that the checkpoint was trained with; its
    [PRED] tokens, if it has any, predict as they did in training.

    Args:
        checkpoint: As `load_pretrained` takes it.
        chats: Samples as `read_chats` yields them, at least two.
        progress: Shown in front of a progress bar. Default: none.

    Raises:
        ValueError: A sample does not fit the checkpoint, or its states are not finite.
        OSError: The checkpoint is not there.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(quiet=progress is None)
    model, tokenizer = load_pretrained(checkpoint)
    if torch.cuda.is_available() or torch.xpu.is_available():
        model.to(torch.accelerator.current_accelerator())
    patch_model(model)
    trained = ExampleFormat.load(checkpoint, tokenizer)
    views = replace(trained, pred_ids=(), direction="text_to_code")

    def states(example_format: ExampleFormat, chats: Sequence[Mapping[str, Any]], name: str):
        examples = []
        for index, chat in enumerate(chats):
            try:
                examples.append(example_format.example(chat, tokenizer))
            except ValueError as error:
                raise ValueError(f"sample {index}: {error}") from error
        starts = range(0, len(examples), BATCH_SIZE)
        return view_states(
            model,
            (
                pack(examples[start : start + BATCH_SIZE])
                for start in track(starts, f"{progress}: {name}", console=console)
            ),
        )

    # Without the further views that a sample may have.
    two_views = [{k: v for k, v in chat.items() if k not in ("views", "pairs")} for chat in chats]
    text, code = states(views, two_views, "Text, Code")
    predicted = states(trained, chats, "Pred, Code") if trained.pred_ids else None
    numbers = view_geometry(text, code, predicted)
    with console.status(f"{progress}: t-SNE"):
        places = dict(zip(("text", "code"), embed_views(text, code), strict=True))
    return {**numbers, "tsne": {view: place.tolist() for view, place in places.items()}}


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart; no two may be the same."""
    parts = [Path(name.removesuffix(".gguf")).parts or (name,) for name in checkpoints]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"expected different checkpoints, got {list(checkpoints)}")
