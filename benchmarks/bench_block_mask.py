"""Construction of the tiles to visit, against FlexAttention's create_block_mask."""

from functools import partial

import pytest

from benchmarks.peers import (
    MAX_FLEX_TOKENS,
    UnavailableError,
    flex_block_mask,
    verify_block_mask,
)
from benchmarks.timing import synchronize
from benchmarks.workload import random_row
from llmjepa_kernels import BlockMask

FLEX = "create_block_mask"
MAX_COMPILED_TOKENS = 65536


def pytest_generate_tests(metafunc):
    lengths = [
        1024 * n for n in ((1, 4, 16, 64, 256, 1024) if metafunc.config.option.full else (1, 8, 64))
    ]
    metafunc.parametrize("seq", lengths)


@pytest.mark.parametrize("maker", ["ours", FLEX, f"{FLEX} compiled"])
def test_block_mask(benchmark, seq, maker, device):
    compiled = maker == f"{FLEX} compiled"
    if maker != "ours" and seq > (MAX_COMPILED_TOKENS if compiled else MAX_FLEX_TOKENS):
        pytest.skip(f"{maker}: would evaluate {seq} x {seq} pairs")
    visible_until = random_row(seq, 64)["visible_until"].to(device)
    if maker == "ours":
        make = partial(BlockMask.from_visible_until, visible_until, (128, 128))
    else:
        make = flex_block_mask(visible_until, compiled=compiled)
    try:
        verify_block_mask(make(), visible_until)
    except UnavailableError as reason:
        pytest.skip(f"{maker}: {reason}")

    def run():
        make()
        synchronize(device)

    benchmark.group = f"block mask: N={seq}"
    benchmark(run)
