"""Options of `pytest benchmarks --benchmark-only`, and the list of what cannot run here."""

from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.report import machine
from benchmarks.workload import load_examples


def pytest_addoption(parser):
    group = parser.getgroup("llmjepa_kernels benchmarks")
    group.addoption(
        "--full",
        action="store_true",
        help="the whole sweep, up to rows of 64k tokens",
    )
    group.addoption(
        "--data",
        type=Path,
        action="append",
        help="JSONL of chats whose lengths to use; may be repeated. Default: the built-in grammar",
    )
    group.addoption("--tokenizer", help="of --data; default: one trained on each")
    group.addoption(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="to measure on; default: cuda if there is one, else cpu",
    )
    group.addoption("--threads", type=int, help="of the CPU; default: as many as torch takes")


def pytest_configure(config):
    if config.option.threads:
        torch.set_num_threads(config.option.threads)


@pytest.fixture(scope="session")
def device(request):
    return request.config.option.device


@pytest.fixture(scope="session")
def load(request):
    """Loads a thousand examples in the shared layout, of a path or of the built-in grammar."""
    return cache(lambda data: load_examples(data, request.config.option.tokenizer, 1000))


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["llmjepa_kernels"] = {
        key: value for key, value in machine().items() if key != "time"
    }


def pytest_terminal_summary(terminalreporter):
    reasons = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        terminalreporter.section("what cannot run here")
        for reason, count in sorted(reasons.items()):
            terminalreporter.write_line(f"{count:4d}  {reason}")
