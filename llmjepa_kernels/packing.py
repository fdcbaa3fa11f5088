"""Rows of many examples, in which equal prefixes are stored once."""

from __future__ import annotations

import numbers
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from llmjepa_kernels.checks import check_whole
from llmjepa_kernels.example import IGNORE, Example, Segment, segment_ends
from llmjepa_kernels.ops.block_mask import MAX_BLOCK, BlockMask, choose_block_size
from llmjepa_kernels.ops.flash_plan import FlashPlan
from llmjepa_kernels.ops.tubes import TUBE_SHAPE
from llmjepa_kernels.tubes import Step


class PackedBatch(dict):
    """Packed rows as a mapping of tensors, each with the batch dimension first.

    Keys:
        input_ids, position_ids, labels: (batch, seq) int64.
        visible_until: (batch, seq) int32; token i sees token j iff ``j <= i < visible_until[j]``.
        view_pairs: (batch, num_pairs, 2) int64; row-local indices of the (predictor, target)
            last tokens, padded with −1.
        tubes: (batch, num_tubes, 2, 3, 2) int64, row-local indices, see `semantic_tube_loss`.
        kv_offsets, …, q_indices: The tiles that attention visits, see `BlockMask.schedule`.
        flash_reach, …: The calls of ``impl="flash"``, see `FlashPlan.schedule`; if asked for.
        attention_mask: (batch, 1, 0, 0) bool, empty: a model that is not patched, and would let
            views see each other, fails on its shape; a patched one needs none.
    """

    @property
    def block_mask(self) -> BlockMask:
        """The tiles that attention visits."""
        return BlockMask.from_schedule(self["visible_until"], self)

    @property
    def flash_plan(self) -> FlashPlan:
        """The calls of ``impl="flash"``."""
        return FlashPlan.from_schedule(self["visible_until"], self)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch({k: v.to(device, non_blocking=non_blocking) for k, v in self.items()})

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return PackedBatch({k: v.pin_memory() for k, v in self.items()})


def pack(
    examples: Iterable[Example],
    max_length: int | None = None,
    *,
    share_prefixes: bool = True,
    pad_token_id: int = 0,
    pad_to_multiple_of: int | None = None,
    block_size: int | None = None,
    compute_capability: tuple[int, int] | None = None,
    flash_plan: bool = False,
) -> PackedBatch:
    """Packs examples into as few rows as best-fit decreasing finds; none is ever split.

    With `share_prefixes`, equal leading tokens of segments under the same parent (roots
    included) are stored once per row, as a segment above what differs. A token whose successor
    is supervised is never shared: each label stays next to the token that predicts it, so
    Hugging Face's shift of `labels` holds without special cases.

    Args:
        examples: At least one.
        max_length: Tokens in a row at most. Default: one row of everything, in the given order.
        share_prefixes: Store equal prefixes once.
        pad_token_id: Fills shorter rows; a padding token sees nothing but itself.
        pad_to_multiple_of: Pads rows to a multiple of this, for fewer different shapes.
        block_size: Tile size of the attention schedule, a power of two. Default: the faster of
            64 and 128 for these segments, by `choose_block_size`'s model.
        compute_capability: Of the GPU that the rows are for, to that model. Default: any before
            (10, 0).
        flash_plan: Also plan the calls of ``impl="flash"``. Each level of shared prefixes is one
            more, so that back end may be faster without `share_prefixes`.

    Raises:
        ValueError: An example is malformed or longer than `max_length`; names it.
    """
    if isinstance(examples, Example):
        raise ValueError("examples must be a sequence of Examples, got one: put it in a list")
    examples = list(examples)
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    for option, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
        if value is not None:
            check_whole(option, value, least=1)
    check_whole("pad_token_id", pad_token_id, least=0)
    if block_size is not None:
        check_whole("block_size", block_size, least=1, most=MAX_BLOCK)
        if block_size & (block_size - 1):
            raise ValueError(f"block_size must be None or a power of two, got {block_size}")
    if max_length and pad_to_multiple_of and max_length % pad_to_multiple_of:
        raise ValueError(
            f"max_length must be a multiple of pad_to_multiple_of = {pad_to_multiple_of}, got "
            f"{max_length}"
        )
    trees = [_prepare(example, index) for index, example in enumerate(examples)]

    if max_length is None:
        row = _Row(share_prefixes)
        for tree in trees:
            row.add(tree)
        rows = [row]
    else:
        rows = _best_fit_decreasing(trees, max_length, share_prefixes)

    length = max(row.length for row in rows)
    if pad_to_multiple_of is not None:
        length += -length % pad_to_multiple_of
    columns = [row.emit(length, pad_token_id) for row in rows]
    num_pairs = max(len(pairs) for *_, pairs, _ in columns)
    num_tubes = max(len(tubes) for *_, tubes in columns)
    batch = PackedBatch()
    for i, key in enumerate(("input_ids", "position_ids", "labels", "visible_until")):
        dtype = torch.int32 if key == "visible_until" else torch.int64
        batch[key] = torch.tensor([column[i] for column in columns], dtype=dtype)
    batch["view_pairs"] = torch.tensor(
        [pairs + [(-1, -1)] * (num_pairs - len(pairs)) for *_, pairs, _ in columns],
        dtype=torch.int64,
    ).view(len(rows), num_pairs, 2)
    batch["tubes"] = torch.tensor(
        [tubes + [_NO_TUBE] * (num_tubes - len(tubes)) for *_, tubes in columns],
        dtype=torch.int64,
    ).view(len(rows), num_tubes, *TUBE_SHAPE)
    size = block_size or choose_block_size(batch["visible_until"], compute_capability)
    mask = BlockMask.from_visible_until(batch["visible_until"], (size, size))
    batch.update(mask.schedule())
    if flash_plan:
        plan = FlashPlan.from_visible_until(
            batch["visible_until"], position_ids=batch["position_ids"]
        )
        batch.update(plan.schedule())
    batch["attention_mask"] = torch.empty(len(rows), 1, 0, 0, dtype=torch.bool)
    return batch


