"""What impl="flash" computes for a batch, beside the block-sparse kernel: counts, on any machine.

    python -m benchmarks.flash_calls
    python -m benchmarks.flash_calls --data chats.jsonl --tokenizer NAME

The area is that of the tiles of the score matrix which are computed, in parts of the visible pairs:
FLOPs are 4 * head_dim times that per head in the forward pass, and 10 in the backward pass.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.workload import load_examples, random_row
from llmjepa_kernels import BlockMask, FlashPlan, PackedBatch, pack

EXPLANATION = """\
calls      of flash-attn in the forward pass of a layer, and as many in the backward
sequences  in all of these calls
merged     queries of all calls but the first, whose results are merged, in parts of the tokens;
           with those that fill up the lists of rows that have fewer
Triton     area that the block-sparse kernel computes, in parts of the visible pairs
flash      the same of the calls
ratio      flash over Triton: the calls are the faster where flash-attn's kernels compute more than
           so many times as fast as Triton's, launches and merging aside
These are counts; nothing here was measured on a GPU."""


def cascade_area(plan: FlashPlan, tile: tuple[int, int]) -> int:
    """Score elements in the tiles that the kernels visit."""
    area = 0
    for number, call in enumerate(plan.calls):
        queries, keys = call.bounds.diff().transpose(0, 1).flatten(1).long()
        if number == 0:
            area += _causal_area(queries, keys, tile)
        else:
            blocks_q, blocks_k = _blocks(queries, tile[0]), _blocks(keys, tile[1])
            # The padding has a window of one token: the tiles on the diagonal.
            tiles = torch.maximum(blocks_q, blocks_k) if number == 1 else blocks_q * blocks_k
            area += int(tiles[(queries > 0) & (keys > 0)].sum()) * tile[0] * tile[1]
    return area


def _causal_area(queries: Tensor, keys: Tensor, tile: tuple[int, int]) -> int:
    tiles = 0
    for length in queries[(queries > 0) & (keys > 0)].tolist():
        last = torch.arange(tile[0], length + tile[0], tile[0]).clamp(max=length)
        tiles += int(_blocks(last, tile[1]).sum())
    return tiles * tile[0] * tile[1]


def _blocks(length: Tensor, size: int) -> Tensor:
    return (length + size - 1) // size


def row_of_counts(
    name: str, batch: PackedBatch, block: tuple[int, int], tile: tuple[int, int]
) -> list[str]:
    until = batch["visible_until"]
    plan = FlashPlan.from_visible_until(until)
    made = [plan.calls[0], *(call for call in plan.calls[1:] if call.slots.shape[1])]
    pairs = int((until - torch.arange(until.shape[1])).sum())
    triton = BlockMask.from_visible_until(until, block).num_tiles * block[0] * block[1]
    flash = cascade_area(plan, tile)
    return [
        name,
        f"{until.numel()}",
        f"{len(made)}",
        f"{sum(call.bounds[:, 0].numel() - len(until) for call in made)}",
        f"{sum(call.slots.numel() for call in made) / until.numel():.1%}",
        f"{triton / pairs:.2f}",
        f"{flash / pairs:.2f}",
        f"{flash / triton:.2f}",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    sizes = {"type": int, "nargs": 2, "metavar": ("M", "N")}
    parser.add_argument("--data", type=Path, nargs="*", help="JSONL files of chats, beside others")
    parser.add_argument("--tokenizer", help="name or directory; trained on the chats if not given")
    parser.add_argument("--count", type=int, default=200, help="chats of each file")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of their rows")
    parser.add_argument("--tokens", type=int, default=16384, help="of a random row")
    parser.add_argument("--block", default=(64, 64), **sizes, help="of the block-sparse kernel")
    parser.add_argument("--tile", default=(128, 128), **sizes, help="of flash-attn's kernels")
    options = parser.parse_args(argv)

    head = ["segments", "tokens", "calls", "sequences", "merged", "Triton", "flash", "ratio"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    batches = (
        (f"about {length} tokens", random_row(options.tokens, length))
        for length in (32, 64, 128, 256, 512, 1024, 2048, 4096)
        if 4 * length <= options.tokens
    )
    files = (
        (f"{path.name}, {how}", pack(examples, options.max_length, share_prefixes=sharing))
        for path in options.data or []
        for examples in [load_examples(path, options.tokenizer, options.count)]
        for how, sharing in (("prefixes shared", True), ("none shared", False))
    )
    for source in (batches, files):
        for name, batch in source:
            cells = row_of_counts(name, batch, tuple(options.block), tuple(options.tile))
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{EXPLANATION}")


if __name__ == "__main__":
    main()
