"""What training runs found: a table, a picture, and the numbers behind both."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from numpy import linspace

from llmjepa_kernels.cli.comparison import compare, comparison_notes
from llmjepa_kernels.files import write_whole

# Key of a run's metrics, row of the table, format. Rows that no run has are left out.
ROWS = (
    ("loss", "loss", ".4f"),
    ("ntp_loss", "NTP loss", ".4f"),
    ("eval_ntp_loss", "held-out NTP loss", ".4f"),
    ("ood_ntp_loss", "  out of distribution", ".4f"),
    ("eval_stp_loss", "held-out STP loss", ".4f"),
    ("eval_sigreg_loss", "held-out SIGReg loss", ".4f"),
    ("eval_vicreg_loss", "held-out VICReg loss", ".4f"),
    ("accuracy", "held-out accuracy", ".1%"),
    ("ood_accuracy", "  out of distribution", ".1%"),
    ("unfinished", "answers that do not end", ".1%"),
    ("view_cosine", "cosine of Text and Code", ".3f"),
    ("pair_cosine", "cosine of Pred and Code", ".3f"),
    ("tokens_per_example", "tokens / example", ".1f"),
    ("seconds_per_example", "seconds / example", ".4f"),
    ("relative_cost", "cost, plain fine-tuning 1", ".2f"),
    ("tokens", "tokens in all", ",.0f"),
    ("flops_per_step", "FLOPs / update", ".3g"),
)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito


def write_report(runs: Sequence[dict[str, Any]], directory: Path, about: dict[str, Any]) -> str:
    """Writes ``report.txt``, ``report.json`` and ``report.png`` and returns the first.

    Args:
        runs: Each with ``name``; ``seed``; ``metrics``, see `ROWS`; ``history``, the logs of
            Trainer; ``cosines``, one per held-out pair of views, maybe empty; and maybe
            ``accuracy_interval``, that of 95 %. Runs of the same name differ in their seed.
        directory: Made if it does not exist.
        about: ``model``, ``data``, ``options`` and ``versions`` that the numbers depend on; maybe
            ``objectives``, the names in order, the first of which the others are compared with,
            and ``remarks``, lines for the reader.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = about.get("objectives")
    found = compare(runs, names)
    lines = [comparison_table(runs, names), *comparison_notes(found), *notes(runs, about)]
    table = "\n".join(lines) + "\n"
    write_whole(directory / "report.txt", table)
    report = {
        "about": about,
        "summary": summarize(runs, names),
        "comparisons": [asdict(each) for each in found],
        "runs": list(runs),
    }
    write_whole(directory / "report.json", json.dumps(report, indent=1, default=str))
    write_whole(directory / "report.png", report_picture(runs))
    return table