# From examples to trees of token runs

_NUM_VECTORS, _NUM_STEPS, _ = TUBE_SHAPE
_NO_TUBE: list[Step] = [(-1, -1)] * (_NUM_VECTORS * _NUM_STEPS)


@dataclass
class _Run:
    """A segment on its way into a row: `shareable` of its leading tokens may be merged."""

    ids: list[int]
    labels: list[int]
    parent: int | None
    shareable: int


@dataclass
class _Tree:
    runs: list[_Run]
    pairs: list[tuple[int, int]]
    tubes: list[tuple[int, list[Step]]]  # the run that ends their sequence, and six steps
    name: int
    size: int


def _prepare(example: Example, name: int) -> _Tree:
    """Checks an example and gives every supervised token its predecessor right before it."""
    if not isinstance(example, Example):
        raise ValueError(f"example {name}: must be an Example, got {type(example).__name__}")
    if not example.segments:
        raise ValueError(f"example {name}: segments must hold at least one segment, got none")
    runs: list[_Run] = []
    last_run: list[int] = []  # segment -> the run its last token is in
    continued: set[int] = set()  # runs whose end already has a supervised continuation
    supervised_children: dict[int, int] = {}
    checked = [_check_segment(segment, i, name) for i, segment in enumerate(example.segments)]
    for segment, (_, labels) in zip(example.segments, checked, strict=True):
        if labels[0] != IGNORE and segment.parent is not None:
            supervised_children[segment.parent] = supervised_children.get(segment.parent, 0) + 1

    for index, (segment, (ids, labels)) in enumerate(zip(example.segments, checked, strict=True)):
        parent = None if segment.parent is None else last_run[segment.parent]
        if parent is None:
            labels[0] = IGNORE
        elif labels[0] != IGNORE:
            if parent in continued:
                # Only one continuation can follow the parent's last token: this one gets a copy.
                ids, labels = [runs[parent].ids[-1], *ids], [IGNORE, *labels]
                parent = runs[parent].parent
            else:
                continued.add(parent)
                runs[parent].shareable = min(runs[parent].shareable, len(runs[parent].ids) - 1)
        if supervised_children.get(index, 0) > 1 and len(ids) > 1:
            # Set the last token apart, so that copies of it can hang from what is before it.
            runs.append(_Run(ids[:-1], labels[:-1], parent, _shareable(labels)))
            runs[-1].shareable = min(runs[-1].shareable, len(ids) - 1)
            ids, labels, parent = ids[-1:], labels[-1:], len(runs) - 1
            if labels[0] != IGNORE:
                continued.add(parent)
        runs.append(_Run(ids, labels, parent, _shareable(labels)))
        last_run.append(len(runs) - 1)

    if not isinstance(example.pairs, Iterable):
        raise ValueError(f"example {name}: pairs must be a sequence, got {example.pairs!r}")
    for pair in example.pairs:
        indices = tuple(pair) if isinstance(pair, Iterable) else ()
        if len(indices) != 2 or not all(_is_index(i, len(example.segments)) for i in indices):
            raise ValueError(
                f"example {name}: pairs must be (predictor, target) indices of its "
                f"{len(example.segments)} segments, got {pair!r}"
            )
    pairs = [(last_run[predictor], last_run[target]) for predictor, target in example.pairs]
    tubes = list(_check_tubes(example, last_run, name))
    return _Tree(runs, pairs, tubes, name, sum(len(run.ids) for run in runs))


