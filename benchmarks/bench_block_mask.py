"""Construction of the tiles to visit, against FlexAttention's create_block_mask."""

import pytest
import torch

from benchmarks.peers import flex_block_mask
from benchmarks.timing import synchronize
from benchmarks.workload import random_row
from llmjepa_kernels import BlockMask

MAX_DENSE_TOKENS = 8192  # create_block_mask evaluates every pair


def pytest_generate_tests(metafunc):
    lengths = [
        1024 * n for n in ((1, 4, 16, 64, 256, 1024) if metafunc.config.option.full else (1, 8, 64))
    ]
    metafunc.parametrize("seq", lengths)


@pytest.mark.parametrize("maker", ["ours", "create_block_mask"])
def test_block_mask(benchmark, seq, maker, device):
    if maker != "ours" and seq > MAX_DENSE_TOKENS:
        pytest.skip(f"create_block_mask: evaluates {seq} x {seq} pairs")
    visible_until = random_row(seq, 64)["visible_until"].to(device)
    make = {
        "ours": lambda: BlockMask.from_visible_until(visible_until, (128, 128)),
        "create_block_mask": lambda: flex_block_mask(visible_until),
    }[maker]
    verify(make(), visible_until)

    def run():
        make()
        synchronize(device)

    benchmark.group = f"block mask: N={seq}"
    benchmark(run)


def verify(mask, visible_until, block=128):
    """Every visible tile of some query blocks is listed, and no other."""
    seq = visible_until.shape[1]
    key = torch.arange(seq, device=visible_until.device)
    blocks = -(-seq // block)
    for m in torch.linspace(0, blocks - 1, min(blocks, 8)).long().tolist():
        query = key[m * block : (m + 1) * block, None]
        seen = ((key <= query) & (query < visible_until)).any(dim=0)
        padded = torch.nn.functional.pad(seen, (0, -seq % block))
        expected = padded.view(-1, block).any(dim=1).nonzero().flatten().tolist()
        assert sorted(tiles(mask, m)) == expected


def tiles(mask, m):
    if isinstance(mask, BlockMask):
        low, high = mask.kv_offsets[0, m : m + 2].tolist()
        return mask.kv_indices[0, low:high].tolist()
    listed = []
    for count, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        listed += indices[0, 0, m, : int(count[0, 0, m])].tolist()
    return listed
