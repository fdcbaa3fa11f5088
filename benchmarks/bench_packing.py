"""Packing a thousand examples into rows, with and without shared prefixes."""

import pytest

from benchmarks.baselines import Sequences
from benchmarks.workload import name_of
from llmjepa_kernels import pack


def pytest_generate_tests(metafunc):
    metafunc.parametrize("data", metafunc.config.option.data or [None], ids=name_of)


@pytest.mark.parametrize("max_length", [None, 4096])
@pytest.mark.parametrize("share_prefixes", [False, True])
def test_packing(benchmark, data, load, max_length, share_prefixes):
    examples = load(data)
    benchmark.group = f"packing 1,000 examples of {name_of(data)}: max_length={max_length}"
    batch = benchmark(pack, examples, max_length, share_prefixes=share_prefixes)
    verify(batch, examples)
    benchmark.extra_info["tokens"] = batch["input_ids"].numel()
    benchmark.extra_info["rows"] = len(batch["input_ids"])


def verify(batch, examples):
    """What the last tokens of the views see are the views, and every label is there once."""
    views = [views for x in examples for views in Sequences.of(x).pairs]
    found = []
    for row, pairs in enumerate(batch["view_pairs"]):
        ids, until = batch["input_ids"][row], batch["visible_until"][row]
        for pair in pairs[pairs[:, 0] >= 0].tolist():
            seen = ((until[: end + 1] > end).nonzero().flatten() for end in pair)
            found.append(tuple(ids[tokens].tolist() for tokens in seen))
    assert sorted(found) == sorted(views)
    supervised = sum(y != -100 for x in examples for y in Sequences.of(x).labels)
    assert int((batch["labels"] != -100).sum()) == supervised
