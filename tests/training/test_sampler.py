"""Every update keeps its examples; only who trains on which changes, towards equal work."""

from itertools import chain

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from llmjepa_kernels import Example, Segment, llm_jepa_example
from llmjepa_kernels.training.sampler import UpdateSampler, deal, example_work


def updates(sampler, batch_size, processes, accumulation, *, drop_last=False, even_batches=True):
    """Per update, the examples of each process as Accelerate deals out batches."""
    batches = BatchSampler(sampler, batch_size, drop_last)
    shards = [batches]
    if processes > 1:
        shards = [
            BatchSamplerShard(batches, processes, rank, even_batches=even_batches)
            for rank in range(processes)
        ]
    shards = [list(shard) for shard in shards]
    longest = max(map(len, shards))
    return [
        [[i for batch in shard[start : start + accumulation] for i in batch] for shard in shards]
        for start in range(0, longest, accumulation)
    ]


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 4),
    processes=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    drop_last=st.booleans(),
    even_batches=st.booleans(),
    seed=st.integers(0, 99),
)
def test_updates_keep_their_examples_and_processes_their_counts(
    count, batch_size, processes, accumulation, drop_last, even_batches, seed
):
    options = {"drop_last": drop_last, "even_batches": even_batches}
    plain = list(SeedableRandomSampler(range(count), data_seed=seed))
    work = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    sampler = UpdateSampler(
        plain,
        batch_size,
        num_processes=processes,
        accumulation_steps=accumulation,
        work=lambda index, update: work[index],
        **options,
    )
    assert len(list(sampler)) == len(sampler)
    layout = (batch_size, processes, 1)  # of every accumulated batch by itself
    expected, actual = (updates(order, *layout, **options) for order in (plain, sampler))
    for before, after in zip(expected, actual, strict=True):
        assert sorted(chain(*before)) == sorted(chain(*after))
        assert list(map(len, before)) == list(map(len, after))

    # Any number of processes makes the same full batches.
    alone = updates(plain, batch_size * processes, 1, 1, drop_last=True)
    for before, after in zip(alone, actual[: len(alone)], strict=True):
        assert sorted(chain(*before)) == sorted(chain(*after))


def test_work_is_dealt_evenly():
    """Five updates of sixteen long-tailed examples on four processes."""
    work = torch.rand(80, generator=torch.Generator().manual_seed(0)).square().tolist()
    base = SequentialSampler(range(80))
    sampler = UpdateSampler(
        base, 2, num_processes=4, accumulation_steps=2, work=lambda index, update: work[index]
    )

    def imbalance(sampler):
        sums = [[sum(work[i] for i in r) for r in u] for u in updates(sampler, 2, 4, 2)]
        return sum(max(loads) for loads in sums) / sum(sum(loads) / 4 for loads in sums)

    assert imbalance(base) > 1.5
    assert imbalance(sampler) < 1.1


def test_epochs_differ_and_come_back():
    sampler = UpdateSampler(
        SeedableRandomSampler(range(20), data_seed=3), 4, num_processes=2, work=lambda i, u: i
    )
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]


def test_update_of_every_index():
    """The last update is short, in whichever way it is filled."""
    sampler = UpdateSampler(SequentialSampler(range(7)), 2, accumulation_steps=2, with_update=True)
    assert list(sampler) == [(i, i // 4) for i in range(7)]
    sampler = UpdateSampler(SequentialSampler(range(7)), 2, num_processes=2, with_update=True)
    assert list(sampler) == [*((i, i // 4) for i in range(7)), (0, 1)]
    seen = []
    sampler.work = lambda index, update: seen.append((index, update)) or 1.0
    assert sorted(sampler) == sorted(seen)


def test_deal_takes_the_longest_first():
    work = [1, 7, 3, 5, 2, 6]
    loads = [0, 0]
    assert deal(work, [3, 3], loads) == [[1, 2, 4], [5, 3, 0]]
    assert loads == [7 + 3 + 2, 6 + 5 + 1]
    assert deal(work, [1, 5], [0, 0]) == [[1], [5, 3, 2, 4, 0]]
    assert deal(work, [6, 0], [0, 0]) == [[1, 5, 3, 2, 4, 0], []]
    assert deal([1, 1, 1], [2, 1], [0, 0]) == [[0, 2], [1]]
    assert deal([3, 1], [1, 1], [3, 1]) == [[1], [0]]


def test_work_counts_tokens_and_visible_pairs():
    assert example_work(Example([Segment([5])]), 8) == 1 + 1 / 48
    example = llm_jepa_example([5, 6, 7], [8, 9], [9], pred_ids=[2])
    pairs = (1 + 2 + 3) + (4 + 5) + 4 + 1
    assert example_work(example, 8) == pytest.approx(7 + pairs / 48)
