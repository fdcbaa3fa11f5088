"""The table over seeds."""

from llmjepa_kernels.cli.report import comparison_table, format_table, notes, report_picture


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
