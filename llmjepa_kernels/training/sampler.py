"""Which process trains on which examples of an update: as equal shares of work as can be.

Transformers' ``train_sampling_strategy="batch_rebalance"`` is for padded rows: it gives processes
different numbers of examples and has an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import cycle, islice
from typing import Any

from torch.utils.data import Sampler

from llmjepa_kernels.example import Example, segment_ends


class UpdateSampler(Sampler):
    """Deals the examples of every update to the processes by their work.

    Which examples make up an update, and each of its accumulated batches over all processes, is
    left to `base`: any number of processes trains on the same, but for those that Accelerate
    repeats with several to fill the last batches of an epoch. Of a batch every process gets as
    many examples as without this sampler, but such that the sums of work are about equal: the
    largest first, each to whom has the least work in this update so far and room left.

    Args:
        base: Gives the order of an epoch; the same in all processes.
        batch_size: Examples of one batch of one process. As Accelerate does, batches go to the
            processes in turn.
        num_processes: How many there are.
        accumulation_steps: Batches of one process in an update.
        drop_last: Leave out examples that do not fill a batch of every process.
        even_batches: Otherwise fill them up with the first ones of the epoch.
        work: Of (index, update within the epoch). Default: leave the order as it is.
        with_update: Yield (index, update) instead of the index, as
            ``LossDropout(..., per="step")`` needs it.
    """

    def __init__(
        self,
        base: Sampler,
        batch_size: int,
        *,
        num_processes: int = 1,
        accumulation_steps: int = 1,
        drop_last: bool = False,
        even_batches: bool = True,
        work: Callable[[int, int], float] | None = None,
        with_update: bool = False,
    ):
        self.base = base
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.accumulation_steps = accumulation_steps
        self.drop_last = drop_last
        self.even_batches = even_batches
        self.work = work
        self.with_update = with_update
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        base: Any = self.base  # torch gives its samplers no length
        count, full = len(base), self.batch_size * self.num_processes
        if self.drop_last:
            return count // full * full
        if self.even_batches and self.num_processes > 1:
            return -(-count // full) * full
        return count

    def __iter__(self) -> Iterator[int | tuple[int, int]]:
        if hasattr(self.base, "set_epoch"):
            self.base.set_epoch(self.epoch)
        order = list(islice(cycle(list(self.base)), len(self)))
        step = self.batch_size * self.num_processes
        for batch, start in enumerate(range(0, len(order), step)):
            update, accumulated = divmod(batch, self.accumulation_steps)
            indices = order[start : start + step]
            if self.work is not None:
                if not accumulated:
                    loads = [0.0] * self.num_processes
                work = [self.work(index, update) for index in indices]
                room = [
                    len(indices[i : i + self.batch_size]) for i in range(0, step, self.batch_size)
                ]
                indices = [indices[i] for share in deal(work, room, loads) for i in share]
            yield from ((i, update) for i in indices) if self.with_update else indices


def deal(work: Sequence[float], counts: Sequence[int], loads: list[float]) -> list[list[int]]:
    """Shares of given counts and about equal loads, by the greedy rule "longest first".

    Args:
        work: Of each item.
        counts: Items of each share; add up to the number of items.
        loads: Work that each share begins with; that of its items is added in place.

    Returns:
        The indices of the items of each share.

    Source: Graham, Bounds on multiprocessing timing anomalies, 1969, here with room for a given
        number of items each.
    """
    shares: list[list[int]] = [[] for _ in counts]
    lightest = [(loads[i], i) for i, count in enumerate(counts) if count]
    heapify(lightest)
    for item in sorted(range(len(work)), key=work.__getitem__, reverse=True):
        _, i = heappop(lightest)
        shares[i].append(item)
        loads[i] += work[item]
        if len(shares[i]) < counts[i]:
            heappush(lightest, (loads[i], i))
    return shares


def example_work(example: Example, hidden_size: int) -> float:
    """What an example costs a decoder, in tokens.

    A layer of width d spends about 24·d² operations on a token in its projections, and 4·d on a
    visible pair of tokens in attention: a pair is worth 1 / (6·d) of a token. Prefixes that the
    example will share with others of its row count in full, for all examples alike.
    """
    lengths = [len(segment.input_ids) for segment in example.segments]
    tokens, pairs = sum(lengths), 0
    for length, end in zip(lengths, segment_ends(example), strict=True):
        pairs += length * (end - length) + length * (length + 1) // 2
    return tokens + pairs / (6 * hidden_size)