def summarize(
    runs: Sequence[dict[str, Any]], names: Sequence[str] | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard deviation over the seeds and their number, of each metric by each name.

    With two names, ``difference`` is that of the runs with the same seed, second less first. The
    standard deviation is the unbiased one, and missing for a single seed. The order of the names
    may be given, as in `compare`.
    """
    by_name: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names or ()}
    for run in runs:
        by_name.setdefault(run["name"], {})[run["seed"]] = run["metrics"]
    by_name = {name: seeds for name, seeds in by_name.items() if seeds}
    if len(by_name) == 2:
        first, second = by_name.values()
        by_name["difference"] = {
            seed: {
                key: second[seed][key] - first[seed][key]
                for key in first[seed].keys() & second[seed]
            }
            for seed in first.keys() & second.keys()
        }
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for name, seeds in by_name.items():
        summary[name] = {}
        for key, *_ in ROWS:
            values = [metrics[key] for metrics in seeds.values() if key in metrics]
            if values:
                summary[name][key] = {"mean": mean(values), "seeds": len(values)}
                if len(values) > 1:
                    summary[name][key]["std"] = stdev(values)
    return summary


def comparison_table(runs: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> str:
    """One column per name, in plain text, as mean ± standard deviation over its seeds."""
    summary = summarize(runs, names)
    table = _table()
    for name in summary:
        table.add_column(name, justify="right")
    for key, row, spec in ROWS:
        cells = [_cell(metrics.get(key), spec, name) for name, metrics in summary.items()]
        if any(cells):
            table.add_row(row, *(cell or "-" for cell in cells))
    return plain_text(table)


def notes(runs: Sequence[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    """What a reader has to know before concluding anything from the table."""
    lines = []
    for run in runs:
        if "accuracy_interval" in run:
            low, high = (f"{bound:.1%}" for bound in run["accuracy_interval"])
            title = f"{run['name']}, seed {run['seed']}"
            lines.append(f"95 % interval of the held-out accuracy of {title}: {low} to {high}")
    if len(runs) > 1 and len({run["seed"] for run in runs}) == 1:
        lines.append("One seed: --seeds 1 2 3 shows how much of a difference is chance.")
    lines += about.get("remarks", ())
    lines.append("Numbers vary in their last digits with CPU, threads and versions.")
    lines.append(f"model: {about['model']}, data: {about['data']}")
    lines.append(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    return lines


def format_table(
    rows: Sequence[tuple[str, dict[str, Any]]], columns: Sequence[tuple[str, str, str]]
) -> str:
    """One line per name and its numbers, in plain text; a dash for those that are not there.

    Args:
        rows: Name and numbers.
        columns: Key of the numbers, header, format.
    """
    from rich.markup import escape

    table = _table()
    for _, header, _ in columns:
        table.add_column(header, justify="right")
    for name, values in rows:
        found = [(values.get(key), spec) for key, _, spec in columns]
        table.add_row(escape(name), *("-" if x is None else format(x, spec) for x, spec in found))
    return plain_text(table)


def _table() -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold")  # the ends of names tell them apart
    return table


def plain_text(table: Any) -> str:
    """A table of Rich, as it is in a file."""
    from rich.console import Console

    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip()) + "\n"


def _cell(found: dict[str, float] | None, spec: str, name: str) -> str:
    if found is None:
        return ""
    scale, sign, unit = 1.0, "", ""
    if name == "difference":
        sign = "+"
        if spec.endswith("%"):  # of percentages, which is no percentage
            scale, spec, unit = 100.0, spec.replace("%", "f"), " points"
    cell = format(scale * found["mean"], sign + spec)
    if "std" in found:
        cell += f" ± {format(scale * found['std'], spec)}"
    return cell + unit


def report_picture(runs: Sequence[dict[str, Any]]) -> bytes:
    """Losses, the cosines of the held-out views and the accuracy; a colour per name, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(15, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses = {"ntp_loss": "Next-token loss", "jepa_loss": "JEPA loss", "stp_loss": "STP loss"}
    if not any("stp_loss" in log for run in runs for log in run["history"]):
        del losses["stp_loss"]
    axes = figure.subplots(1, len(losses) + 2)
    names = list(dict.fromkeys(run["name"] for run in runs))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    for axis, key in zip(axes, losses, strict=False):
        for run in runs:
            points = [(log["step"], log[key]) for log in run["history"] if key in log]
            if points:
                axis.plot(*zip(*points, strict=True), color=color[run["name"]], lw=1)
        axis.set_xlabel("update", fontsize=8)
        axis.set_ylabel("nats per token" if key == "ntp_loss" else "distance", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if any(log.get(key, 0) > 0 for run in runs for log in run["history"]):
            axis.set_yscale("log")
    _draw_cosines(axes[-2], runs, color)
    _draw_accuracy(axes[-1], runs, color)
    titles = (
        *losses.values(),
        "cos(Pred(Enc(Text)), Enc(Code)), held out",
        "Held-out accuracy, a dot per seed",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        if not axis.has_data():
            axis.text(0.5, 0.5, "none", ha="center", transform=axis.transAxes, color="0.6")
    handles = [figure.axes[0].plot([], [], color=color[name], label=name)[0] for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _draw_cosines(axis: Any, runs: Sequence[dict[str, Any]], color: dict[str, str]) -> None:
    """The cosines of all seeds of a name together."""
    cosines: dict[str, list[float]] = {}
    for run in runs:
        cosines.setdefault(run["name"], []).extend(run["cosines"])
    pooled = [cosine for some in cosines.values() for cosine in some]
    if pooled:
        bins = linspace(min(pooled), max(pooled), 41)
        for name, some in cosines.items():
            axis.hist(some, bins=bins, color=color[name], alpha=0.6)
    axis.set_xlabel("cosine similarity", fontsize=8)
    axis.set_ylabel("held-out pairs", fontsize=8)


def _draw_accuracy(axis: Any, runs: Sequence[dict[str, Any]], color: dict[str, str]) -> None:
    """A dot per run with its 95 % interval, a bar at their mean; out of distribution beside in."""
    from matplotlib.ticker import PercentFormatter

    ticks = {}
    for place, (key, where) in enumerate(
        (("accuracy", "in distribution"), ("ood_accuracy", "out of distribution"))
    ):
        for shift, name in enumerate(color):
            found = [r["metrics"][key] for r in runs if r["name"] == name and key in r["metrics"]]
            if found:
                x = place + 0.3 * (shift - (len(color) - 1) / 2)
                axis.plot([x] * len(found), found, "o", color=color[name], alpha=0.6, ms=5)
                axis.plot([x - 0.1, x + 0.1], [mean(found)] * 2, color=color[name], lw=2)
                ticks[place] = where
                for run in runs if key == "accuracy" else ():
                    if run["name"] == name and "accuracy_interval" in run:
                        interval = run["accuracy_interval"]
                        axis.plot([x, x], interval, color=color[name], alpha=0.4, lw=1)
    axis.set_xticks(list(ticks), ticks.values(), fontsize=8)
    axis.set_xlim(-0.7, len(ticks) - 0.3)
    axis.set_ylabel("correct", fontsize=8)
    axis.set_ylim(max(0.0, axis.get_ylim()[0]), min(1.0, axis.get_ylim()[1]))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))  # with decimals where they are needed
