"""A packed row for people: its runs of tokens, what each is for, and who sees whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmjepa_kernels.cli.report import plain_text
from llmjepa_kernels.example import IGNORE
from llmjepa_kernels.training.objective import real_tokens

TEXT_WIDTH = 44  # characters of a run's text
MAX_CELLS = 2000  # of a side of the picture, more than its pixels
MAX_RUNS = 40  # in a picture of text


@dataclass(frozen=True)
class Run:
    """Tokens start .. stop of a row that see each other causally, and all runs above them.

    Attributes:
        start, stop: Tokens of the row.
        visible_until: The first token that cannot see them.
        depth: How many runs are above.
        supervised: How many of the tokens are predicted.
        role: "predicts n", "target n" by the pair of views, or nothing.
        text: Decoded.
    """

    start: int
    stop: int
    visible_until: int
    depth: int
    supervised: int
    role: str
    text: str

    def is_seen_by(self, other: Run) -> bool:
        return self.start <= other.start < self.visible_until


def runs_of(batch: Mapping[str, Tensor], row: int, tokenizer: Any) -> list[Run]:
    """The runs of one row of a `PackedBatch`, in order; padding is one of them."""
    ids, labels, until, positions = (
        batch[key][row].tolist() for key in ("input_ids", "labels", "visible_until", "position_ids")
    )
    roles: dict[int, list[str]] = {}
    for number, (predictor, target) in enumerate(batch["view_pairs"][row].tolist(), start=1):
        if predictor >= 0:
            roles.setdefault(predictor, []).append(f"predicts {number}")
            roles.setdefault(target, []).append(f"target {number}")
    real = real_tokens(batch)[row].nonzero()
    length = int(real.max()) + 1 if len(real) else 0
    starts = [
        i
        for i in range(length)
        if i == 0
        or until[i] != until[i - 1]
        or positions[i] != positions[i - 1] + 1
        or i - 1 in roles
    ]
    runs: list[Run] = []
    above: list[Run] = []
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        while above and above[-1].visible_until <= start:
            above.pop()
        text = tokenizer.decode(ids[start:stop])
        supervised = sum(label != IGNORE for label in labels[start:stop])
        role = ", ".join(role for i in range(start, stop) for role in roles.get(i, ()))
        runs.append(Run(start, stop, until[start], len(above), supervised, role, text))
        above.append(runs[-1])
    if length < len(ids):
        runs.append(Run(length, len(ids), length, 0, 0, "padding", ""))
    return runs


def row_text(runs: list[Run]) -> str:
    """A line per run: its tokens and text, and a mark in the column of each run that it sees."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = runs[:MAX_RUNS]
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("tokens", "supervised"):
        table.add_column(header, justify="right")
    for header in ("pair", "text", "sees"):
        table.add_column(header, no_wrap=True)
    for run in shown:
        text = "  " * run.depth + repr(run.text)[1:-1]
        if len(text) > TEXT_WIDTH:
            text = text[: TEXT_WIDTH - 1] + "…"
        marks = "".join("█" if other.is_seen_by(run) else " " for other in shown).rstrip()
        cells = (f"{run.start} to {run.stop - 1}", str(run.supervised or ""), run.role, text, marks)
        table.add_row(*map(Text, cells))
    left = f"… and {len(runs) - MAX_RUNS} more runs\n" if len(runs) > MAX_RUNS else ""
    return plain_text(table) + left


def row_figure(runs: list[Run]) -> Any:
    """The mask of a row: queries down, keys across, coloured by the depth of the key's run."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    length = runs[-1].stop
    index = np.arange(0, length, -(-length // MAX_CELLS))  # of a longer row, tokens in even steps
    mask = np.full((len(index), len(index)), np.nan, np.float32)
    for run in runs:
        if run.role != "padding":
            columns = (run.start <= index) & (index < run.stop)
            keys, queries = index[columns], index[:, None]
            seen = (keys <= queries) & (queries < run.visible_until)
            mask[:, columns] = np.where(seen, run.depth, mask[:, columns])
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    deepest = max(run.depth for run in runs)
    axes.imshow(
        mask,
        cmap="viridis",
        vmin=-0.5,
        vmax=deepest + 1,
        interpolation="nearest",
        extent=(-0.5, length - 0.5, length - 0.5, -0.5),
    )
    labelled = [run for run in runs if run.stop - run.start >= length / 60]
    axes.set_yticks([(run.start + run.stop - 1) / 2 for run in labelled])
    axes.set_yticklabels([_label(run) for run in labelled], fontsize=7, parse_math=False)
    for run in runs:
        for line in (axes.axhline, axes.axvline):
            line(run.start - 0.5, color="0.85", linewidth=0.4, zorder=0)
    axes.set_xlabel("key")
    axes.set_title("Who sees whom: a row is a query, colour how deep a key is in its tree")
    return figure


def _label(run: Run) -> str:
    text = " ".join(run.text.split())
    text = text[:27] + "…" if len(text) > 28 else text
    return f"{text} ({run.role})" if run.role else text
