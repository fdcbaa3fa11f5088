"""The figure of `llmjepa analyze`: what the views of checkpoints look like, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy import linspace

from llmjepa_kernels.cli.report import COLORS

STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
}


def analysis_figure(analyses: Sequence[dict[str, Any]]) -> Figure:
    """Singular values and cosines of all checkpoints, a colour each; t-SNE in a panel each.

    Args:
        analyses: As `analyze_checkpoint` gives them, at most as many as there are `COLORS`.
    """
    columns = min(len(analyses), 3)
    rows = ceil(len(analyses) / columns)
    with rc_context(STYLE):
        if len(analyses) == 1:
            figure = Figure(figsize=(12, 3), layout="constrained")
            subfigures: Any = figure.subfigures(1, 2, width_ratios=[3, 1])
        else:
            figure = Figure(figsize=(9.6, 3 + 2.9 * rows), layout="constrained")
            subfigures = figure.subfigures(2, 1, height_ratios=[3, 2.9 * rows])
        FigureCanvasAgg(figure)
        curves, maps = subfigures
        spectrum, *histograms = curves.subplots(1, 3)
        _draw_spectra(spectrum, analyses)
        if len(analyses) > 1:
            curves.legend(*spectrum.get_legend_handles_labels(), loc="outside upper left", ncols=3)
        _draw_cosines(histograms, analyses)
        panels = maps.subplots(rows, columns, squeeze=False).ravel()
        for panel in panels[len(analyses) :]:
            panel.set_axis_off()
        for panel, analysis, color in zip(panels, analyses, COLORS, strict=False):
            _draw_map(panel, analysis, color)
    return figure


def _plain(analysis: dict[str, Any]) -> str:
    """Its name, in which no dollar begins a formula."""
    return str(analysis["name"]).replace("$", r"\$")


def _draw_spectra(axis: Any, analyses: Sequence[dict[str, Any]]) -> None:
    for analysis, color in zip(analyses, COLORS, strict=False):
        values = [value for value in analysis["singular_values"] if value > 0]
        axis.plot(range(1, len(values) + 1), values, color=color, label=_plain(analysis))
        predicted = [value for value in analysis["pred_singular_values"] or () if value > 0]
        axis.plot(range(1, len(predicted) + 1), predicted, color=color, lw=0.8, ls=(0, (3, 2)))
    axis.set(
        title="Singular values of Enc(Text) \N{MINUS SIGN} Enc(Code)",
        xlabel="index (dashed: of Pred \N{MINUS SIGN} Enc(Code))",
        yscale="log",
    )


def _draw_cosines(axes: Any, analyses: Sequence[dict[str, Any]]) -> None:
    """Two histograms with the same bins, so that views and predictions can be compared."""
    kinds = {"text_code": "Enc(Text)", "pred_code": "Pred(Enc(Text))"}
    shown = [c for a in analyses for kind in kinds for c in a[f"{kind}_cosines"] or ()]
    shown += [a[f"other_{kind}_cosine"] for a in analyses for kind in kinds if a[f"{kind}_cosines"]]
    bins = linspace(min(floor(10 * min(shown)) / 10, 0.9), 1, 36)
    for axis, (kind, name) in zip(axes, kinds.items(), strict=True):
        for analysis, color in zip(analyses, COLORS, strict=False):
            cosines = analysis[f"{kind}_cosines"]
            if cosines is None:
                continue
            weights = [1 / len(cosines)] * len(cosines)
            style = {"bins": bins, "weights": weights, "color": color}
            axis.hist(cosines, histtype="stepfilled", alpha=0.25, **style)
            axis.hist(cosines, histtype="step", linewidth=1.2, **style)
            axis.axvline(analysis[f"other_{kind}_cosine"], color=color, linestyle=(0, (3, 2)))
        axis.set_xlabel("cosine (dashed: with other examples)")
        if not axis.has_data():
            axis.text(0.5, 0.5, "no [PRED] tokens", ha="center", transform=axis.transAxes)
            axis.set_yticks([])
        axis.set(title=f"cos({name}, Enc(Code))", xlim=(bins[0], 1.01))
    axes[0].set_ylabel("fraction of examples")


def _draw_map(axis: Any, analysis: dict[str, Any], color: str) -> None:
    for name, marker, fill in (("Code", "s", "0.55"), ("Text", "o", color)):
        x, y = zip(*analysis["tsne"][name.lower()], strict=True)
        axis.scatter(x, y, s=9, marker=marker, color=fill, linewidth=0, alpha=0.75, label=name)
    axis.set(title=f"t-SNE: {_plain(analysis)}", xticks=[], yticks=[], aspect="equal")
    axis.set_adjustable("datalim")
    axis.margins(0.08)
    axis.spines[:].set(visible=True, color="0.8")
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, markerscale=2, handletextpad=0.1
    )
