"""Which process trains on which examples of an update: as equal shares of work as can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import cycle, islice

from torch.utils.data import Sampler

from llmjepa_kernels.packing import Example


class UpdateSampler(Sampler):
    """Deals the examples of every update to the processes by their work.

    Which examples make up an update, and which of them Accelerate repeats to fill the last one of
    an epoch, is left to `base`: it depends on the size of an update alone, so that one process and
    many train on the same. Within an update every process gets as many examples as without this
    sampler, and so does each of its batches, but such that their sums of work are about equal:
    the largest first, each to whom has the least work so far and room left.

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
        count, full = len(self.base), self.batch_size * self.num_processes
        if self.drop_last:
            return count // full * full
        if self.even_batches and self.num_processes > 1:
            return -(-count // full) * full
        return count

    def __iter__(self) -> Iterator[int | tuple[int, int]]:
        if hasattr(self.base, "set_epoch"):
            self.base.set_epoch(self.epoch)
        order = list(islice(cycle(list(self.base)), len(self)))
        size = self.batch_size * self.num_processes * self.accumulation_steps
        for update, start in enumerate(range(0, len(order), size)):
            indices = order[start : start + size]
            if self.work is not None:
                indices = self._dealt(indices, update)
            yield from ((i, update) for i in indices) if self.with_update else indices

    def _dealt(self, indices: list[int], update: int) -> list[int]:
        """The examples of an update in the order in which batches are cut from it."""
        work = [self.work(index, update) for index in indices]
        room = [len(indices[i : i + self.batch_size]) for i in range(0, len(work), self.batch_size)]
        batches = [[] for _ in room]
        turns = [range(i, len(room), self.num_processes) for i in range(self.num_processes)]
        shares = deal(work, [sum(room[i] for i in turn) for turn in turns])
        for turn, share in zip(turns, shares, strict=True):
            parts = deal([work[j] for j in share], [room[i] for i in turn])
            for i, part in zip(turn, parts, strict=True):
                batches[i] = [indices[share[j]] for j in part]
        return [index for batch in batches for index in batch]


def deal(work: Sequence[float], counts: Sequence[int]) -> list[list[int]]:
    """Shares of given counts and about equal sums, by the greedy rule "longest first".

    Args:
        work: Of each item.
        counts: Items of each share; add up to the number of items.

    Returns:
        The indices of the items of each share.

    Source: Graham, Bounds on multiprocessing timing anomalies, 1969, here with room for a given
        number of items each.
    """
    shares = [[] for _ in counts]
    loads = [(0.0, i) for i, count in enumerate(counts) if count]
    for item in sorted(range(len(work)), key=work.__getitem__, reverse=True):
        load, i = heappop(loads)
        shares[i].append(item)
        if len(shares[i]) < counts[i]:
            heappush(loads, (load + work[item], i))
    return shares


def example_work(example: Example, hidden_size: int) -> float:
    """What an example costs a decoder, in tokens.

    A layer of width d spends about 24·d² operations on a token in its projections, and 4·d on a
    visible pair of tokens in attention: a pair is worth 1 / (6·d) of a token. Prefixes that the
    example will share with others of its row count in full, for all examples alike.
    """
    tokens, pairs = 0, 0
    ends: list[int] = []  # how many tokens the last one of each segment sees
    for segment in example.segments:
        above = 0 if segment.parent is None else ends[segment.parent]
        length = len(segment.input_ids)
        tokens += length
        pairs += length * above + length * (length + 1) // 2
        ends.append(above + length)
    return tokens + pairs / (6 * hidden_size)
