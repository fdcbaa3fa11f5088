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

from dataclasses import dataclass, fields

import torch
from torch import Tensor

# A row's padding is tokens that see only themselves. Each would be a sequence, for which
# flash-attn's backward sets 128 rows of workspace aside; this many in a succession are taken
# together, in a call with a window of one token.
MIN_SOLITARY = 8
MAX_TILE = 128  # the most queries that a thread block of flash-attn takes


@dataclass(frozen=True)
class VarlenCall:
    """One variable-length attention call over the tokens of all rows, laid end to end.

    Sequence ``s`` attends from queries ``cu_seqlens_q[s] : cu_seqlens_q[s + 1]`` to keys
    ``cu_seqlens_k[s] : cu_seqlens_k[s + 1]``; either may be empty.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32. Keys are counted in the whole batch
            (batch * seq tokens) and never copied; queries in `rows`.
        max_seqlen_q, max_seqlen_k: Of the longest sequence.
        causal: Whether query i of a sequence sees only its keys up to i.
        window: Sliding window in tokens of the sequence; None for none.
        rows: (queries,) int64, the tokens that are queries; None for all.
        keys: (keys,) int64, the tokens in a sequence that has queries; None for all.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    window: int | None = None
    rows: Tensor | None = None
    keys: Tensor | None = None

    def to(self, device: torch.device | str) -> VarlenCall:
        """The same call on another device."""
        values = (getattr(self, field.name) for field in fields(self))
        return VarlenCall(*(v.to(device) if isinstance(v, Tensor) else v for v in values))


@dataclass(frozen=True)
class FlashPlan:
    """The calls that together cover every visible pair of a batch exactly once.

    Attributes:
        causal: The runs, over all tokens.
        solitary: Long successions of runs of a single token (the padding), which have no keys
            in `causal`. None if there are none.
        levels: Segments to their descendants beyond the run, outermost first. The `rows` of the
            first hold those of all others.
        slots: Per level, where its `rows` are in those of the first: (queries,) int64.
    """

    causal: VarlenCall
    solitary: VarlenCall | None
    levels: tuple[VarlenCall, ...]
    slots: tuple[Tensor, ...]

    @property
    def calls(self) -> list[VarlenCall]:
        """All calls, in the order they are made."""
        return [self.causal, *([self.solitary] if self.solitary else []), *self.levels]

    def to(self, device: torch.device | str) -> FlashPlan:
        """The same plan on another device."""
        return FlashPlan(
            self.causal.to(device),
            self.solitary and self.solitary.to(device),
            tuple(call.to(device) for call in self.levels),
            tuple(slot.to(device) for slot in self.slots),
        )


def plan_calls(
    visible_until: Tensor, position_ids: Tensor | None = None, window: int | None = None
) -> FlashPlan:
    """Cuts the mask of a batch into calls, in time proportional to its tokens and levels.

    Args:
        visible_until: (batch, seq) int32, of a forest: of two tokens of a row, the ranges
            ``j : visible_until[j]`` are nested or disjoint. Best on the CPU, since the number of
            calls and the lengths of the longest sequences are Python numbers.
        position_ids: (batch, seq) int; needed with `window`.
        window: Sliding window, in positions. These calls know indices only: the window must
            leave each block of a level whole or hide it, and where it cuts into a run, the
            positions in all runs must count up by one.

    Raises:
        ValueError: The mask is not a forest, or the window is not such.
    """
    batch, seq = visible_until.shape
    device = visible_until.device
    row = torch.arange(batch, device=device) * seq
    until = (visible_until.long() + row[:, None]).flatten()
    token = torch.arange(batch * seq, device=device)

    # In a forest, the subtree of some token ends at e exactly if that of token e - 1 does.
    is_end = torch.zeros(batch * seq + 1, dtype=torch.bool, device=device)
    is_end[until] = True
    run_end = is_end.nonzero().flatten()
    run_start = torch.nn.functional.pad(run_end[:-1], (1, 0))
    run = torch.bucketize(token, run_end, right=True)

    # A block: the keys of a segment's part in a run, and the queries beyond that run that see it.
    end = run_end[run]
    first = torch.ones_like(is_end[1:])
    first[1:] = (until[1:] != until[:-1]) | (run[1:] != run[:-1])
    key_start = first.nonzero().flatten()
    key_end = torch.cat([key_start[1:], token.new_tensor([batch * seq])])
    blocks = torch.stack([key_start, key_end, end[key_start], until[key_start]])
    blocks = blocks[:, blocks[3] > blocks[2]]

    run_window = None
    if window is not None:
        positions = position_ids.flatten().long()
        blocks = _blocks_in_window(blocks, positions, window, seq)
        run_window = _window_of_runs(positions - token, positions, run, len(run_end), window)

    # Blocks are nested like their segments: the level is the number of blocks still open.
    key_start, key_end, query_start, query_end = blocks
    opened = torch.arange(len(key_start), device=device)
    closed = torch.bucketize(key_start, query_end.sort().values, right=True)
    level = opened - closed

    levels, slots = [], []
    for depth in range(int(level.max()) + 1 if len(level) else 0):
        at = level == depth
        call = _in_place(query_start[at], query_end[at], key_start[at], key_end[at])
        outermost = levels[0].rows if levels else call.rows
        slot = torch.bucketize(call.rows, outermost).clamp(max=len(outermost) - 1)
        if (outermost[slot] != call.rows).any() or (query_start[at][1:] < query_end[at][:-1]).any():
            raise ValueError(
                "visible_until must be that of a forest for impl='flash': the ranges "
                "j : visible_until[j] of two tokens may be nested or disjoint, but some cross"
            )
        levels.append(call)
        slots.append(slot)
    causal, solitary = _causal_calls(run_start, run_end, run_window)
    return FlashPlan(causal, solitary, tuple(levels), tuple(slots))


def _causal_calls(
    start: Tensor, end: Tensor, window: int | None
) -> tuple[VarlenCall, VarlenCall | None]:
    """The call over all runs, and the one over long successions of runs of a single token."""
    # Number the successions of solitary tokens, and tell the long ones.
    length = end - start
    leads = torch.ones_like(length, dtype=torch.bool)
    leads[1:] = (length[1:] > 1) | (length[:-1] > 1)
    group = leads.cumsum(0) - 1
    merged = (length == 1) & (torch.bincount(group)[group] >= MIN_SOLITARY)

    # One sequence per run, but one for all of a long succession; no longer than the longest run
    # or a tile, as every sequence is given the thread blocks that the longest one needs.
    index = torch.arange(len(end), device=end.device) - leads.nonzero().flatten()[group]
    leads |= ~merged | (index % length.max().clamp(min=MAX_TILE) == 0)
    trails = torch.cat([leads[1:], leads.new_ones(1)])
    start, end, merged = start[leads], end[trails], merged[leads]

    # In the causal call that sequence becomes two, its queries alone and its keys alone.
    keep = torch.stack([merged, torch.ones_like(merged)], dim=1).flatten()
    q_bounds = end.repeat_interleave(2)[keep]
    k_bounds = torch.stack([start, end], dim=1).flatten()[keep]
    q_bounds, k_bounds = (torch.nn.functional.pad(x, (1, 0)) for x in (q_bounds, k_bounds))
    causal = _call(q_bounds, k_bounds, causal=True, window=window)
    if not merged.any():
        return causal, None
    start, end = start[merged], end[merged]
    return causal, _in_place(start, end, start, end, causal=True, window=1)


def _in_place(
    query_start: Tensor, query_end: Tensor, key_start: Tensor, key_end: Tensor, **options
) -> VarlenCall:
    """One sequence per pair of ranges, the keys left where they are.

    The keys between two ranges are sequences without queries.
    """
    zero = key_start.new_zeros(1)
    seen = (query_end - query_start).cumsum(0)
    q_bounds = torch.stack([torch.cat([zero, seen[:-1]]), seen], dim=1).flatten()
    k_bounds = torch.stack([key_start, key_end], dim=1).flatten()
    q_bounds, k_bounds = torch.cat([zero, q_bounds]), torch.cat([zero, k_bounds])
    keep = torch.ones_like(k_bounds, dtype=torch.bool)
    keep[1:] = (q_bounds[1:] > q_bounds[:-1]) | (k_bounds[1:] > k_bounds[:-1])
    return _call(
        q_bounds[keep],
        k_bounds[keep],
        rows=_members(query_start, query_end),
        keys=_members(key_start, key_end),
        **{"causal": False, **options},
    )


def _call(q_bounds: Tensor, k_bounds: Tensor, **options) -> VarlenCall:
    return VarlenCall(
        q_bounds.int(),
        k_bounds.int(),
        int(q_bounds.diff().max()),
        int(k_bounds.diff().max()),
        **options,
    )


def _members(start: Tensor, end: Tensor) -> Tensor:
    """All members of the ranges start[r] : end[r], in order."""
    length = end - start
    offset = start - (length.cumsum(0) - length)
    members = offset.repeat_interleave(length)
    return members + torch.arange(len(members), device=start.device)


def _blocks_in_window(blocks: Tensor, positions: Tensor, window: int, seq: int) -> Tensor:
    """The blocks that the window leaves whole; those that it hides are dropped."""
    key_start, key_end, query_start, query_end = blocks
    q_min, q_max = _extremes(positions, query_start, query_end)
    k_min, k_max = _extremes(positions, key_start, key_end)
    hidden = q_min - k_max >= window
    cut = ~hidden & (q_max - k_min >= window)
    if cut.any():
        k0, k1, q0, q1 = (int(x) for x in blocks[:, cut][:, 0])
        b = k0 // seq
        raise ValueError(
            f"impl='flash' takes a window only where it leaves a segment and the descendants "
            f"beyond its first child whole or hides them: in row {b}, window={window} cuts "
            f"into queries {q0 - b * seq} : {q1 - b * seq} and keys {k0 - b * seq} : "
            f"{k1 - b * seq}; use impl='triton'"
        )
    return blocks[:, ~hidden]


def _window_of_runs(
    shift: Tensor, positions: Tensor, run: Tensor, runs: int, window: int
) -> int | None:
    """The window as one of indices within runs; None where no run is as long."""
    low, high = (_reduce(positions, run, runs, how) for how in ("amin", "amax"))
    if not (high - low >= window).any():
        return None
    low, high = (_reduce(shift, run, runs, how) for how in ("amin", "amax"))
    if (low != high).any():
        raise ValueError(
            f"impl='flash' takes a window that hides tokens (window={window}) only where "
            "position_ids count up by one from each token to its first child; use impl='triton'"
        )
    return window


def _extremes(values: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest value in each range."""
    members = values[_members(start, end)]
    which = torch.arange(len(start), device=start.device).repeat_interleave(end - start)
    return tuple(_reduce(members, which, len(start), how) for how in ("amin", "amax"))


def _reduce(values: Tensor, group: Tensor, groups: int, how: str) -> Tensor:
    return values.new_zeros(groups).scatter_reduce(0, group, values, how, include_self=False)