def _check_tubes(
    example: Example, last_run: list[int], name: int
) -> Iterator[tuple[int, list[Step]]]:
    """The run that ends the sequence of each tube, and its steps as in `TUBE_SHAPE`, padded."""
    if not len(example.tubes):
        return
    if example.path is None or not 0 <= example.path.segment < len(example.segments):
        raise ValueError(
            f"example {name}: tubes need a path that ends with one of its "
            f"{len(example.segments)} segments, got {example.path}"
        )
    end = segment_ends(example)[example.path.segment]
    for tube in example.tubes:
        right = _lengths(tube, _NUM_VECTORS) and all(
            _lengths(vector, *range(_NUM_STEPS + 1)) and all(_lengths(step, 2) for step in vector)
            for vector in tube
        )
        steps = [step for vector in tube for step in vector] if right else []
        if not steps or not all(_is_index(i, end) for step in steps for i in step):
            raise ValueError(
                f"example {name}: tubes must be {_NUM_VECTORS} lists of up to {_NUM_STEPS} steps "
                f"between the {end} tokens of its path's sequence, got {tube}"
            )
        padding = [[(-1, -1)] * (_NUM_STEPS - len(vector)) for vector in tube]
        steps = [step for pair in zip(tube, padding, strict=True) for x in pair for step in x]
        yield last_run[example.path.segment], steps


def _lengths(values: Any, *allowed: int) -> bool:
    """Whether it is a sequence, of one of these lengths."""
    return isinstance(values, Sequence) and len(values) in allowed


def _check_segment(segment: Segment, index: int, name: int) -> tuple[list[int], list[int]]:
    where = f"example {name}, segment {index}"
    if segment.parent is not None and not _is_index(segment.parent, index):
        earlier = f" or an earlier segment (0 .. {index - 1})" if index else " for the first one"
        raise ValueError(f"{where}: parent must be None{earlier}, got {segment.parent!r}")
    ids = _integers(segment.input_ids, f"{where}: input_ids")
    if not ids:
        raise ValueError(f"{where}: input_ids must hold at least one token, got none")
    if segment.labels is None:
        return ids, [IGNORE] * len(ids)
    labels = _integers(segment.labels, f"{where}: labels")
    if len(labels) != len(ids):
        raise ValueError(
            f"{where}: labels must be as many as input_ids ({len(ids)}), got {len(labels)}"
        )
    return ids, labels


def _integers(values: Sequence[int], name: str) -> list[int]:
    if not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a flat sequence of integers, got {values!r}")
    array = values
    values = array.tolist() if hasattr(array, "tolist") else list(array)
    if not isinstance(values, list):  # an array of no dimension
        raise ValueError(f"{name} must be a flat sequence of integers, got {array!r}")
    if not set(map(type, values)) <= {int}:
        values = [int(x) if _is_integer(x) else x for x in values]
        wrong = [x for x in values if type(x) is not int]
        if wrong:
            raise ValueError(f"{name} must be a flat sequence of integers, got {wrong[0]!r} in it")
    if values and max(max(values), -min(values)) >= 2**63:
        raise ValueError(f"{name} must fit in int64, got {max(values, key=abs)}")
    return values


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)  # numpy's too


def _is_index(value: object, length: int) -> bool:
    return _is_integer(value) and 0 <= cast(int, value) < length


def _shareable(labels: list[int]) -> int:
    """How many leading tokens are unsupervised and, in this run, have unsupervised successors."""
    for i, label in enumerate(labels):
        if label != IGNORE:
            return max(i - 1, 0)
    return len(labels)


# Rows: prefix trees of runs


@dataclass(eq=False)
class _Node:
    """Tokens stored once. Children that may be merged further are found by their first token."""

    ids: list[int]
    labels: list[int]
    shareable: int
    lead: _Node | None = None  # starts with a supervised token: must follow directly
    by_first: dict[int, _Node] = field(default_factory=dict)
    others: list[_Node] = field(default_factory=list)
    parent: _Node | None = None
    first: int = 0  # position of the first token, once emitted
    last: int = -1  # index of the last token in the row, once emitted

    def children(self) -> Iterator[_Node]:
        if self.lead is not None:
            yield self.lead
        yield from self.by_first.values()
        yield from self.others

    def place(self, position: int) -> int:
        """The index in the row of a token of the sequence that ends here, once emitted."""
        node = self
        while position < node.first and node.parent is not None:
            node = node.parent
        return node.last + 1 - len(node.ids) + position - node.first


