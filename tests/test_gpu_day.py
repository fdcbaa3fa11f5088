"""The GPU day in miniature on a CPU: its parts start, and say what was found in this run alone."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_day, gpu_parts, timing, train_step
from benchmarks.report import free_name

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("part", [name for name in gpu_parts.PARTS if not name.startswith("tests")])
def test_every_part_of_the_gpu_day_starts(part, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_times", lambda function, device: [timing.measure(function)] * 3)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # takes long
    for variable in ("LLMJEPA_AUTOTUNE", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # what a part sets in its own process ends with the test
    setting = gpu_parts.Setting("cpu", True, tmp_path)
    rows = list(gpu_parts.PARTS[part].rows(setting))
    assert rows
    assert json.loads(json.dumps(rows)) == rows
    assert not any("Error" in row.get("note", "") for row in rows)
    ours = {row["work"]: row for row in rows if row.get("what") in ("ours", train_step.OURS)}
    for row in rows:
        if "speed" in row:  # the time over that of ours
            ratio = row["milliseconds"] / ours[row["work"]]["milliseconds"]
            assert row["speed"] == pytest.approx(ratio)


def test_units_of_the_gpu_day(monkeypatch, tmp_path):
    setting = gpu_parts.Setting("cpu", True, tmp_path)
    monkeypatch.setattr(gpu_parts, "matmul_rate", lambda *_: 5e12)
    monkeypatch.setattr(gpu_parts, "copy_bandwidth", lambda *_: 3e12)
    matmul, copy = gpu_parts.device_limits(setting)
    assert (matmul["rate"], copy["note"]) == (5, "3.00 TB/s read and written")

    seconds = iter([1.0, 2.0, 3.0, 8.0])
    monkeypatch.setattr(gpu_parts, "device_seconds", lambda *_: next(seconds))
    peers = {"ours": gpu_parts.PEERS["ours"], "other": gpu_parts.PEERS["SDPA, dense mask"]}
    monkeypatch.setattr(gpu_parts, "PEERS", peers)
    rows = list(gpu_parts.attention(setting))
    (case,) = gpu_parts.attention_cases(setting)
    forward, backward = case.flops
    assert [row["milliseconds"] for row in rows] == [1000, 2000, 3000, 8000]
    assert [row["speed"] for row in rows] == [1, 1, 3, 4]
    assert [row["rate"] * 1e12 for row in rows] == pytest.approx(
        [forward, (forward + backward) / 2, forward / 3, (forward + backward) / 8]
    )

    clock = iter([0.0, 3.0, 10.0, 19.0])  # before and after three calls of each
    monkeypatch.setattr(gpu_parts, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    rows = list(gpu_parts.launches(setting))
    assert [(row["milliseconds"], row["speed"]) for row in rows] == [(1000, 1), (3000, 3)]


@pytest.mark.slow
def test_the_gpu_day_goes_on_after_parts_that_fail(tmp_path, capfd):
    """One runs a test in a process of its own, one gets no time."""
    options = ["--device", "cpu", "--tiny", "--output", str(tmp_path)]
    assert gpu_day.main([*options, "--parts", "loss", "--minutes", "0"]) == 1
    assert json.loads((tmp_path / "gpu_day.json").read_text())["command"]["ended"][0][
        "ended"
    ].startswith("out of time")
    assert gpu_day.main([*options, "--parts", "tests_ops", "loss", "--minutes", "9"]) == 0
    report = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [part["ended"] for part in report["command"]["ended"]] == ["ok", "ok"]
    (table,) = report["tables"]
    assert [row["note"] for row in table["rows"] if row["work"] == "tests"] == ["1 passed"]
    assert {row["what"] for row in table["rows"] if row["part"] == "loss"} == {
        "ours",
        "plain PyTorch",
    }
    assert "What the GPU showed" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "tests/a.py::test_b[x y] PASSED     [  3%]",
            ("tests/a.py::test_b[x y]", "PASSED"),
        ),
        ("tests/a.py::test_b SKIPPED (needs a GPU) [100%]", ("tests/a.py::test_b", "SKIPPED")),
        ("[gw3] [ 50%] FAILED tests/a.py::test_b[x y] ", ("tests/a.py::test_b[x y]", "FAILED")),
        ("[gw3] node down: Not properly terminated", None),
        ("FAILED tests/a.py::test_b - assert 1 == 2", None),
    ],
)
def test_outcomes_are_read_from_pytest(line, expected):
    found = gpu_parts.OUTCOME.match(line)
    got = found and (found["name"] or found["other"], found["a"] or found["b"])
    assert got == expected


def test_rows_of_an_earlier_run_are_not_this_runs(tmp_path, monkeypatch):
    (tmp_path / "device.jsonl").write_text('{"part": "device"}\n')
    monkeypatch.setattr(gpu_day.sys, "executable", "false")
    args = argparse.Namespace(output=tmp_path, device="cpu", tiny=True)
    assert gpu_day.start_part("device", args, 60) == "failed with 1, see device.log"
    assert gpu_day.rows_of("device", tmp_path) == []


def test_results_are_not_written_over(tmp_path):
    names = []
    for _ in range(3):
        names.append(free_name(tmp_path / "a.json"))
        names[-1].touch()
    assert [path.name for path in names] == ["a.json", "a.1.json", "a.2.json"]
