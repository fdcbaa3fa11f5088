"""The forest mask as a cascade of variable-length attention calls.

Wherever the subtree of some segment ends, `visible_until` says so, and the row is cut into *runs*
there. Inside a run nothing ends, so every token sees all before it: each run is a segment followed
by its first child, its first grandchild and so on, and one causal call over all runs covers it.
What is left are, per segment, the descendants beyond its run: contiguous queries that all see the
contiguous keys of the segment, without any mask. Such blocks of different segments are disjoint or
nested, so one call per level of nesting covers them all.

For LLM-JEPA's prompt, completion and ``[PRED]`` that is two calls: prompt + completion as in plain
fine-tuning, and ``[PRED]`` to prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmjepa_kernels.ops.block_mask import check_visible_until, check_window
from llmjepa_kernels.ops.common import refuse_if

PREFIX = "flash_"  # of the keys of a plan that travels

# A row's padding is tokens that see only themselves. Each would be a sequence, for which
# flash-attn's backward sets 128 rows of workspace aside; this many in a succession are taken
# together, in a call with a window of one token.
MIN_SOLITARY = 8
MAX_TILE = 128  # the most queries that a thread block of flash-attn takes


@dataclass(frozen=True)
class VarlenCall:
    """One variable-length attention call over all rows.

    Sequence ``s`` of row ``b`` attends from the queries ``bounds[b, 0, s] : bounds[b, 0, s + 1]``
    to the keys ``bounds[b, 1, s] : bounds[b, 1, s + 1]``; either may be empty. The keys of all
    sequences are the whole row, in order, so they need not be copied.

    Attributes:
        bounds: (batch, 2, sequences + 1) int32.
        slots: (batch, queries) int32, where the queries are in the `rows` of the plan. Empty in
            the causal call, whose queries are all tokens.
        max_seqlen_q, max_seqlen_k: Of the longest sequence.
    """

    bounds: Tensor
    slots: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def tensors(self) -> list[Tensor]:
        """The call as tensors, batch first; the shape of the last, an empty one, is the lengths."""
        lengths = (len(self.bounds), self.max_seqlen_q, self.max_seqlen_k, 0)
        return [self.bounds, self.slots, self.bounds.new_empty(lengths)]

    @classmethod
    def from_tensors(cls, bounds: Tensor, slots: Tensor, lengths: Tensor) -> VarlenCall:
        """Puts a call together again."""
        return cls(bounds, slots, *lengths.shape[1:3])


@dataclass(frozen=True)
class FlashPlan:
    """The calls that together cover every visible pair of a batch exactly once.

    Kernels are launched with the number of calls and the lengths of their longest sequences, so
    these must be known to the host. Where a plan travels as tensors, their number and shapes say
    so: no layer waits for the device.

    Attributes:
        rows: (batch, queries) int32, the tokens that are queries of any call but the causal one.
        calls: First the causal one, over the runs. Then one over long successions of runs of a
            single token (the padding), which have no keys in the first; it has no queries if
            there are none. The others are the levels, segments to their descendants beyond the
            run, outermost first.
        seq: Tokens of a row.
        reach: A window of at least as many positions may be put on the causal call, and leaves
            the others whole. None if the plan was made without positions.
        window: The sliding window that the plan was made for; None for none.
    """

    rows: Tensor
    calls: tuple[VarlenCall, ...]
    seq: int
    reach: int | None = None
    window: int | None = None

    @classmethod
    def from_visible_until(
        cls,
        visible_until: Tensor,
        *,
        position_ids: Tensor | None = None,
        window: int | None = None,
    ) -> FlashPlan:
        """Cuts the mask of a batch into calls, in time proportional to its tokens and levels.

        On a GPU this waits for the device: make the plan once per batch, or on the CPU in the
        data loader (``pack(..., flash_plan=True)`` does), never per layer.

        Args:
            visible_until: (batch, seq) int32, of a forest: of two tokens of a row, the ranges
                ``j : visible_until[j]`` are nested or disjoint.
            position_ids: (batch, seq) int; needed with `window`, and for `reach`.
            window: Sliding window, in positions. These calls know indices only: the window must
                leave each block of a level whole or hide it, and cut only into runs whose
                positions count up by one.

        Raises:
            ValueError: The mask is not a forest, or the window is not such.
        """
        check_visible_until(visible_until)
        if window is not None:
            check_window(window, position_ids, visible_until)
        positions = None if position_ids is None else position_ids.cpu()
        with torch.device("cpu"):  # also of what is made on the way
            plan = _plan(visible_until.cpu(), positions, window)
        return plan.to(visible_until.device)

    def to(self, device: torch.device | str) -> FlashPlan:
        """The same plan on another device."""
        tensors = [x.to(device) for x in self.tensors()]
        return FlashPlan.from_tensors(tensors, self.seq, self.reach, self.window)

    def tensors(self) -> list[Tensor]:
        """The rows, and three tensors for each call."""
        return [self.rows, *(x for call in self.calls for x in call.tensors())]

    @classmethod
    def from_tensors(
        cls,
        tensors: Sequence[Tensor],
        seq: int,
        reach: int | None = None,
        window: int | None = None,
    ) -> FlashPlan:
        """Puts a plan together again from `tensors()`."""
        rows, *rest = tensors
        calls = (VarlenCall.from_tensors(*rest[i : i + 3]) for i in range(0, len(rest), 3))
        return cls(rows, tuple(calls), seq, reach, window)

    def schedule(self) -> dict[str, Tensor]:
        """The plan as batch-first int tensors, to travel with a batch as model arguments."""
        if self.window is not None or self.reach is None:
            raise ValueError(
                "a plan must be made with position_ids and without window to travel, got "
                f"reach={self.reach} and window={self.window}"
            )
        reach = self.rows.new_empty(len(self.rows), self.reach, self.seq, 0)
        return dict(zip(_keys(len(self.calls)), [reach, *self.tensors()], strict=True))

    @classmethod
    def has_key(cls, key: str) -> bool:
        """Whether a key of a batch may be one of `schedule()`."""
        return key.startswith(PREFIX)

    @classmethod
    def from_schedule(
        cls, visible_until: Tensor, schedule: Mapping[str, Tensor], window: int | None = None
    ) -> FlashPlan:
        """Puts a plan together again from `schedule()`.

        It knows of no window, whatever `window` is, but in `reach` of those that hide nothing.

        Raises:
            ValueError: A tensor is missing or does not fit `visible_until`; says which.
        """
        given = [key for key in schedule if cls.has_key(key)]
        keys = _keys(sum(key.startswith(f"{PREFIX}bounds_") for key in given))
        if set(keys) != set(given) or len(keys) < 8:
            raise ValueError(f"the plan of visible_until is incomplete, there are only {given}")
        for key in keys:
            x = schedule[key]
            if (
                x.dtype != torch.int32
                or len(x) != len(visible_until)
                or x.device != visible_until.device
            ):
                raise ValueError(
                    f"{key} must be an int32 tensor of {len(visible_until)} rows on "
                    f"{visible_until.device}, got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
                )
        shape, *tensors = (schedule[key] for key in keys)
        reach, seq = shape.shape[1:3]
        if seq != visible_until.shape[1]:
            raise ValueError(
                f"the plan is of rows of {seq} tokens, but those of visible_until have "
                f"{visible_until.shape[1]}"
            )
        return cls.from_tensors(tensors, seq, reach)

    def check(self) -> None:
        """Raises ValueError unless the calls stay within rows of `seq` tokens.

        Elsewhere than on a CPU it is asserted, without waiting for the device.
        """
        num_rows = self.rows.shape[1]
        wrong = ((self.rows < 0) | (self.rows >= self.seq)).any()
        for i, call in enumerate(self.calls):
            lengths = call.bounds.diff(dim=2)
            longest = torch.stack([lengths[:, 0].max(), lengths[:, 1].max()])
            num_queries = self.seq if i == 0 else call.slots.shape[1]
            wrong = wrong | ((call.slots < 0) | (call.slots >= num_rows)).any()
            wrong = wrong | (call.bounds[:, :, 0] != 0).any() | (lengths < 0).any()
            wrong = wrong | (call.bounds[:, 0, -1] != num_queries).any()
            wrong = wrong | (call.bounds[:, 1, -1] != self.seq).any()
            wrong = wrong | (longest[0] > call.max_seqlen_q) | (longest[1] > call.max_seqlen_k)
        refuse_if(wrong, f"the plan's calls are not those of rows of {self.seq} tokens")


def _keys(calls: int) -> list[str]:
    parts = [f"{part}_{i}" for i in range(calls) for part in ("bounds", "slots", "lengths")]
    return [f"{PREFIX}{part}" for part in ("reach", "rows", *parts)]


# Planning. Tokens are numbered through all rows; no run or block crosses from one row to the next.


def _plan(visible_until: Tensor, position_ids: Tensor | None, window: int | None) -> FlashPlan:
    batch, seq = visible_until.shape
    token = torch.arange(batch * seq)
    until = visible_until.flatten() + token // seq * seq

    # In a forest, the subtree of some token ends at e exactly if that of token e - 1 does.
    is_end = torch.zeros(batch * seq + 1, dtype=torch.bool)
    is_end[until] = True
    run_end = is_end.nonzero().flatten()
    run_start = pad(run_end[:-1], (1, 0))
    run = torch.bucketize(token, run_end, right=True)

    # A block: the keys of a segment's part in a run, and the queries beyond that run that see it.
    end = run_end[run]
    first = torch.ones_like(is_end[1:])
    first[1:] = (until[1:] != until[:-1]) | (run[1:] != run[:-1])
    key_start = first.nonzero().flatten()
    key_end = torch.cat([key_start[1:], torch.tensor([batch * seq])])
    blocks = torch.stack([end[key_start], until[key_start], key_start, key_end])
    blocks = blocks[:, blocks[1] > blocks[0]]

    reach = None
    if position_ids is not None:
        positions = position_ids.flatten().long()
        run_reach = _reach_of_runs(run, len(run_end), positions)
        block_reach, nearest = _reach_of_blocks(blocks, positions)
        reach = int(torch.cat([run_reach, block_reach]).max().clamp(min=1))
        if window is not None:
            _check_window(window, run_reach, blocks, block_reach, nearest, seq)
            blocks = blocks[:, nearest <= window]

    levels = _levels(blocks)
    runs, solitary = _apart(run_start, run_end, seq)
    is_query = torch.zeros_like(first)
    for query_start, query_end, *_ in (solitary, *levels[:1]):
        is_query[_members(query_start, query_end)] = True
    slot = (is_query.view(batch, seq).cumsum(1) - 1).flatten()
    rows = is_query.nonzero().flatten()

    calls = [_call(runs, token.new_empty(batch, 0), seq)]
    for chosen in (solitary, *levels):
        queries = _members(chosen[0], chosen[1])
        calls.append(_call(chosen, _by_row(slot[queries], queries // seq, batch), seq))
    rows = _by_row(rows % seq, rows // seq, batch).int()
    return FlashPlan(rows, tuple(calls), seq, reach, window)


def _levels(blocks: Tensor) -> list[Tensor]:
    """The blocks of each level of nesting, outermost first."""
    if blocks.shape[1] == 0:
        return []
    # Blocks are nested like their segments: the level is the number of blocks still open.
    closed = torch.bucketize(blocks[2], blocks[1].sort().values, right=True)
    level = torch.arange(blocks.shape[1]) - closed
    levels = [blocks[:, level == depth] for depth in range(int(level.max()) + 1)]
    in_outermost = torch.zeros(int(blocks[1].max()), dtype=torch.bool)
    in_outermost[_members(levels[0][0], levels[0][1])] = True
    for query_start, query_end, *_ in levels:
        if (
            not in_outermost[_members(query_start, query_end)].all()
            or (query_start[1:] < query_end[:-1]).any()
        ):
            raise ValueError(
                "visible_until must be that of a forest for impl='flash': the ranges "
                "j : visible_until[j] of two tokens may be nested or disjoint, but some cross"
            )
    return levels


def _apart(start: Tensor, end: Tensor, seq: int) -> tuple[Tensor, Tensor]:
    """The runs as blocks of themselves, and the long successions of runs of a single token.

    Of those, the first part has the queries alone, without keys.
    """
    # Number the successions of solitary tokens, and tell the long ones.
    length = end - start
    leads = start % seq == 0
    leads[1:] |= (length[1:] > 1) | (length[:-1] > 1)
    group = leads.cumsum(0) - 1
    merged = (length == 1) & (torch.bincount(group)[group] >= MIN_SOLITARY)

    # One sequence per run, but one for all of a long succession; no longer than the longest run
    # or a tile, as every sequence is given the thread blocks that the longest one needs.
    index = torch.arange(len(end)) - leads.nonzero().flatten()[group]
    leads |= ~merged | (index % length.max().clamp(min=MAX_TILE) == 0)
    trails = torch.cat([leads[1:], leads.new_ones(1)])
    start, end, merged = start[leads], end[trails], merged[leads]
    runs = torch.stack([start, end, start, torch.where(merged, start, end)])
    return runs, torch.stack([start, end, start, end])[:, merged]


def _call(blocks: Tensor, slots: Tensor, seq: int) -> VarlenCall:
    """One sequence per block, the keys left where they are.

    Keys before, between and after the blocks are sequences without queries; the queries that fill
    up shorter rows of `slots` are sequences without keys.
    """
    # The end of each row counts as a block of nothing.
    batch = len(slots)
    row_end = torch.arange(1, batch + 1) * seq
    query_start, query_end, key_start, key_end = blocks
    row = torch.cat([row_end // seq - 1, key_start // seq])
    queries = pad(query_end - query_start, (batch, 0))
    key_start, key_end = (torch.cat([row_end, x]) for x in (key_start, key_end))
    order = key_start.argsort(stable=True)
    row, queries, key_start, key_end = (x[order] for x in (row, queries, key_start, key_end))
    before = torch.stack([torch.zeros_like(queries), key_start - pad(key_end[:-1], (1, 0))])
    lengths = torch.stack([before, torch.stack([queries, key_end - key_start])], dim=2).flatten(1)
    kept = lengths.any(0)
    row, lengths = row.repeat_interleave(2)[kept], lengths[:, kept]

    sequences = torch.bincount(row, minlength=batch)
    total = torch.bincount(row, lengths[0], minlength=batch).long()
    missing = total.max() - total
    longest = lengths[0].max().clamp(min=MAX_TILE)
    width = int((sequences + (missing + longest - 1) // longest).max())
    by_row = torch.zeros(2, batch, width, dtype=torch.long)
    by_row[:, row, _place(row, sequences)] = lengths
    filler = torch.arange(width) - sequences[:, None]
    fillers = torch.minimum((missing[:, None] - filler * longest).clamp(min=0), longest)
    by_row[0] += fillers * (filler >= 0)
    bounds = pad(by_row.cumsum(2), (1, 0)).transpose(0, 1).int().contiguous()
    return VarlenCall(bounds, slots.int(), *by_row.flatten(1).max(1).values.tolist())


def _by_row(values: Tensor, row: Tensor, batch: int) -> Tensor:
    """(batch, most of any row), filled up with the first number that the row lacks.

    A query that stands in for none is thus none of the others, and has no keys: nothing of it
    remains, whatever it is merged into.

    Args:
        values: Distinct, ascending within a row.
        row: Ascending.
    """
    count = torch.bincount(row, minlength=batch)
    by_row = values.new_full((batch, int(count.max())), -1)
    by_row[row, _place(row, count)] = values
    lacking = (by_row == torch.arange(by_row.shape[1])).sum(1, keepdim=True)
    return torch.where(by_row < 0, lacking, by_row)


def _place(row: Tensor, count: Tensor) -> Tensor:
    """The index of each element among those of its row."""
    return torch.arange(len(row)) - (count.cumsum(0) - count)[row]


def _members(start: Tensor, end: Tensor) -> Tensor:
    """All members of the ranges start[r] : end[r], in order."""
    length = end - start
    offset = start - (length.cumsum(0) - length)
    members = offset.repeat_interleave(length)
    return members + torch.arange(len(members))


# Windows


def _reach_of_runs(run: Tensor, runs: int, positions: Tensor) -> Tensor:
    """(runs,): which windows do not cut into a run, if its positions do not count up by one."""
    token = torch.arange(len(run))
    extent, length, shift = (
        _reduce(x, run, runs, "amax") - _reduce(x, run, runs, "amin") + 1
        for x in (positions, token, positions - token)
    )
    return torch.maximum(extent, length) * (shift > 1)


def _reach_of_blocks(blocks: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks,) each: the smallest windows that leave it whole, and that leave anything of it."""
    query_min, query_max = _extremes(positions, blocks[0], blocks[1])
    key_min, key_max = _extremes(positions, blocks[2], blocks[3])
    return query_max - key_min + 1, query_min - key_max + 1


