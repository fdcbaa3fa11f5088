"""The table over seeds."""

import json

import numpy as np
import pytest
from scipy import stats

from llmjepa_kernels.cli.comparison import compare, comparison_notes, holm
from llmjepa_kernels.cli.report import (
    comparison_table,
    format_table,
    notes,
    report_picture,
    summarize,
    write_report,
)


def run(name, seed, **metrics):
    return {"name": name, "seed": seed, "metrics": metrics, "history": [], "cosines": []}


def test_one_run():
    table = comparison_table([run("LLM-JEPA", 1, loss=1.5, ntp_loss=1.25)])
    assert table.splitlines()[0].split() == ["LLM-JEPA"]
    assert [line.split()[-1] for line in table.splitlines()[2:]] == ["1.5000", "1.2500"]


def test_two_names_over_seeds_and_what_one_of_them_lacks():
    runs = [run("NTP only", 1, loss=1.0), run("NTP only", 2, loss=3.0)]
    runs += [run("LLM-JEPA", 1, loss=1.5, accuracy=0.5), run("LLM-JEPA", 2, loss=4.5, accuracy=0.7)]
    *_, loss, accuracy = comparison_table(runs).splitlines()
    assert " ".join(loss.split()) == "loss 2.0000 ± 1.4142 3.0000 ± 2.1213 +1.0000 ± 0.7071"
    assert " ".join(accuracy.split()) == "held-out accuracy - 60.0% ± 14.1% -"


def test_differences_of_accuracies_are_points_and_one_seed_is_named():
    runs = [run("NTP only", 1, accuracy=0.5), run("LLM-JEPA", 1, accuracy=0.625)]
    runs[1]["accuracy_interval"] = (0.4, 0.8)
    assert comparison_table(runs).splitlines()[-1].split()[-2:] == ["+12.5", "points"]
    about = {"model": "m", "data": "d", "versions": {"torch": "2.13"}}
    found = notes(runs, about)
    assert found[0].endswith("accuracy of LLM-JEPA, seed 1: 40.0% to 80.0%")
    assert found[1].startswith("One seed: --seeds 1 2 3")
    assert found[-2:] == ["model: m, data: d", "torch 2.13"]


def test_names_are_never_cut_off():
    names = ["x" * 150 + end for end in "ab"]
    table = format_table([(name, {"loss": 1.5}) for name in names], [("loss", "loss", ".4f")])
    assert "".join(table.split()).count("x") == 300
    assert "…" not in table


def test_picture_without_any_data():
    assert report_picture([run("LLM-JEPA", 1)]).startswith(b"\x89PNG")


def three_objectives():
    accuracies = {
        "NTP only": (0.70, 0.74, 0.69, 0.73),
        "LLM-JEPA": (0.72, 0.75, 0.73, 0.74),
        "STP": (0.70, 0.74, 0.69, 0.73),
    }
    return [
        run(name, seed, accuracy=accuracy, eval_ntp_loss=1 - accuracy)
        for name, found in accuracies.items()
        for seed, accuracy in enumerate(found)
    ]


def test_objectives_are_compared_seed_by_seed():
    found = compare([*three_objectives(), run("LLM-JEPA", 9, accuracy=0.1), run("a", 1)])
    assert [(each.metric, each.name) for each in found] == [
        ("accuracy", "LLM-JEPA"),
        ("accuracy", "STP"),
        ("eval_ntp_loss", "LLM-JEPA"),
        ("eval_ntp_loss", "STP"),
    ]
    first, same, loss, _ = found
    differences = np.array([0.02, 0.01, 0.04, 0.01])
    t = differences.mean() / (differences.std(ddof=1) / 2)
    assert (first.baseline, first.seeds) == ("NTP only", 4)
    assert first.difference == pytest.approx(0.02)
    assert first.p_value == pytest.approx(2 * stats.t.sf(t, 3))
    half = stats.t.ppf(0.975, 3) * differences.std(ddof=1) / 2
    assert first.interval == pytest.approx((0.02 - half, 0.02 + half))
    assert (same.difference, same.p_value, same.interval) == (0, 1, (0, 0))
    assert loss.difference == pytest.approx(-0.02)
    assert first.p_holm == pytest.approx(4 * first.p_value)
    lines = comparison_notes(found)
    assert lines[0].startswith(
        "LLM-JEPA against NTP only, held-out accuracy, 4 paired seeds: +2.0 points (95 % interval "
    )
    assert "-0.0200 (95 %" in lines[2]


def test_the_first_objective_is_what_the_others_are_compared_with():
    """Also where its first run has failed."""
    names = ["NTP only", "LLM-JEPA", "STP"]
    runs = [r for r in three_objectives() if (r["name"], r["seed"]) != ("NTP only", 0)]
    runs.sort(key=lambda r: r["seed"])
    assert {each.baseline for each in compare(runs)} == {"LLM-JEPA"}
    found = compare(runs, names)
    assert {(each.baseline, each.seeds) for each in found} == {("NTP only", 3)}
    assert list(summarize(runs, names)) == names
    alone = [r for r in runs if r["name"] != "NTP only"]
    assert compare(alone, names) == []
    assert list(summarize(alone, names)) == [*names[1:], "difference"]


def test_differences_that_are_all_the_same_have_no_test():
    before, after = (0.1, 0.2), (0.4, 0.5)
    runs = [run("NTP only", i, accuracy=x) for i, x in enumerate(before)]
    (found,) = compare([*runs, *(run("STP", i, accuracy=x) for i, x in enumerate(after))])
    assert (found.p_value, found.p_holm) == (None, None)
    assert comparison_notes([found]) == [
        "STP against NTP only, held-out accuracy, 2 paired seeds: +30.0 points in each, of which "
        "there is no test"
    ]


def test_holms_correction():
    # The example of R's p.adjust.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


def test_one_seed_or_one_objective_is_no_comparison(tmp_path):
    assert compare([run("NTP only", 1, accuracy=1), run("STP", 1, accuracy=0)]) == []
    assert compare([run("STP", 1, accuracy=1), run("STP", 2, accuracy=0)]) == []
    assert compare([]) == []
    about = {"model": "m", "data": "d", "versions": {}}
    assert "against" not in write_report([run("STP", 1, accuracy=1)], tmp_path, about)
    assert "p = " in write_report(three_objectives(), tmp_path, about)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["comparisons"][0]["name"] == "LLM-JEPA"
