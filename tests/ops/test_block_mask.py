import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjepa_kernels import BlockMask
from llmjepa_kernels.ops.block_mask import TILE_TIMES, TILE_TIMES_SM_100, choose_block_size
from llmjepa_kernels.ops.dense import visible
from tests.support.helpers import random_rows


def dense_tiles(seen: torch.Tensor, block_m: int, block_n: int) -> torch.Tensor:
    """0, 1 or 2 for every tile, counted pair by pair."""
    batch, seq, _ = seen.shape
    grid = torch.zeros(batch, -(-seq // block_m), -(-seq // block_n), dtype=torch.int8)
    for m in range(grid.shape[1]):
        for n in range(grid.shape[2]):
            rows = slice(m * block_m, (m + 1) * block_m)
            tile = seen[:, rows, n * block_n : (n + 1) * block_n].flatten(1)
            grid[:, m, n] = tile.any(1).to(torch.int8) + tile.all(1)
    return grid


def transposed_to_dense(mask: BlockMask) -> torch.Tensor:
    return BlockMask(
        mask.visible_until,
        mask.block_size[::-1],
        mask.q_offsets,
        mask.q_full_start,
        mask.q_indices,
        mask.kv_offsets,
        mask.kv_full_start,
        mask.kv_indices,
    ).to_dense()


@settings(deadline=None, max_examples=60)
@given(
    seq=st.integers(1, 150),
    batch=st.integers(1, 3),
    mean_length=st.sampled_from([1.0, 4.0, 15.0, 200.0]),
    block_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 10**6),
)
def test_lists_are_exactly_the_visible_tiles(seq, batch, mean_length, block_size, seed):
    visible_until, _ = random_rows(batch, seq, seed, mean_length)
    mask = BlockMask.from_visible_until(visible_until, block_size)
    expected = dense_tiles(visible(visible_until), *block_size)
    torch.testing.assert_close(mask.to_dense(), expected, rtol=0, atol=0)
    torch.testing.assert_close(transposed_to_dense(mask).mT, expected, rtol=0, atol=0)
    assert mask.num_tiles == (expected > 0).sum()
    assert mask.num_full_tiles == (expected == 2).sum()


@settings(deadline=None, max_examples=40)
@given(
    seq=st.integers(1, 120),
    window=st.integers(1, 40),
    block=st.sampled_from([1, 5, 16]),
    seed=st.integers(0, 10**6),
)
def test_a_window_only_drops_invisible_tiles_and_never_calls_a_masked_one_full(
    seq, window, block, seed
):
    visible_until, positions = random_rows(2, seq, seed)
    mask = BlockMask.from_visible_until(
        visible_until, (block, block), position_ids=positions, window=window
    )
    tiles = mask.to_dense()
    expected = dense_tiles(visible(visible_until, positions, window), block, block)
    assert (tiles > 0)[expected > 0].all()
    assert (expected == 2)[tiles == 2].all()
    torch.testing.assert_close(transposed_to_dense(mask).mT, tiles, rtol=0, atol=0)
    if block == 1:
        torch.testing.assert_close(tiles, expected, rtol=0, atol=0)


def test_a_window_drops_tiles():
    visible_until = torch.full((1, 256), 256, dtype=torch.int32)
    positions = torch.arange(256)[None]
    mask = BlockMask.from_visible_until(visible_until, (16, 16), position_ids=positions, window=16)
    assert mask.num_tiles == 16 + 15
    assert mask.window == 16


def test_lists_are_sorted_partial_then_full():
    visible_until, _ = random_rows(1, 300, 5, 60.0)
    mask = BlockMask.from_visible_until(visible_until, (16, 16))
    for m in range(mask.num_blocks[0]):
        low, middle, high = (
            int(x)
            for x in (mask.kv_offsets[0, m], mask.kv_full_start[0, m], mask.kv_offsets[0, m + 1])
        )
        for part in (mask.kv_indices[0, low:middle], mask.kv_indices[0, middle:high]):
            assert (part.diff() > 0).all()


@pytest.mark.parametrize("mean_length", [20, 150, 1000, 20000])
@pytest.mark.parametrize("compute_capability", [None, (9, 0), (10, 0)])
def test_the_chosen_block_size_is_the_one_of_least_modelled_time(mean_length, compute_capability):
    visible_until, _ = random_rows(3, 3000, seed=1, mean_length=mean_length)
    times = TILE_TIMES_SM_100 if compute_capability == (10, 0) else TILE_TIMES

    def time(side):
        mask = BlockMask.from_visible_until(visible_until, (side, side))
        partial, full = times[side]
        return (mask.num_tiles - mask.num_full_tiles) * partial + mask.num_full_tiles * full

    assert choose_block_size(visible_until, compute_capability) == min(times, key=time)


def test_large_blocks_are_chosen_for_long_segments_only():
    short = torch.arange(4096) // 16 * 16 + 16
    long = torch.full((4096,), 4096)
    for segments, side in ((short, 64), (long, 128)):
        mask = BlockMask.from_visible_until(segments.int()[None])
        assert mask.block_size == (side, side)


@pytest.mark.parametrize("seq", [1, 40, 64, 65, 100, 500])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (16, 32)])
def test_a_schedule_travels_as_tensors(seq, block_size):
    visible_until, _ = random_rows(2, seq, seq, 30.0)
    mask = BlockMask.from_visible_until(visible_until, block_size)
    schedule = mask.schedule()
    assert all(x.dtype == torch.int32 and len(x) == 2 for x in schedule.values())
    again = BlockMask.from_schedule(visible_until, schedule)
    torch.testing.assert_close(again.to_dense(), mask.to_dense(), rtol=0, atol=0)
    for size, inferred in zip(block_size, again.block_size, strict=True):
        # A row of a single block does not tell how far the block could have gone on.
        assert inferred == size or seq <= min(size, inferred)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("kv_indices", lambda x: x.long(), "kv_indices must be an int32 tensor"),
        ("q_offsets", lambda x: x[:, :-1], r"must be that of visible_until of shape \(2, 300\)"),
        ("q_indices", lambda x: x[:1], "must be that of visible_until"),
        ("kv_full_start", lambda x: x[:, :4], "must be that of visible_until"),
        ("kv_indices", lambda x: x + 3, "are not the lists of a row of 300 tokens"),
        ("kv_indices", lambda x: x - 1, "are not the lists"),
        ("q_offsets", lambda x: x * 2, "are not the lists"),
        ("q_offsets", lambda x: x + 1, "are not the lists"),
        ("kv_full_start", lambda x: x + 99, "are not the lists"),
        ("kv_full_start", lambda x: x - 99, "are not the lists"),
        ("kv_offsets", lambda x: x * 0, "are not the lists"),  # no tile
        ("q_full_start", lambda x: x - (x.diff(prepend=x[:, :1]) > 1).int(), "are not the lists"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(key, change, message):
    visible_until, _ = random_rows(2, 300, 0, 30.0)
    schedule = BlockMask.from_visible_until(visible_until).schedule()
    BlockMask.from_schedule(visible_until, schedule).check()
    with pytest.raises(ValueError, match=message):
        BlockMask.from_schedule(visible_until, {**schedule, key: change(schedule[key])}).check()


def test_blocks_that_no_power_of_two_gives_are_refused():
    visible_until, _ = random_rows(2, 300, 0, 30.0)
    schedule = BlockMask.from_visible_until(visible_until).schedule()
    schedule |= {key: schedule[key][:, :5] for key in ("kv_offsets", "kv_full_start")}
    with pytest.raises(ValueError, match="no power of two cuts seq = 300 into 4 blocks"):
        BlockMask.from_schedule(visible_until, schedule)


@pytest.mark.parametrize("window", [None, 5])
def test_no_tensor_has_a_dimension_of_one_but_for_the_rows(window):
    """torch.compile makes other graphs for them."""
    for seq in (1, 3, 64, 65):
        visible_until = torch.full((1, seq), seq, dtype=torch.int32)
        positions = torch.arange(seq)[None]
        mask = BlockMask.from_visible_until(visible_until, position_ids=positions, window=window)
        assert all(x.shape[1] > 1 for x in mask.schedule().values())


def test_only_powers_of_two_travel():
    mask = BlockMask.from_visible_until(torch.full((1, 9), 9, dtype=torch.int32), (3, 4))
    with pytest.raises(ValueError, match=r"powers of two.*\(3, 4\)"):
        mask.schedule()


def test_size_grows_with_tiles_not_with_the_square():
    seq = 1 << 18
    visible_until = ((torch.arange(seq) // 64 + 1) * 64).int()[None]
    mask = BlockMask.from_visible_until(visible_until, (64, 64))
    assert mask.num_tiles == seq // 64
    assert mask.kv_indices.numel() == seq // 64


def test_drawing():
    visible_until = torch.tensor([[8, 8, 8, 8, 6, 6, 8, 8]], dtype=torch.int32)
    lines = str(BlockMask.from_visible_until(visible_until, (2, 2))).split("\n")
    assert lines[0].startswith("BlockMask(batch=1, seq=8, block_size=(2, 2), tiles=9")
    assert lines[1:] == ["░", "█░", "██░", "██ ░"]


@pytest.mark.parametrize(
    ("visible_until", "message"),
    [
        (torch.tensor([[1, 2]]), "int32"),
        (torch.tensor([1, 2], dtype=torch.int32), "shape"),
        (torch.zeros(1, 0, dtype=torch.int32), "at least one row of at least one token"),
        (torch.zeros(0, 1, dtype=torch.int32), "at least one row of at least one token"),
        (torch.tensor([[1, 1]], dtype=torch.int32), r"visible_until\[0, 1\] = 1"),
        (torch.tensor([[2, 3]], dtype=torch.int32), r"visible_until\[0, 1\] = 3"),
    ],
)
def test_bad_visible_until(visible_until, message):
    with pytest.raises(ValueError, match=message):
        BlockMask.from_visible_until(visible_until)


def test_bad_options():
    visible_until = torch.full((1, 4), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="block_size"):
        BlockMask.from_visible_until(visible_until, (0, 4))
    with pytest.raises(ValueError, match="position_ids must be given"):
        BlockMask.from_visible_until(visible_until, window=2)
    with pytest.raises(ValueError, match=r"position_ids must be integers of shape \(1, 4\)"):
        BlockMask.from_visible_until(visible_until, window=2, position_ids=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="window must be an integer, at least 1"):
        BlockMask.from_visible_until(visible_until, window=0, position_ids=torch.zeros(1, 4).int())


@pytest.mark.parametrize("block_size", [(16, 16), (32, 8), (8, 64)])
@pytest.mark.parametrize("window", [1, 5, 40])
def test_a_window_narrows_the_lists_of_a_mask(window, block_size):
    """To those that are built with it, whose tiles never are listed without it."""
    for seed in range(4):
        visible_until, position_ids = random_rows(3, 20 + 57 * seed, seed=seed)
        options = {"position_ids": position_ids, "window": window}
        expected = BlockMask.from_visible_until(visible_until, block_size, **options)
        mask = BlockMask.from_visible_until(visible_until, block_size)
        narrowed = mask.within(window, position_ids)
        assert narrowed.window == window
        lists = (mask.schedule_tensors() for mask in (expected, narrowed))
        for x, y in zip(*lists, strict=True):  # the latter padded further
            assert torch.equal(torch.nn.functional.pad(x, (0, y.shape[1] - x.shape[1])), y)
        both = {**mask.schedule(), **narrowed.schedule()}
        assert BlockMask.from_schedule(visible_until, both, window).num_tiles == expected.num_tiles
        assert BlockMask.from_schedule(visible_until, both).num_tiles == mask.num_tiles
        with pytest.raises(ValueError, match=f"must know of no window, got window={window}"):
            narrowed.within(window, position_ids)


def test_the_work_of_a_window_is_proportional_to_its_tiles():
    """2 ** 33 causal tiles could not be listed first."""
    seq = 2**21
    positions = torch.arange(seq)[None]
    until = torch.full((1, seq), seq, dtype=torch.int32)
    mask = BlockMask.from_visible_until(until, (16, 16), position_ids=positions, window=16)
    assert mask.num_tiles == 2 * seq // 16 - 1


def test_tiles_of_long_segments_with_a_window():
    positions = torch.arange(8192)[None] % 2048
    until = (torch.arange(8192)[None] // 2048 * 2048 + 2048).int()
    mask = BlockMask.from_visible_until(until, (64, 64))
    assert (mask.num_tiles, mask.within(128, positions).num_tiles) == (2112, 372)
