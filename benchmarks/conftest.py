"""Options of `pytest benchmarks --benchmark-only`, and the list of what cannot run here."""

from pathlib import Path

import pytest
import torch

from benchmarks.workload import load_examples


def pytest_addoption(parser):
    group = parser.getgroup("llmjepa_kernels benchmarks")
    group.addoption("--full", action="store_true", help="the whole sweep, up to 64k tokens")
    group.addoption("--data", type=Path, help="JSONL of chats whose lengths to use as well")
    group.addoption("--tokenizer", help="of --data; default: one trained on it")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--threads", type=int, help="of the CPU")


def pytest_configure(config):
    if config.option.threads:
        torch.set_num_threads(config.option.threads)


@pytest.fixture(scope="session")
def device(request):
    return request.config.option.device


@pytest.fixture(scope="session")
def examples(request):
    """A thousand examples in the shared layout: those of --data, or of the built-in grammar."""
    return load_examples(request.config.option.data, request.config.option.tokenizer, 1000)


def pytest_terminal_summary(terminalreporter):
    reasons = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        terminalreporter.section("what cannot run here")
        for reason, count in sorted(reasons.items()):
            terminalreporter.write_line(f"{count:4d}  {reason}")
