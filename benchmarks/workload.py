"""Rows to attend over: random examples of a mean segment length, or real ones."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import Tensor

from llmjepa_kernels import BlockMask, Example, PackedBatch, Segment, llm_jepa_example, pack
from llmjepa_kernels.data.chat import chat_example
from llmjepa_kernels.data.grammar import generate
from llmjepa_kernels.data.samples import read_chats
from llmjepa_kernels.data.tokenizer import train_tokenizer
from llmjepa_kernels.hf.load import load_tokenizer


def random_row(seq: int, mean_length: float, seed: int = 0) -> PackedBatch:
    """One row of exactly `seq` tokens: LLM-JEPA examples of a text, its code, [PRED] and a view.

    Texts and codes are exponentially distributed around `mean_length`, at least one token long,
    and cut to what is left of the row.
    """
    rng = random.Random(seed)
    examples, room = [], seq
    while room >= 4:
        text, code = (1 + int(rng.expovariate(1 / max(mean_length - 0.5, 0.5))) for _ in range(2))
        code = min(code, (room - 2) // 2)
        text = min(text, room - 2 * code - 1)
        examples.append(llm_jepa_example([0] * text, [0] * code, [0] * code, pred_ids=[0]))
        room -= text + 2 * code + 1
    if room:
        examples.append(Example([Segment([0] * room)]))
    return pack(examples, share_prefixes=False)


def load_examples(data: Path | None, tokenizer: str | None, count: int) -> list[Example]:
    """Chats of a JSONL file, or of the built-in grammar, in the shared layout.

    Args:
        tokenizer: Of a model: name, directory or .gguf file. Default: one trained on the chats.
    """
    chats = load_chats(data, count)
    loaded = load_tokenizer(tokenizer) if tokenizer else train_tokenizer(chats)
    return chat_examples(chats, loaded, "shared", pred_ids=[0])


def load_chats(data: Path | None, count: int) -> list[dict]:
    """The first `count` chats of a JSONL file, or of the built-in grammar."""
    chats = list(islice(read_chats(data), count)) if data else generate(count)
    if len(chats) < count:
        raise ValueError(f"expected at least {count} chats, {data} has {len(chats)}")
    return chats


def name_of(data: Path | None) -> str:
    """Of a JSONL file, or of the built-in grammar."""
    return "grammar" if data is None else data.stem


def chat_examples(
    chats: Sequence[Mapping], tokenizer, layout: str, pred_ids: Sequence[int]
) -> list[Example]:
    """The chats' examples in one layout, with views of their own where they bring them."""
    return [
        chat_example(
            chat["messages"],
            tokenizer,
            layout=layout,
            pred_ids=pred_ids,
            text=chat.get("text"),
            code=chat.get("code"),
        )
        for chat in chats
    ]


def real_row(examples: Sequence[Example], count: int) -> PackedBatch:
    """One row of the first `count` examples, with shared prefixes."""
    if count > len(examples):
        raise ValueError(f"expected at least {count} examples, got {len(examples)}")
    return pack(examples[:count])


def filled_row(examples: Sequence[Example], tokens: int) -> PackedBatch:
    """The same of as many of the first examples as fit into so many tokens.

    `pack` would begin a row of several with the longest examples, which are not typical.
    """
    lengths = range(1, len(examples) + 1)
    fitting = bisect_right(lengths, tokens, key=lambda n: pack(examples[:n])["labels"].shape[1])
    return real_row(examples, max(fitting, 1))


@dataclass(frozen=True)
class Case:
    """Inputs of attention over one row."""

    name: str
    seq: int
    mean_length: float
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    examples: int = 0  # real ones in the row, instead of random ones
    data: Path | None = None  # where they are from; None: the built-in grammar
    row: PackedBatch | None = None

    @cached_property
    def visible_until(self) -> Tensor:
        row = self.row or random_row(self.seq, self.mean_length)
        return row["visible_until"].to(self.device)

    @cached_property
    def block_mask(self) -> BlockMask:
        return BlockMask.from_visible_until(self.visible_until)

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, stored as (batch, seq, heads, head_dim), as in a model."""
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int) -> Tensor:
            shape = (1, self.visible_until.shape[1], heads, self.head_dim)
            x = torch.randn(shape, generator=generator).to(self.device, self.dtype)
            return x.transpose(1, 2).requires_grad_()

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs, the measure of the work that is needed."""
        index = torch.arange(self.visible_until.shape[1], device=self.visible_until.device)
        return int((self.visible_until - index).sum())

    @property
    def flops(self) -> tuple[int, int]:
        """Forward and backward over visible pairs: two matrix products, and five."""
        forward = 4 * self.pairs * self.heads * self.head_dim
        return forward, forward * 5 // 2


def runs(visible_until: Tensor) -> list[tuple[int, int, Tensor]]:
    """A row as (start, end, indices of the keys before it that it sees).

    In a run every token sees the one before it, hence all before it in the run, and all tokens of
    a run see the same keys before it: what variable-length attention calls a document.

    Args:
        visible_until: (seq,), on the CPU.
    """
    seq = len(visible_until)
    index = torch.arange(1, seq)
    starts = [0, *index[visible_until[:-1] <= index].tolist(), seq]
    return [
        (start, end, (visible_until[:start] > start).nonzero().flatten())
        for start, end in pairwise(starts)
    ]
