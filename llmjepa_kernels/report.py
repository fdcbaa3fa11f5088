"""What a training run found: a table, a picture, and the numbers behind both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy import linspace

# Key of a run's metrics, column of the table, format. Metrics that a run lacks show as a dash.
COLUMNS = (
    ("loss", "loss", ".4f"),
    ("ntp_loss", "NTP loss", ".4f"),
    ("eval_ntp_loss", "held-out\nNTP loss", ".4f"),
    ("exact_match", "held-out\nexact match", ".1%"),
    ("view_cosine", "cosine\nText, Code", ".3f"),
    ("pair_cosine", "cosine\nPred, Code", ".3f"),
    ("tokens_per_example", "tokens /\nexample", ".1f"),
    ("seconds_per_example", "seconds /\nexample", ".4f"),
    ("relative_cost", "relative\ncost", ".2f"),
)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito


def write_report(runs: Sequence[dict[str, Any]], directory: Path) -> str:
    """Writes ``report.txt``, ``report.json`` and ``report.png`` and returns the table.

    Args:
        runs: Each with ``name``; ``metrics``, see `COLUMNS`; ``history``, the logs of Trainer;
            and ``cosines``, one per held-out pair of views, maybe empty.
        directory: Made if it does not exist.
    """
    directory.mkdir(parents=True, exist_ok=True)
    table = format_table([(run["name"], run["metrics"]) for run in runs])
    (directory / "report.txt").write_text(table, encoding="utf-8")
    (directory / "report.json").write_text(json.dumps(list(runs), indent=1), encoding="utf-8")
    draw(runs, directory / "report.png")
    return table


def format_table(
    rows: Sequence[tuple[str, dict[str, Any]]], columns: Sequence[tuple[str, str, str]] = COLUMNS
) -> str:
    """One line per name and its numbers, in plain text; a dash for those that are not there."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for _, header, _ in columns:
        table.add_column(header, justify="right")
    for name, values in rows:
        found = [(values.get(key), spec) for key, _, spec in columns]
        table.add_row(name, *("-" if x is None else format(x, spec) for x, spec in found))
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip()) + "\n"


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Next-token loss, JEPA loss and the cosines of the held-out views, a colour per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    cosines = [cosine for run in runs for cosine in run["cosines"]]
    bins = linspace(min(cosines), max(cosines), 41) if cosines else []
    for run, color in zip(runs, COLORS, strict=False):
        for axis, key in zip(axes, ("ntp_loss", "jepa_loss"), strict=False):
            points = [(log["step"], log[key]) for log in run["history"] if key in log]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, label=run["name"])
        if run["cosines"]:
            axes[2].hist(run["cosines"], bins=bins, color=color, alpha=0.6, label=run["name"])
    titles = ("Next-token loss", "JEPA loss", "cos(Pred(Enc(Text)), Enc(Code)), held out")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
        else:
            axis.text(0.5, 0.5, "none", ha="center", transform=axis.transAxes, color="0.6")
    for axis, key in zip(axes, ("ntp_loss", "jepa_loss"), strict=False):
        axis.set_xlabel("update", fontsize=8)
        if any(log.get(key, 0) > 0 for run in runs for log in run["history"]):
            axis.set_yscale("log")
    axes[2].set_xlabel("cosine similarity", fontsize=8)
    figure.savefig(path, dpi=150)
