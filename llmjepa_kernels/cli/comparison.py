"""Whether runs differ: paired tests over the seeds that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from statistics import mean
from typing import Any

METRICS = {
    "accuracy": "held-out accuracy",
    "ood_accuracy": "accuracy out of distribution",
    "eval_ntp_loss": "held-out NTP loss",
}


@dataclass(frozen=True)
class Comparison:
    """What an objective changes of a metric, beside the first objective.

    Attributes:
        metric: A key of ``METRICS``.
        name, baseline: Of the two objectives.
        seeds: How many both have.
        difference: The mean over them, of `name` less `baseline`.
        interval: That of 95 %, by the t distribution.
        p_value: Of the paired t-test that there is no difference; None where all differences are
            the same and not 0, of which t is no number.
        p_holm: The same, corrected by Holm's method for all comparisons of a report.
    """

    metric: str
    name: str
    baseline: str
    seeds: int
    difference: float
    interval: tuple[float, float]
    p_value: float | None
    p_holm: float | None


def compare(runs: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> list[Comparison]:
    """Compares every objective with the first one; those that share two seeds with it.

    Same seeds mean the same data in the same order, and the same weights at the beginning.

    Args:
        runs: Each with ``name``, ``seed`` and ``metrics``.
        names: Of all objectives, in order, as some may have no run. Default: as the runs come.
    """
    by_name: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names or ()}
    for run in runs:
        by_name.setdefault(run["name"], {})[run["seed"]] = run["metrics"]
    found: list[dict[str, Any]] = []
    for metric in METRICS:
        baseline, *others = by_name or [""]
        for name in others:
            pairs = [
                (by_name[name][seed][metric], metrics[metric])
                for seed, metrics in by_name[baseline].items()
                if metric in metrics and metric in by_name[name].get(seed, {})
            ]
            if len(pairs) > 1:
                what = {"metric": metric, "name": name, "baseline": baseline}
                found.append({**what, "seeds": len(pairs), **_paired(pairs)})
    corrected = iter(holm([p for each in found if (p := each["p_value"]) is not None]))
    return [
        Comparison(**each, p_holm=None if each["p_value"] is None else next(corrected))
        for each in found
    ]


def _paired(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    from scipy.stats import ttest_rel

    differences = [value - before for value, before in pairs]
    same = differences[0]
    if all(isclose(each, same, abs_tol=1e-12) for each in differences):
        p_value = 1.0 if isclose(same, 0, abs_tol=1e-12) else None
        return {"difference": same, "interval": (same, same), "p_value": p_value}
    test: Any = ttest_rel(*zip(*pairs, strict=True))
    interval = test.confidence_interval(0.95)
    return {
        "difference": mean(differences),
        "interval": (float(interval.low), float(interval.high)),
        "p_value": float(test.pvalue),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of one false alarm among all stays that of a single test.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
        Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def comparison_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """A line each, for a report."""
    lines = []
    tested = sum(each.p_value is not None for each in comparisons)
    for each in comparisons:
        points = each.metric != "eval_ntp_loss"
        scale, digits, unit = (100, 1, " points") if points else (1, 4, "")
        low, high = (f"{scale * bound:+.{digits}f}" for bound in each.interval)
        how_sure = "in each, of which there is no test"
        if each.p_value is not None:
            how_sure = f"(95 % interval {low} to {high}), p = {each.p_value:.3f}, "
            how_sure += f"{each.p_holm:.3f} by Holm for {tested}"
        lines.append(
            f"{each.name} against {each.baseline}, {METRICS[each.metric]}, {each.seeds} paired "
            f"seeds: {scale * each.difference:+.{digits}f}{unit} {how_sure}"
        )
    return lines
