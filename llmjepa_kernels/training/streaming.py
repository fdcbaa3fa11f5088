"""Training data larger than memory: shuffled in a buffer, tokenized as it is read, without end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from llmjepa_kernels.example import Example, with_tubes, without_views
from llmjepa_kernels.training.loss_dropout import random_fraction
from llmjepa_kernels.tubes import TubeSampler

T = TypeVar("T")
# Worker, number of workers, whether it is the first pass → places and examples.
Reader = Callable[[int, int, bool], Iterable[tuple[str, Example]]]


class ExampleStream(IterableDataset):
    """Passes over a source again and again, each in another order; train with ``max_steps``.

    In one pass every row is read by one worker of a DataLoader. Processes read all rows, and
    Accelerate gives each its part of a batch, so the order does not depend on how many there are.
    It is a pure function of the seed and the number of workers: Trainer resumes by reading up to
    where it stopped.

    Args:
        read: Gives a worker's share of the rows, in their order, as ``(place, example)``; called
            once per pass with the worker, the number of workers and whether this is the first pass.
        buffer_size: How many are held in memory to draw the next from; 1 keeps the order.
        seed: Of the order and of loss dropout.
        loss_dropout: Rate α of `LossDropout`, per example.
        tubes: Draws tubes anew in every pass, which a collator cannot tell apart.

    Raises:
        ValueError: An argument is out of range; on iteration, a pass has no example.
    """

    def __init__(
        self,
        read: Reader,
        *,
        buffer_size: int = 10_000,
        seed: int = 0,
        loss_dropout: float = 0.0,
        tubes: TubeSampler | None = None,
    ):
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, got {buffer_size}")
        if not 0 <= loss_dropout <= 1:
            raise ValueError(f"loss_dropout must be from 0 to 1, got {loss_dropout}")
        self.read = read
        self.buffer_size = buffer_size
        self.seed = seed
        self.loss_dropout = loss_dropout
        self.tubes = tubes

    def __iter__(self) -> Iterator[Example]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        for number in count():
            rng = random.Random(f"{self.seed},{number},{worker}")
            located = self.read(worker, num_workers, number == 0)
            example = None
            for place, example in shuffled(located, self.buffer_size, rng):
                dropped = random_fraction(self.seed, number, place) < self.loss_dropout
                example = without_views(example) if dropped else example
                yield example if self.tubes is None else with_tubes(example, self.tubes, number)
            if example is None:
                raise ValueError(f"the stream has no samples for worker {worker} of {num_workers}")


def shuffled(items: Iterable[T], buffer_size: int, rng: random.Random) -> Iterator[T]:
    """The items in an order that is random within a window of `buffer_size`."""
    buffer: list[T] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        index = rng.randrange(buffer_size)
        drawn, buffer[index] = buffer[index], item
        yield drawn
    rng.shuffle(buffer)
    yield from buffer
