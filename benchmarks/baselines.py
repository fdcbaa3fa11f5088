"""LLM-JEPA and plain fine-tuning as they are done without this package, with the same loss.

Every baseline is a list of micro-batches of ordinary Transformers inputs, and one function that
runs them: a forward pass with the model's own loss, hidden states of the views' last tokens, their
cosine. No baseline uses anything of the package but the token ids of an `Example`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad, scaled_dot_product_attention

from llmjepa_kernels import Example
from llmjepa_kernels.hf.patch import patch_model

IGNORE = -100
DOCUMENTS = "benchmark_documents"


@dataclass(frozen=True)
class Sequences:
    """An example as the sequences that separate passes need: a chat, and pairs of views."""

    chat: list[int]
    labels: list[int]
    pairs: list[tuple[list[int], list[int]]]

    @classmethod
    def of(cls, example: Example) -> Sequences:
        """Follows every view, and the supervised segments, up to their roots."""
        segments = example.segments

        def path(index: int | None) -> list[int]:
            indices = []
            while index is not None:
                indices.append(index)
                index = segments[index].parent
            return indices[::-1]

        def ids(index: int) -> list[int]:
            return [token for i in path(index) for token in segments[i].input_ids]

        supervised = [
            i for i, s in enumerate(segments) if s.labels and any(y != IGNORE for y in s.labels)
        ]
        chat = path(supervised[-1])
        if not set(supervised) <= set(chat):
            raise ValueError("a chat must be one sequence, got supervised segments on two branches")
        labels = [
            label
            for i in chat
            for label in segments[i].labels or [IGNORE] * len(segments[i].input_ids)
        ]
        pairs = [(ids(predictor), ids(target)) for predictor, target in example.pairs]
        return cls(ids(chat[-1]), labels, pairs)


@dataclass
class MicroBatch:
    """One forward pass: model inputs, labels, and (row, column) of each pair's last tokens."""

    inputs: dict[str, Tensor]
    labels: Tensor
    pairs: Tensor  # (num_pairs, 2, 2): predictor and target, row and column

    @property
    def tokens(self) -> int:
        return self.labels.numel()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> MicroBatch:
        """On a device; an additive mask in the dtype of the model, as SDPA wants it on GPUs."""
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.is_floating_point():
            inputs["attention_mask"] = mask.to(dtype)
        return MicroBatch(inputs, self.labels.to(device), self.pairs.to(device))


@dataclass
class Baseline:
    """Micro-batches whose losses add up to that of one step, and how to run them.

    Attributes:
        micro_batches: Gradients accumulate over them.
        attention: Implementation to set on the model; None patches it instead.
        supervised_head: Run the LM head on supervised tokens only.
    """

    micro_batches: list[MicroBatch]
    attention: str | None = "sdpa"
    supervised_head: bool = False
    num_labels: int = field(init=False)
    num_pairs: int = field(init=False)

    def __post_init__(self):
        self.num_labels = sum(int((m.labels[:, 1:] != IGNORE).sum()) for m in self.micro_batches)
        self.num_pairs = sum(len(m.pairs) for m in self.micro_batches)

    @property
    def tokens(self) -> int:
        """Tokens through the model, padding included."""
        return sum(m.tokens for m in self.micro_batches)

    @property
    def head_tokens(self) -> int:
        """Tokens through the LM head."""
        return self.num_labels if self.supervised_head else self.tokens

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Baseline:
        moved = [m.to(device, dtype) for m in self.micro_batches]
        return Baseline(moved, self.attention, self.supervised_head)

    def prepare(self, model) -> None:
        """Sets the model's attention; not part of a step."""
        if self.attention is None:
            patch_model(model)
        else:
            model.set_attn_implementation(self.attention)

    def step(
        self, model, jepa_weight: float = 1.0, *, backward: bool = True
    ) -> tuple[float, float]:
        """Forward and, unless told otherwise, backward; returns (NTP loss, JEPA loss)."""
        sums = torch.zeros(2, device=self.micro_batches[0].labels.device)
        for batch in self.micro_batches:
            with torch.set_grad_enabled(backward):
                ntp, jepa = self._losses(model, batch)
            if backward:
                (ntp + jepa_weight * jepa).backward()
            sums += torch.stack([ntp.detach(), jepa.detach()])
        ntp, jepa = sums.tolist()
        return ntp, jepa

    def _losses(self, model, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the step's two means."""
        arguments = {"labels": batch.labels, "num_items_in_batch": self.num_labels}
        if self.supervised_head:
            shifted = pad(batch.labels[:, 1:], (0, 1), value=IGNORE)
            (kept,) = (shifted[0] != IGNORE).nonzero(as_tuple=True)
            arguments |= {"logits_to_keep": kept, "shift_labels": shifted[:, kept]}
        outputs = model(
            **batch.inputs,
            **arguments,
            use_cache=False,
            output_hidden_states=bool(len(batch.pairs)),
        )
        if not len(batch.pairs):
            return outputs.loss, outputs.loss.new_zeros(())
        rows, columns = batch.pairs.unbind(-1)
        predictor, target = outputs.hidden_states[-1][rows, columns].float().unbind(1)
        return outputs.loss, (1 - cosine_similarity(predictor, target)).sum() / self.num_pairs


def three_rows(
    sequences: Sequence[Sequences], pad_token_id: int, *, length: int | None = None
) -> MicroBatch:
    """3B rows: the chats, the predicting views, the targets; padded to `length` or the longest.

    Source: the default of the LLM-JEPA authors' release, which pads to 512.
    """
    chats = [s.chat for s in sequences]
    pairs = [pair for s in sequences for pair in s.pairs]
    rows = chats + [predictor for predictor, _ in pairs] + [target for _, target in pairs]
    length = _length(rows, length)
    labels = [s.labels for s in sequences] + [[]] * (2 * len(pairs))
    first = len(chats)
    ends = [
        [[first + i, len(predictor) - 1], [first + len(pairs) + i, len(target) - 1]]
        for i, (predictor, target) in enumerate(pairs)
    ]
    inputs = {
        "input_ids": _padded(rows, length, pad_token_id),
        "attention_mask": _padded([[1] * len(row) for row in rows], length, 0),
    }
    return MicroBatch(inputs, _padded(labels, length, IGNORE), _pairs(ends))


def additive_mask(
    sequences: Sequence[Sequences], pad_token_id: int, *, length: int | None = None
) -> MicroBatch:
    """2B rows: the chats, and both views in one row under a dense fp32 block-diagonal mask.

    Source: ``--additive_mask`` of the LLM-JEPA authors' release, which pads to 512.
    """
    chats = [s.chat for s in sequences]
    pairs = [pair for s in sequences for pair in s.pairs]
    blocks = [[len(chat)] for chat in chats] + [[len(x), len(y)] for x, y in pairs]
    rows = chats + [x + y for x, y in pairs]
    length = _length(rows, length)
    labels = [s.labels for s in sequences] + [[]] * len(pairs)
    first = len(chats)
    ends = [
        [[first + i, len(x) - 1], [first + i, len(x) + len(y) - 1]]
        for i, (x, y) in enumerate(pairs)
    ]
    mask = torch.full((len(rows), 1, length, length), -torch.inf)
    for row, sizes in zip(mask, blocks, strict=True):
        start = 0
        for size in sizes:
            block = row[:, start : start + size, start : start + size]
            block.copy_(torch.full((size, size), -torch.inf).triu(1))
            start += size
    inputs = {"input_ids": _padded(rows, length, pad_token_id), "attention_mask": mask}
    return MicroBatch(inputs, _padded(labels, length, IGNORE), _pairs(ends))


def documents(sequences: Sequence[Sequences], *, views: bool = True) -> MicroBatch:
    """One unpadded row of everything, each sequence a document of its own."""
    rows = [s.chat for s in sequences]
    labels = [s.labels for s in sequences]
    pairs = [pair for s in sequences for pair in s.pairs] if views else []
    for views_of_pair in pairs:
        rows += views_of_pair
        labels += [[IGNORE] * len(view) for view in views_of_pair]
    bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
    last = (bounds[1 + len(sequences) :] - 1).tolist()
    ends = [[[0, x], [0, y]] for x, y in zip(last[::2], last[1::2], strict=True)]
    inputs = {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[p for row in rows for p in range(len(row))]]),
        "document_bounds": bounds.tolist(),
        "document_offsets": bounds.int(),
    }
    # A document's first label has nothing before it that could predict it.
    labels = torch.tensor([[y for row in labels for y in [IGNORE, *row[1:]]]])
    return MicroBatch(inputs, labels, _pairs(ends))