def _check_window(
    window: int, run_reach: Tensor, blocks: Tensor, whole: Tensor, nearest: Tensor, seq: int
) -> None:
    if (run_reach > window).any():
        raise ValueError(
            f"impl='flash' takes a window that hides tokens (window={window}) only where "
            "position_ids count up by one from each token to its first child; use impl='triton'"
        )
    cut = (nearest <= window) & (window < whole)
    if cut.any():
        b = int(blocks[2, cut][0]) // seq
        q0, q1, k0, k1 = (int(x) - b * seq for x in blocks[:, cut][:, 0])
        raise ValueError(
            f"impl='flash' takes a window only where it leaves a segment and the descendants "
            f"beyond its first child whole or hides them: in row {b}, window={window} cuts "
            f"into queries {q0} : {q1} and keys {k0} : {k1}; use impl='triton'"
        )


def _extremes(values: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest value in each range."""
    members = values[_members(start, end)]
    which = torch.arange(len(start)).repeat_interleave(end - start)
    return (
        _reduce(members, which, len(start), "amin"),
        _reduce(members, which, len(start), "amax"),
    )


def _reduce(values: Tensor, group: Tensor, groups: int, how: str) -> Tensor:
    return values.new_zeros(groups).scatter_reduce(0, group, values, how, include_self=False)
