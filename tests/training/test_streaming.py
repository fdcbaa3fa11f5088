"""Every sample once per pass, whatever the workers and processes, in bounded memory."""

import random
from collections import Counter
from itertools import islice

import pytest
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader

from llmjepa_kernels.example import Example, Segment
from llmjepa_kernels.training.streaming import ExampleStream, shuffled
from llmjepa_kernels.tubes import TokenPath, TubeSampler


class Rows:
    """Numbers as examples, read in shares; counts what was read."""

    def __init__(self, count):
        self.count, self.opened = count, 0

    def __call__(self, worker, num_workers, first):
        for number in range(worker, self.count, num_workers):
            self.opened += 1
            code, view = Segment([number], labels=[number]), Segment([8])
            yield f"row {number}", Example([code, view], [(0, 1)])


def numbers(examples):
    return [example.segments[0].input_ids[0] for example in examples]


def test_a_pass_has_every_row_once_and_passes_differ():
    stream = ExampleStream(Rows(50), buffer_size=8, seed=3)
    read = numbers(islice(stream, 150))
    passes = [read[i : i + 50] for i in (0, 50, 100)]
    assert all(sorted(each) == list(range(50)) for each in passes)
    assert passes[0] != passes[1] != passes[2]
    assert numbers(islice(stream, 150)) == read
    other = ExampleStream(Rows(50), buffer_size=8, seed=4)
    assert numbers(islice(other, 50)) != passes[0]


def test_tubes_are_drawn_anew_in_every_pass():
    example = Example([Segment(list(range(30)))], path=TokenPath(0, [(1, 10), (15, 30)]))
    stream = ExampleStream(lambda *share: [("row", example)], tubes=TubeSampler(count=2))
    first, second = ([x.tubes for x in islice(stream, 3)] for _ in range(2))
    assert first == second
    assert first[0] != first[1] != first[2]


def test_a_buffer_of_one_keeps_the_order_and_a_larger_one_bounds_memory():
    assert numbers(islice(ExampleStream(Rows(9), buffer_size=1), 9)) == list(range(9))
    rows = Rows(1000)
    stream = iter(ExampleStream(rows, buffer_size=16))
    for given in range(1, 200):
        next(stream)
        assert rows.opened == given + 16


def test_shuffling_reaches_beyond_the_buffer():
    order = list(shuffled(range(100), 10, random.Random(0)))
    assert sorted(order) == list(range(100))
    assert max(number - place for place, number in enumerate(order)) <= 10
    assert max(place - number for place, number in enumerate(order)) > 10


def test_workers_share_the_rows():
    stream = ExampleStream(Rows(24), buffer_size=5)
    loader = DataLoader(stream, batch_size=4, num_workers=2, collate_fn=numbers)
    read = [number for batch in islice(loader, 6) for number in batch]
    assert sorted(read) == list(range(24))


def test_the_batches_of_two_processes_are_those_of_one():
    def batches(processes):
        shards = [
            IterableDatasetShard(
                ExampleStream(Rows(30), buffer_size=7),
                batch_size=8 // processes,
                num_processes=processes,
                process_index=index,
            )
            for index in range(processes)
        ]
        iterators = [iter(shard) for shard in shards]
        return [
            [number for it in iterators for number in numbers(islice(it, 8 // processes))]
            for _ in range(15)
        ]

    one, two = batches(1), batches(2)
    assert one == two
    assert Counter(number for batch in one for number in batch) == dict.fromkeys(range(30), 4)


def test_loss_dropout_is_drawn_per_example_and_pass():
    stream = ExampleStream(Rows(400), buffer_size=1, loss_dropout=0.75)
    dropped = [not example.pairs for example in islice(stream, 800)]
    first, second = dropped[:400], dropped[400:]
    assert first != second
    assert all(abs(sum(each) / 400 - 0.75) < 0.1 for each in (first, second))
    shuffle = ExampleStream(Rows(400), buffer_size=50, loss_dropout=0.75)
    by_number = {numbers([e])[0]: not e.pairs for e in islice(shuffle, 400)}
    assert [by_number[number] for number in range(400)] == first


def test_mistakes():
    with pytest.raises(ValueError, match="buffer_size must be at least 1, got 0"):
        ExampleStream(Rows(1), buffer_size=0)
    with pytest.raises(ValueError, match="loss_dropout must be from 0 to 1, got 2"):
        ExampleStream(Rows(1), loss_dropout=2)
    with pytest.raises(ValueError, match="no samples for worker 0 of 1"):
        next(iter(ExampleStream(Rows(0))))