def in_micro_batches(
    build: Callable[[Sequence[Sequences]], MicroBatch], sequences: Sequence[Sequences], size: int
) -> list[MicroBatch]:
    """`build` on `size` examples at a time."""
    return [build(sequences[i : i + size]) for i in range(0, len(sequences), size)]


def document_attention(
    module,
    q,
    k,
    v,
    attention_mask,
    *,
    document_bounds,
    document_offsets,
    scaling=None,
    dropout=0.0,
    **kwargs,
):
    """Causal attention within each document: variable-length kernel on CUDA, a loop elsewhere.

    On a CPU the loop is the fastest that PyTorch has: Transformers' own detection of packed
    documents builds a dense mask there, whose cost grows with the square of the row.
    """
    options = ("sliding_window", "softcap", "s_aux")
    if dropout or any(kwargs.get(option) is not None for option in options):
        raise ValueError(f"document attention has no dropout and none of {options}")
    groups = q.shape[1] // k.shape[1]
    if q.is_cuda and q.dtype != torch.float32:
        longest = max(end - start for start, end in pairwise(document_bounds))
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        bounds = (document_offsets, document_offsets, longest, longest)
        out = causal_varlen(*flat, *bounds, scale=scaling)
        return out[None], None
    # One split has one backward; slices would each add a gradient of the whole row.
    sizes = [end - start for start, end in pairwise(document_bounds)]
    outs = [
        scaled_dot_product_attention(*parts, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        for parts in zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def causal_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None = None,
) -> Tensor:
    """torch's variable-length attention, whose options differ from 2.10 to 2.13.

    Args:
        q: (tokens, heads, head_dim); k and v likewise, with heads that divide its.
        cu_q: Where each sequence of queries begins, and the end; cu_k that of its keys.
        max_q: The longest sequence of queries; max_k of keys.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = repeated(q, k, v)
    if "scale" in known:
        options["scale"] = scale
    elif scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for every head."""
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def register_document_attention() -> str:
    """Makes `document_attention` known to Transformers; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(DOCUMENTS, document_attention)
    AttentionMaskInterface.register(DOCUMENTS, lambda *args, **kwargs: None)
    return DOCUMENTS


def _length(rows: list[list[int]], length: int | None) -> int:
    longest = max(map(len, rows))
    if length is not None and longest > length:
        raise ValueError(f"a sequence takes {longest} tokens, more than length = {length}")
    return length or longest


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _pairs(ends: list) -> Tensor:
    return torch.tensor(ends, dtype=torch.int64).view(-1, 2, 2)
