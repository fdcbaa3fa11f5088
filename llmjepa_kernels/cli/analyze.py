"""`llmjepa analyze`: the geometry of Text and Code in one or more checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from llmjepa_kernels.cli.analysis_figure import analysis_figure
from llmjepa_kernels.cli.analyze_options import AnalyzeOptions
from llmjepa_kernels.cli.checkpoint import load_checkpoint
from llmjepa_kernels.cli.device import chosen_device
from llmjepa_kernels.cli.fingerprints import weights_fingerprint
from llmjepa_kernels.cli.held_out import held_out_samples
from llmjepa_kernels.cli.prediction_file import read_verdicts
from llmjepa_kernels.cli.report import format_table
from llmjepa_kernels.cli.say import say
from llmjepa_kernels.cli.shared_options import BUILT_IN_SEED
from llmjepa_kernels.data.example_format import ExampleFormat
from llmjepa_kernels.evaluation.geometry import DEFINITIONS, embed_views, view_geometry, view_states
from llmjepa_kernels.evaluation.predict import beyond_positions, max_positions
from llmjepa_kernels.files import write_whole
from llmjepa_kernels.hf.load import check_model
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.packing import pack
from llmjepa_kernels.training.view_head import load_view_head, view_head_of

# Key of an analysis, column of the table, format.
COLUMNS = (
    ("text_code_cosine", "cosine\nText, Code", ".4f"),
    ("other_text_code_cosine", "of other\nexamples", ".4f"),
    ("pred_code_cosine", "cosine\nPred, Code", ".4f"),
    ("other_pred_code_cosine", "of other\nexamples", ".4f"),
    ("relative_difference", "relative\ndifference", ".3f"),
    ("text_rank", "effective\nrank Text", ".1f"),
    ("code_rank", "effective\nrank Code", ".1f"),
    ("code_rankme", "RankMe\nCode", ".1f"),
    ("linear_residual", "linear\nresidual", ".3f"),
)
OF_ANSWERS = (
    ("right_text_code_cosine", "of right\nanswers", ".4f"),
    ("wrong_text_code_cosine", "of wrong\nanswers", ".4f"),
)
ANSWER_DEFINITIONS = {
    "right": "whether the checkpoint's answer to each example is right; null where there is none",
    "right_text_code_cosine": "mean of text_code_cosines where it is right; null without such",
    "wrong_text_code_cosine": "mean of text_code_cosines where it is wrong; null without such",
}
BATCH_SIZE = 32


def analyze(options: AnalyzeOptions) -> None:
    """Compares checkpoints on the same samples; writes ``analysis.json`` and ``analysis.png``.

    Raises:
        ValueError: Too many checkpoints or too few samples; a sample is malformed or does not fit
            a checkpoint, or its states are not finite.
        OSError: A file or a model is not there.
    """
    checkpoints, output_dir = options.checkpoints, options.output_dir
    device = chosen_device(options.device)
    say(f"reading {options.data or 'the built-in held-out pairs'}")
    located = held_out_samples(
        options.data, recipe=options.recipe, count=options.samples, seed=BUILT_IN_SEED, split=None
    )
    chats = [chat for _, chat in located]
    if len(chats) < 2:
        raise ValueError(f"--data {options.data} must have at least 2 samples, got {len(chats)}")
    logging.disable_progress_bar()  # of reading weights
    names = short_names(checkpoints)
    for checkpoint in checkpoints:
        check_model(checkpoint, trust_remote_code=options.trust_remote_code)
    output_dir.mkdir(parents=True, exist_ok=True)
    analyses = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        say(f"loading {checkpoint}")
        try:
            model, tokenizer = load_checkpoint(checkpoint, options, device)
            verdicts = None
            if options.answers is not None:
                weights = {
                    "weights": weights_fingerprint(model),
                    "dtype": options.dtype,
                    "load_in": options.load_in,
                }
                verdicts = read_verdicts(options.answers, checkpoint, chats, weights)
            load_view_head(model, checkpoint)
            trained = ExampleFormat.load(
                checkpoint,
                tokenizer,
                num_pred_tokens=options.num_pred_tokens,
                layout=options.layout,
            )
            numbers = analyze_model(
                model,
                tokenizer,
                trained,
                chats,
                layer=options.layer,
                pooling=options.pooling,
                progress=name,
            )
            if verdicts is not None:
                numbers |= _of_answers(numbers["text_code_cosines"], verdicts)
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from error
        analyses.append({"name": name, "checkpoint": checkpoint, **numbers})
    content = {
        "data": options.data or "built-in held-out pairs",
        "samples": len(chats),
        "layer": options.layer,
        "pooling": options.pooling,
        "definitions": DEFINITIONS | (ANSWER_DEFINITIONS if options.answers else {}),
        "checkpoints": analyses,
    }
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    write_whole(output_dir / "analysis.json", text)
    picture = BytesIO()
    analysis_figure(analyses).savefig(picture, dpi=200)
    write_whole(output_dir / "analysis.png", picture.getvalue())
    columns = COLUMNS + (OF_ANSWERS if options.answers else ())
    table = format_table([(analysis["name"], analysis) for analysis in analyses], columns)
    print(f"\n{table}\nanalysis.json and analysis.png: {output_dir}/")
    print("next: llmjepa evaluate", *checkpoints)


def analyze_model(
    model: Any,
    tokenizer: Any,
    trained: ExampleFormat,
    chats: Sequence[Mapping[str, Any]],
    *,
    layer: int = -1,
    pooling: str = "last",
    progress: str | None = None,
) -> dict[str, Any]:
    """The numbers of one model: those of `view_geometry`, and t-SNE of both views.

    Text and Code are the views alone, in the layout that the model was trained with; its [PRED]
    tokens and its `ViewHead`, if it has any, predict as they did in training.

    Args:
        model: A causal language model; is patched.
        tokenizer: Its tokenizer.
        trained: The format that it was trained with.
        chats: Samples as `read_chats` yields them, at least two.
        layer, pooling: As in `view_states`.
        progress: Shown in front of a progress bar. Default: none.

    Raises:
        ValueError: A sample does not fit the model, its states are not finite, or it has no such
            layer.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    console = Console(quiet=progress is None, stderr=True)
    patch_model(model)
    views = replace(trained, pred_ids=(), direction="text_to_code")

    def states(
        example_format: ExampleFormat, chats: Sequence[Mapping[str, Any]], name: str
    ) -> tuple[Tensor, Tensor]:
        examples = []
        for index, chat in enumerate(chats):
            try:
                examples.append(example_format.example(chat, tokenizer))
            except ValueError as error:
                raise ValueError(f"sample {index}: {error}") from error
            if reason := beyond_positions(examples[-1], max_positions(model)):
                raise ValueError(f"sample {index}: {reason}")
        starts = range(0, len(examples), BATCH_SIZE)
        return view_states(
            model,
            (
                pack(examples[start : start + BATCH_SIZE])
                for start in track(starts, escape(f"{progress}: {name}"), console=console)
            ),
            layer=layer,
            pooling=pooling,
        )

    # Without the further views that a sample may have.
    two_views = [{k: v for k, v in chat.items() if k not in ("views", "pairs")} for chat in chats]
    text, code = states(views, two_views, "Text, Code")
    head = view_head_of(model)
    if head is not None and (layer, pooling) != (-1, "last"):
        head = None  # it was trained on other states
    predicted = None
    if trained.pred_ids or (head is not None and head.predictor is not None):
        predicted = states(trained, chats, "Pred, Code")
    if predicted is not None and head is not None:
        with torch.no_grad():
            predicted = deepcopy(head).cpu().float()(*predicted)
    numbers = view_geometry(text, code, predicted)
    with console.status(escape(f"{progress}: t-SNE")):
        places = dict(zip(("text", "code"), embed_views(text, code), strict=True))
    return {**numbers, "tsne": {view: place.tolist() for view, place in places.items()}}


def _of_answers(cosines: list[float], verdicts: list[bool | None]) -> dict[str, Any]:
    """The numbers of `ANSWER_DEFINITIONS`."""
    found: dict[str, Any] = {"right": verdicts}
    for name, wanted in (("right", True), ("wrong", False)):
        some = [cosine for cosine, right in zip(cosines, verdicts, strict=True) if right is wanted]
        found[f"{name}_text_code_cosine"] = mean(some) if some else None
    return found


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart; no two may be the same."""
    parts = [Path(name.removesuffix(".gguf")).parts or (name,) for name in checkpoints]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"expected different checkpoints, got {list(checkpoints)}")