class _Row:
    """One row under construction."""

    def __init__(self, share_prefixes: bool):
        self.share_prefixes = share_prefixes
        self.root = _Node([], [], 0)
        self.length = 0
        self.pairs: list[tuple[_Node, _Node]] = []
        self.tubes: list[tuple[_Node, list[Step]]] = []

    def add(self, tree: _Tree) -> None:
        ends: list[_Node] = []
        for run in tree.runs:
            parent = self.root if run.parent is None else ends[run.parent]
            ends.append(self._insert(parent, run))
        self.pairs += [(ends[predictor], ends[target]) for predictor, target in tree.pairs]
        self.tubes += [(ends[run], steps) for run, steps in tree.tubes]

    def added_length(self, tree: _Tree) -> int:
        """At most how many tokens `add` would add (prefixes shared within `tree` count twice)."""
        if not self.share_prefixes:
            return tree.size
        total = 0
        ends: list[_Node | None] = []  # None: not at the end of a node of this row
        for run in tree.runs:
            node = self.root if run.parent is None else ends[run.parent]
            done = 0
            while node is not None and done < run.shareable:
                child = node.by_first.get(run.ids[done])
                if child is None:
                    break
                common = _common_prefix(child, run, done)
                done += common
                node = child if common == len(child.ids) else None
            total += len(run.ids) - done
            ends.append(node if done == len(run.ids) else None)
        return total

    def _insert(self, parent: _Node, run: _Run) -> _Node:
        done = 0
        while self.share_prefixes and done < run.shareable:
            child = parent.by_first.get(run.ids[done])
            if child is None:
                break
            common = _common_prefix(child, run, done)
            done += common
            parent = child if common == len(child.ids) else _split(parent, child, common)
        if done == len(run.ids):
            return parent
        node = _Node(run.ids[done:], run.labels[done:], run.shareable - done, parent=parent)
        if node.labels[0] != IGNORE:
            parent.lead = node
        elif self.share_prefixes and node.shareable:
            parent.by_first[node.ids[0]] = node
        else:
            parent.others.append(node)
        self.length += len(node.ids)
        return node

    def emit(self, length: int, pad_token_id: int) -> tuple[list, list, list, list, list, list]:
        """Columns of the row, depth first, and the pairs and tubes as indices into it."""
        ids: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        visible_until: list[int] = []
        stack = [(child, 0, False) for child in self.root.children()][::-1]
        while stack:
            node, position, done = stack.pop()
            size = len(node.ids)
            if done:  # the subtree ends here
                visible_until[node.last + 1 - size : node.last + 1] = [len(ids)] * size
                continue
            ids += node.ids
            labels += node.labels
            positions += range(position, position + size)
            visible_until += node.ids  # room; set when the subtree is done
            node.first, node.last = position, len(ids) - 1
            stack.append((node, position, True))
            stack += [(child, position + size, False) for child in node.children()][::-1]

        padding = length - len(ids)
        visible_until += range(len(ids) + 1, length + 1)
        ids += [pad_token_id] * padding
        positions += [0] * padding
        labels += [IGNORE] * padding
        pairs = [(predictor.last, target.last) for predictor, target in self.pairs]
        tubes = [
            [(i if i < 0 else node.place(i), j if j < 0 else node.place(j)) for i, j in steps]
            for node, steps in self.tubes
        ]
        return ids, positions, labels, visible_until, pairs, tubes


def _common_prefix(child: _Node, run: _Run, done: int) -> int:
    """How many tokens of `run` from `done` on equal the child's and may be stored with them."""
    limit = min(child.shareable, run.shareable - done)
    if child.ids[:limit] == run.ids[done : done + limit]:
        return limit
    return next(i for i in range(limit) if child.ids[i] != run.ids[done + i])


def _split(parent: _Node, child: _Node, size: int) -> _Node:
    """Sets the first `size` tokens of `child` apart, as a new node between it and `parent`."""
    head = _Node(child.ids[:size], child.labels[:size], size, parent=parent)
    child.parent = head
    child.ids, child.labels = child.ids[size:], child.labels[size:]
    child.shareable -= size
    parent.by_first[head.ids[0]] = head
    if child.shareable:
        head.by_first[child.ids[0]] = child
    else:
        head.others.append(child)
    return head


_CANDIDATES = 8  # rows that may be too full for an example but for its shared prefixes


def _best_fit_decreasing(trees: list[_Tree], max_length: int, share_prefixes: bool) -> list[_Row]:
    rows: list[_Row] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for tree in sorted(trees, key=lambda tree: -tree.size):
        first_sure = bisect_left(space, (tree.size, -1))
        slot = next(
            (
                slot
                for slot in range(max(first_sure - _CANDIDATES, 0), first_sure)
                if rows[space[slot][1]].added_length(tree) <= space[slot][0]
            ),
            first_sure,
        )
        if slot == len(space):
            rows.append(_Row(share_prefixes))
            index = len(rows) - 1
        else:
            _, index = space.pop(slot)
        rows[index].add(tree)
        if rows[index].length > max_length:
            raise ValueError(
                f"example {tree.name} takes {rows[index].length} tokens, more than "
                f"max_length = {max_length}"
            )
        insort(space, (max_length - rows[index].length, index))
    return rows
