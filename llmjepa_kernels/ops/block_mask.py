"""The tiles of the attention matrix that a row's mask leaves to visit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from llmjepa_kernels.checks import check_whole
from llmjepa_kernels.ops.common import refuse_if
from llmjepa_kernels.ops.registry import operation

SCHEDULE_KEYS = (
    "kv_offsets",
    "kv_full_start",
    "kv_indices",
    "q_offsets",
    "q_full_start",
    "q_indices",
)

MAX_BLOCK = 2**16  # a side beyond that of all but the longest rows

# Of a mask put together in a graph, of which there would else be one for each size: what runs
# infers it from the lists.
UNKNOWN_BLOCK = (0, 0)

WITHIN = "_within_"  # between such a key and the window, of a schedule that knows of one

# Modelled time of attention, forward and backward, on a tile of so many queries and keys, relative
# to a full one of 64 x 64: {side: (partial, full)}. Means over head dims 64 and 128 and, of the
# first, over sm_80 and sm_90, of what `python -m benchmarks.gpu_tiles` prints.
TILE_TIMES = {64: (1.16, 1.0), 128: (4.49, 3.87)}
# Matrix instructions of sm_100 are made for 128 rows.
TILE_TIMES_SM_100 = {64: (1.11, 1.0), 128: (3.59, 2.61)}


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Lists of the visible tiles of the mask ``j <= i < visible_until[j]``.

    The ``N x N`` attention matrix of a row is cut into tiles of ``BLOCK_M`` queries and
    ``BLOCK_N`` keys. A tile is *full* if every pair in it is visible, *partial* if some are,
    and appears in no list if none is. The lists are stored per row in compressed sparse form:
    the tiles of query block ``m`` are ::

        kv_indices[b, kv_offsets[b, m] : kv_offsets[b, m + 1]]

    the partial ones first, the full ones from index ``kv_full_start[b, m]`` on, each part in
    ascending order. ``q_*`` is the transpose: the query blocks of each key block. No list is so
    short that its tensor would have a dimension of 1, of which torch.compile makes other graphs.

    Attributes:
        visible_until: (batch, seq) int32; the end of the run of queries that see each key.
        block_size: ``(BLOCK_M, BLOCK_N)``; `UNKNOWN_BLOCK` in compiled code.
        kv_offsets: (batch, ceil(seq / BLOCK_M) + 1) int32.
        kv_full_start: Like `kv_offsets`, which it ends as.
        kv_indices: (batch, tiles of the longest list, at least 2) int32, padded with 0.
        q_offsets, q_full_start, q_indices: The same over ``ceil(seq / BLOCK_N)`` key blocks.
        window: The sliding window the tiles were sorted by; None if they know of none.
    """

    visible_until: Tensor
    block_size: tuple[int, int]
    kv_offsets: Tensor
    kv_full_start: Tensor
    kv_indices: Tensor
    q_offsets: Tensor
    q_full_start: Tensor
    q_indices: Tensor
    window: int | None = field(default=None, kw_only=True)

    @classmethod
    def from_visible_until(
        cls,
        visible_until: Tensor,
        block_size: tuple[int, int] | None = None,
        *,
        position_ids: Tensor | None = None,
        window: int | None = None,
    ) -> BlockMask:
        """Lists the tiles of a mask, in time and memory proportional to their number.

        On a GPU this synchronises with the host, to learn how many tiles there are: build the
        mask once per batch, or on the CPU in the data loader (`pack` does), never per layer.

        Args:
            visible_until: (batch, seq) int32 with ``j < visible_until[j] <= seq``.
            block_size: ``(BLOCK_M, BLOCK_N)``, queries and keys of a tile. Default: a square of the
                side that `choose_block_size` finds.
            position_ids: (batch, seq) int; needed with `window`.
            window: Keep only pairs with ``position[i] - position[j] < window``. Tiles in which
                the window hides every pair are left out as far as the extreme positions of their
                blocks tell; the others stay in the lists as partial.

        Raises:
            ValueError: `visible_until` is not such a tensor, or an argument is missing.
        """
        check_visible_until(visible_until)
        if block_size is None:
            block_size = (choose_block_size(visible_until),) * 2
        if not isinstance(block_size, Sequence) or len(block_size) != 2:
            raise ValueError(f"block_size must be (BLOCK_M, BLOCK_N), got {block_size!r}")
        for side in block_size:
            check_whole("block_size", side, least=1, most=MAX_BLOCK)
        block_m, block_n = block_size
        batch, seq = visible_until.shape
        num_m, num_n = -(-seq // block_m), -(-seq // block_n)

        begin, end, full_begin, full_end = _runs(visible_until, (block_m, block_n))

        # Tiles by the key block that they belong to, row * num_n + n; here their number is learnt.
        if window is None:
            block, m = _expand(begin, end)
        else:
            position_ids = check_window(window, position_ids, visible_until)
            positions = _Positions.of_blocks(position_ids, (block_m, block_n))
            block, m = _expand_within(begin, end, positions.q_min, positions.k_max + window)
        b, n = block // num_n, block % num_n
        full = (m >= full_begin[b, n]) & (m < full_end[b, n])
        if window is not None:
            full &= positions.q_max[b, m] - positions.k_min[b, n] < window
        longest = max(int(torch.bincount(b, minlength=batch).max()), 2)

        kv_lists = _compress(b, m, n, full, (batch, num_m, num_n), longest)
        q_lists = _compress(b, n, m, full, (batch, num_n, num_m), longest)
        return cls(visible_until, (block_m, block_n), *kv_lists, *q_lists, window=window)

    def within(self, window: int, position_ids: Tensor) -> BlockMask:
        """The tiles that a sliding window leaves of those of a mask without one.

        The lists keep their shapes, so this never waits for the device. Arguments as in
        `from_visible_until`.
        """
        if self.window is not None:
            raise ValueError(f"the mask must know of no window, got window={self.window}")
        check_window(window, position_ids, self.visible_until)
        narrow = _narrow
        if torch.compiler.is_compiling():
            narrow = torch.ops.llmjepa_kernels.narrow_schedule
        lists = narrow(position_ids, self.schedule_tensors(), self.block_size, window)
        return BlockMask(self.visible_until, self.block_size, *lists, window=window)

    @classmethod
    def from_schedule(
        cls, visible_until: Tensor, schedule: Mapping[str, Tensor], window: int | None = None
    ) -> BlockMask:
        """Puts a mask together again from `schedule()`, whose block sizes are powers of two.

        That of `window` is taken if it is there, else one that knows of none. The tensors alone
        tell the block size: it is the power of two that cuts the row into as many blocks as there
        are lists. (Where several do, the row is a single block.)

        Raises:
            ValueError: A tensor is missing or does not fit `visible_until`; says which.
        """
        batch, seq = visible_until.shape
        window = window if _keys(window)[0] in schedule else None
        missing = [key for key in _keys(window) if schedule.get(key) is None]
        if missing:
            raise ValueError(f"the schedule of visible_until is incomplete, it lacks {missing}")
        lists = [schedule[key] for key in _keys(window)]
        for key, x in zip(_keys(window), lists, strict=True):
            if x.dtype != torch.int32 or x.dim() != 2 or x.device != visible_until.device:
                raise ValueError(
                    f"{key} must be an int32 tensor of shape (batch, …) on "
                    f"{visible_until.device}, got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
                )
        for offsets, full_start, indices in (lists[:3], lists[3:]):
            if (
                offsets.shape[0] != batch
                or full_start.shape != offsets.shape
                or indices.shape[0] != batch
            ):
                shapes = {key: tuple(schedule[key].shape) for key in _keys(window)}
                raise ValueError(
                    "the schedule must be that of visible_until of shape "
                    f"{tuple(visible_until.shape)}, got tensors of shape {shapes}"
                )
        return cls(visible_until, _known(UNKNOWN_BLOCK, seq, lists), *lists, window=window)

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[Tensor], block_size: Sequence[int], window: int | None
    ) -> BlockMask:
        """Of `visible_until` and `schedule_tensors()`, also where the block size is unknown."""
        visible_until, *lists = tensors
        return cls(
            visible_until, _known(block_size, visible_until.shape[1], lists), *lists, window=window
        )

    def resolved(self) -> BlockMask:
        """With its block size, which one that comes out of compiled code does not know."""
        if self.block_size != UNKNOWN_BLOCK:
            return self
        seq = self.visible_until.shape[1]
        return replace(self, block_size=_known(UNKNOWN_BLOCK, seq, self.schedule_tensors()))

    @classmethod
    def has_key(cls, key: str) -> bool:
        """Whether a key of a batch may be one of `schedule()`."""
        return key.partition(WITHIN)[0] in SCHEDULE_KEYS

    def check(self) -> None:
        """Raises ValueError unless these are lists that kernels may read, of this `visible_until`.

        Elsewhere than on a CPU it is asserted, without waiting for the device; there it is by the
        number of tiles that a list is recognised, so this is for once per batch. The CPU kernels
        compare the lists with the mask, tile by tile, in every call.
        """
        check_visible_until(self.visible_until)
        self.check_shapes()
        block_size = self.resolved().block_size
        begin, end, full_begin, full_end = _runs(self.visible_until, block_size)
        needed, most_full = end - begin, (full_end - full_begin).clamp(min=0)
        listed = self.q_offsets.diff(dim=1)
        full = self.q_offsets[:, 1:] - self.q_full_start[:, :-1]
        wrong = (full > most_full).any()
        if self.window is None:
            wrong = wrong | (listed < needed).any()
            wrong = wrong | (self.kv_offsets[:, -1] < needed.sum(1)).any()
        num_queries, num_keys = self.num_blocks
        for side, num_blocks in (("kv", num_keys), ("q", num_queries)):
            offsets, full_start, indices = self._lists(side)
            wrong = wrong | (offsets[:, 0] != 0).any() | (offsets[:, -1] > indices.shape[1]).any()
            wrong = wrong | (full_start < offsets).any()
            wrong = wrong | (full_start[:, :-1] > offsets[:, 1:]).any()
            wrong = wrong | ((indices < 0) | (indices >= num_blocks)).any()
        message = (
            "kv_offsets, kv_full_start, kv_indices and those of q are not the lists of a row of "
            f"{self.visible_until.shape[1]} tokens with this visible_until in blocks of "
            f"{block_size}"
        )
        refuse_if(wrong, message)

    def check_shapes(self) -> None:
        """Raises ValueError unless the lists are int32 of the shapes that the class names."""
        batch, seq = self.visible_until.shape
        block_size = self.resolved().block_size
        for side, size in zip(("kv", "q"), block_size, strict=True):
            blocks = -(-seq // size)
            offsets, full_start, indices = lists = self._lists(side)
            if (
                offsets.shape != (batch, blocks + 1)
                or full_start.shape != offsets.shape
                or indices.dim() != 2
                or len(indices) != batch
                or any(x.dtype != torch.int32 for x in lists)
            ):
                found = ", ".join(f"{x.dtype} of shape {tuple(x.shape)}" for x in lists)
                raise ValueError(
                    f"{side}_offsets, {side}_full_start and {side}_indices must be int32 of shapes "
                    f"{(batch, blocks + 1)}, the same and ({batch}, …) for blocks of "
                    f"{block_size}, got {found}"
                )

    def _lists(self, side: str) -> tuple[Tensor, Tensor, Tensor]:
        names = ("offsets", "full_start", "indices")
        offsets, full_start, indices = (getattr(self, f"{side}_{name}") for name in names)
        return offsets, full_start, indices

    def schedule(self) -> dict[str, Tensor]:
        """The lists as batch-first int32 tensors, to travel with a batch as model arguments."""
        if any(size & (size - 1) for size in self.block_size):
            raise ValueError(f"block_size must be powers of two to travel, got {self.block_size}")
        return dict(zip(_keys(self.window), self.schedule_tensors(), strict=True))

    def schedule_tensors(self) -> list[Tensor]:
        """The lists in the order of `SCHEDULE_KEYS`."""
        return [getattr(self, key) for key in SCHEDULE_KEYS]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BlockMask:
        """The same mask on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        lists = map(move, self.schedule_tensors())
        return BlockMask(move(self.visible_until), self.block_size, *lists, window=self.window)

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Of queries and of keys, in a row."""
        return self.kv_offsets.shape[1] - 1, self.q_offsets.shape[1] - 1

    @property
    def num_tiles(self) -> int:
        """How many tiles are visited, over all rows."""
        return int(self.kv_offsets[:, -1].sum())

    @property
    def num_full_tiles(self) -> int:
        """How many of them need no mask."""
        return int((self.kv_offsets[:, 1:] - self.kv_full_start[:, :-1]).sum())

    def to_dense(self) -> Tensor:
        """(batch, query blocks, key blocks) int8: 0 invisible, 1 partial, 2 full."""
        batch, (num_m, num_n) = len(self.visible_until), self.num_blocks
        grid = torch.zeros(batch, num_m, num_n, dtype=torch.int8, device="cpu")
        offsets, full_start, indices = (
            t.cpu() for t in (self.kv_offsets, self.kv_full_start, self.kv_indices)
        )
        for b in range(batch):
            for m in range(num_m):
                low, middle, high = offsets[b, m], full_start[b, m], offsets[b, m + 1]
                grid[b, m, indices[b, low:middle].long()] = 1
                grid[b, m, indices[b, middle:high].long()] = 2
        return grid

    def __str__(self) -> str:
        grid = self.to_dense()
        batch, num_m, num_n = grid.shape
        share = self.num_tiles / (batch * num_m * num_n)
        lines = [
            f"BlockMask(batch={batch}, seq={self.visible_until.shape[1]}, "
            f"block_size={self.resolved().block_size}, tiles={self.num_tiles} "
            f"({share:.1%} of the grid), "
            f"full={self.num_full_tiles})"
        ]
        # Larger grids are drawn coarser; a cell is full only if all tiles under it are.
        step = -(-max(num_m, num_n) // 64)
        for row in grid[:4]:
            for m in range(0, num_m, step):
                cells = (row[m : m + step, n : n + step] for n in range(0, num_n, step))
                lines.append("".join(" ░█"[_cell(cell)] for cell in cells).rstrip())
            lines.append("")
        if batch > 4:
            lines.append(f"… and {batch - 4} more rows")
        return "\n".join(lines).rstrip()


def choose_block_size(
    visible_until: Tensor, compute_capability: tuple[int, int] | None = None
) -> int:
    """The side of square tiles, 64 or 128, that attention is fastest with by a static model.

    Large tiles suit long segments: there are fewer of them, and most need no mask. Of short ones
    they hold many pairs that are not visible.

    Args:
        visible_until: (batch, seq) int32; see `BlockMask`.
        compute_capability: Of the NVIDIA GPU that the tiles are for. Default: that of the device
            of `visible_until`; on other devices, any before (10, 0).
    """
    if compute_capability is None and visible_until.is_cuda and torch.version.hip is None:
        compute_capability = torch.cuda.get_device_capability(visible_until.device)
    tensor_memory = compute_capability is not None and compute_capability[0] == 10
    times = []
    for side, (partial, full) in (TILE_TIMES_SM_100 if tensor_memory else TILE_TIMES).items():
        begin, end, full_begin, full_end = _runs(visible_until, (side, side))
        num_full = (full_end - full_begin).clamp(min=0).sum()
        num_partial = (end - begin).sum() - num_full
        times.append(num_partial * partial + num_full * full)
    return list(TILE_TIMES)[int(torch.stack(times).argmin())]


def check_visible_until(visible_until: Tensor) -> None:
    """Raises ValueError unless `visible_until` is (batch, seq) int32 with j < value <= seq."""
    if visible_until.dtype != torch.int32 or visible_until.dim() != 2:
        raise ValueError(
            "visible_until must be an int32 tensor of shape (batch, seq), got "
            f"{visible_until.dtype} of shape {tuple(visible_until.shape)}"
        )
    seq = visible_until.shape[1]
    if 0 in visible_until.shape:
        raise ValueError(
            "visible_until must have at least one row of at least one token, got the shape "
            f"{tuple(visible_until.shape)}"
        )
    wrong = (visible_until <= torch.arange(seq, device=visible_until.device)) | (
        visible_until > seq
    )
    if visible_until.device.type != "cpu":
        torch._assert_async(
            ~wrong.any(), "visible_until[b, j] must lie in j + 1 .. seq for every token j"
        )
    elif wrong.any():
        b, j = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"visible_until[b, j] must lie in j + 1 .. seq = {seq}, since every token sees itself; "
            f"got visible_until[{b}, {j}] = {int(visible_until[b, j])}"
        )


def check_window(window: int, position_ids: Tensor | None, visible_until: Tensor) -> Tensor:
    """The positions; raises ValueError unless they match, and `window` is positive."""
    check_whole("window", window, least=1)
    if position_ids is None:
        raise ValueError("window counts positions: position_ids must be given with it, got None")
    if position_ids.shape != visible_until.shape or position_ids.dtype.is_floating_point:
        raise ValueError(
            f"position_ids must be integers of shape {tuple(visible_until.shape)}, got "
            f"{position_ids.dtype} of shape {tuple(position_ids.shape)}"
        )
    if position_ids.device != visible_until.device:
        raise ValueError(
            f"position_ids must be on visible_until's device {visible_until.device}, got "
            f"{position_ids.device}"
        )
    return position_ids


def int32_positions(position_ids: Tensor) -> Tensor:
    """Positions as the kernels compare them; on a GPU int32 ones cost nothing, unchecked.

    Raises:
        ValueError: One, or the difference of two, does not fit (asserted, without waiting for the
            device, on a GPU).
    """
    if position_ids.dtype == torch.int32 and position_ids.device.type != "cpu":
        return position_ids
    narrow = position_ids.int()
    if not torch.compiler.is_compiling():  # the answer depends on data
        low, high = position_ids.aminmax()
        wrong = (narrow != position_ids).any() | (high.long() - low > torch.iinfo(torch.int32).max)
        message = "position_ids and their differences must fit in int32"
        if position_ids.device.type == "cpu" and wrong:
            message += f", got {int(low)} to {int(high)}"
        refuse_if(wrong, message)
    return narrow


def _runs(
    visible_until: Tensor, block_size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(batch, key blocks) each: begin and end of the visible query blocks, and of the full ones.

    Seen from a key block, both are one contiguous run; that of the full ones may be empty, and
    then end before it begins.
    """
    (batch, seq), (block_m, block_n) = visible_until.shape, block_size
    start = torch.arange(0, seq, block_n, device=visible_until.device)  # first key of each block
    last_key = (start + block_n).clamp(max=seq) - 1
    latest = _block_extreme(visible_until, block_n, "amax").long()
    earliest = _block_extreme(visible_until, block_n, "amin").long()
    begin = (start // block_m).expand(batch, -1)
    end = (latest + block_m - 1) // block_m
    full_begin = ((last_key + block_m - 1) // block_m).expand(batch, -1)
    full_end = torch.where(earliest == seq, -(-seq // block_m), earliest // block_m)
    return begin, end, full_begin, full_end


def _keys(window: int | None) -> list[str]:
    return [key if window is None else f"{key}{WITHIN}{window}" for key in SCHEDULE_KEYS]


class _Positions(NamedTuple):
    """The extreme positions in each block of queries, and of keys: (batch, blocks) int64."""

    q_min: Tensor
    q_max: Tensor
    k_min: Tensor
    k_max: Tensor

    @classmethod
    def of_blocks(cls, position_ids: Tensor, block_size: tuple[int, int]) -> _Positions:
        positions = position_ids.long()
        return cls(
            *(_block_extreme(positions, size, how) for size in block_size for how in EXTREMES)
        )

    def mirrored(self) -> _Positions:
        """For lists by key block: ``q - k`` is ``(-k) - (-q)``."""
        return _Positions(-self.k_max, -self.k_min, -self.q_max, -self.q_min)


EXTREMES = ("amin", "amax")


def _expand(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """All members of the runs ``begin : end``, and the index of the run that each is in."""
    begin, count = begin.flatten(), (end - begin).flatten()
    run = torch.repeat_interleave(count)
    first = (begin - count.cumsum(0) + count)[run]
    return run, first + torch.arange(len(run), device=run.device)


def _expand_within(
    begin: Tensor, end: Tensor, lowest: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_expand`, but only members m of a run with ``lowest[b, m] < limit[run]``.

    Found by bisection from the whole row down, so that time and memory follow their number.

    Args:
        begin, end, limit: (batch, runs).
        lowest: (batch, members).
    """
    levels = [lowest]  # of groups of 1, 2, 4, … members
    while levels[-1].shape[1] > 1:
        levels.append(_block_extreme(levels[-1], 2, "amin"))
    run = torch.arange(begin.numel(), device=begin.device)
    group = torch.zeros_like(run)
    row, begin, end, limit = run // begin.shape[1], begin.flatten(), end.flatten(), limit.flatten()
    for level, least in reversed(list(enumerate(levels))):
        first = group << level
        inside = (first < end[run]) & (first + (1 << level) > begin[run])
        group_or_0 = group.clamp(max=least.shape[1] - 1)
        kept = inside & (least[row[run], group_or_0] < limit[run])
        run, group = run[kept], group[kept]
        if level:
            run = run.repeat_interleave(2)
            group = torch.stack([2 * group, 2 * group + 1], dim=1).flatten()
    return run, group


@operation("llmjepa_kernels::narrow_schedule")
def _narrow(
    position_ids: Tensor, lists: Sequence[Tensor], block_size: Sequence[int], window: int
) -> list[Tensor]:
    """What a window leaves of the lists of a schedule; see `BlockMask.within`."""
    block_size = _known(block_size, position_ids.shape[1], lists)
    positions = _Positions.of_blocks(position_ids, block_size)
    kv_lists = _narrow_lists(lists[:3], window, positions)
    # Seen from the keys the distance changes its sign, and so do minimum and maximum.
    return kv_lists + _narrow_lists(lists[3:], window, positions.mirrored())


@torch.library.register_fake("llmjepa_kernels::narrow_schedule")
def _(position_ids, lists, block_size, window):
    return [torch.empty_like(x) for x in lists]


def _narrow_lists(lists: Sequence[Tensor], window: int, positions: _Positions) -> list[Tensor]:
    """What a window leaves of lists of tiles: offsets, full_start and indices, as they were."""
    offsets, full_start, indices = (x.long() for x in lists)
    slot = torch.arange(indices.shape[1], device=indices.device).expand_as(indices).contiguous()
    row = torch.searchsorted(offsets[:, 1:].contiguous(), slot, right=True)
    row = row.clamp(max=offsets.shape[1] - 2)
    q_min, q_max = positions.q_min.gather(1, row), positions.q_max.gather(1, row)
    k_min, k_max = positions.k_min.gather(1, indices), positions.k_max.gather(1, indices)
    kept = (slot < offsets[:, -1:]) & (q_min - k_max < window)
    full = kept & (slot >= full_start.gather(1, row)) & (q_max - k_min < window)

    # By row, partial tiles before full ones, each in order; what is dropped goes to the end.
    key = (2 * row + full) * positions.k_min.shape[1] + indices
    order = key.masked_fill(~kept, torch.iinfo(key.dtype).max).argsort(dim=1)
    zeros = torch.zeros_like(offsets)  # the last is that of no row
    total = zeros.scatter_add(1, row, kept.long())
    partial = zeros.scatter_add(1, row, (kept & ~full).long())
    offsets = total.cumsum(1) - total
    indices = indices.masked_fill(~kept, 0).gather(1, order)
    return [x.int() for x in (offsets, offsets + partial, indices)]


def _block_extreme(values: Tensor, block: int, extreme: str) -> Tensor:
    """(batch, seq) -> (batch, ceil(seq / block)): the largest or smallest value of each block."""
    missing = -values.shape[1] % block
    if missing:  # repeating a value of the last block does not change its extremes
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1)
    return getattr(values.unflatten(1, (-1, block)), extreme)(dim=-1)


def _compress(
    b: Tensor, row: Tensor, column: Tensor, full: Tensor, grid: tuple[int, int, int], longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts tiles by (b, row, full, column) -> offsets, full_start, indices per batch row."""
    batch, num_rows, num_columns = grid
    group = b * (num_rows + 1) + row  # the last is that of no row
    order = torch.argsort((group * 2 + full) * num_columns + column)
    zeros = group.new_zeros(batch * (num_rows + 1))
    total = zeros.scatter_add(0, group, torch.ones_like(group)).view(batch, -1)
    partial = zeros.scatter_add(0, group, (~full).long()).view(batch, -1)
    offsets = total.cumsum(1) - total

    row_end = offsets[:, -1].cumsum(0)
    slot = torch.arange(len(order), device=order.device) - (row_end - offsets[:, -1])[b[order]]
    indices = column.new_zeros(batch, longest)
    indices[b[order], slot] = column[order]
    return offsets.int(), (offsets + partial).int(), indices.int()


def _known(block_size: Sequence[int], seq: int, lists: Sequence[Tensor]) -> tuple[int, int]:
    """The block size, inferred from the lists of a schedule if it is not known."""
    if tuple(block_size) != UNKNOWN_BLOCK or torch.compiler.is_compiling():
        return block_size[0], block_size[1]
    return _infer_block(seq, lists[0].shape[1] - 1), _infer_block(seq, lists[3].shape[1] - 1)


def _infer_block(seq: int, num_blocks: int) -> int:
    if num_blocks < 1:
        raise ValueError(f"a schedule must have at least one block, got {num_blocks}")
    block = 1
    while -(-seq // block) > num_blocks:
        block *= 2
    if -(-seq // block) != num_blocks:
        raise ValueError(f"no power of two cuts seq = {seq} into {num_blocks} blocks")
    # Where one block holds the row, any larger one does: not every kernel takes tiny ones.
    return max(block, 64) if num_blocks == 1 else block


def _cell(tiles: Tensor) -> int:
    return 2 if tiles.min() == 2 else int(tiles.max() > 0)
