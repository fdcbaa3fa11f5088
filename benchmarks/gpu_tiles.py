"""Which tiles the attention of real rows visits on a GPU, and which mask block suits them.

    python -m benchmarks.gpu_tiles --data chats.jsonl --tokenizer NAME --head-dim 64

For each mask block: the tiles visited, the least that this grid allows (tiles that hold a visible
pair, counted pair by pair), and the time of attention by the static model of gpu_static, forward
and backward, in the whole step. `pack` takes the block marked *. Needs no GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

# Before anything that imports triton: it takes kernels out of Triton's interpreter.
from benchmarks.gpu_static import ARCHS, MASK_BLOCKS, MODELLED, PRODUCTS, examine  # isort: skip

import torch

from benchmarks.workload import load_examples
from llmjepa_kernels import BlockMask, pack
from llmjepa_kernels.ops.block_mask import choose_block_size
from llmjepa_kernels.ops.dense import visible
from llmjepa_kernels.ops.triton import configs as triton_configs

ASSUMPTIONS = """\
partial, full   visited tiles; minimum: those with at least one visible pair
used            visible pairs among the pairs of visited tiles
tile            modelled time of a partial and of a full one, relative to a full one of 64 x 64
attention       modelled attention of one layer, forward and backward, relative to the best block
share           of attention in a layer of {hidden} hidden units and {heads} heads: 12 hidden^2
                multiply-accumulates per token in its matrices, three times for the two passes,
                at {efficiency:.0%} of the peak; attention at the model's speed, embeddings left out
These are figures of a static model; nothing here was measured on a GPU."""


@dataclass
class Tiles:
    partial: int
    full: int
    minimum: int
    visible_pairs: int

    @classmethod
    def count(cls, visible_until: torch.Tensor, block_size: tuple[int, int]) -> Tiles:
        """Of all rows together; pair by pair beside the schedule's own lists."""
        mask = BlockMask.from_visible_until(visible_until, block_size)
        minimum = pairs = 0
        for row in visible_until:
            seen = visible(row[None])[0]
            pairs += int(seen.sum())
            rows, columns = (-(-len(row) // size) * size for size in block_size)
            grid = seen.new_zeros(rows, columns)
            grid[: len(row), : len(row)] = seen
            tiles = grid.unfold(0, block_size[0], block_size[0]).unfold(
                1, block_size[1], block_size[1]
            )
            minimum += int(tiles.flatten(2).any(-1).sum())
        full = mask.num_full_tiles
        return cls(mask.num_tiles - full, full, minimum, pairs)


def speeds(arch: str, head_dim: int, block_size: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """{direction: fraction of the peak on (partial, full) tiles} of what would run."""
    result = {}
    kind = {"arch": arch, "head_dim": head_dim, "dtype": torch.bfloat16}
    for direction in triton_configs.directions(**kind):
        config = triton_configs.candidates(direction, block_size=block_size, **kind)[0]
        loops = examine((arch, head_dim, direction, config, block_size, True))["loops"]
        masked, full = (
            loop["bound"] if loop["sim"] is None else loop["sim"] for loop in (loops[0], loops[-1])
        )
        result[direction] = masked, full
    return result


def tile_macs(
    block_size: tuple[int, int], head_dim: int, speed: dict[str, tuple[float, float]]
) -> tuple[float, float]:
    """What the chip could multiply at its peak in the modelled time of a (partial, full) tile."""
    macs = block_size[0] * block_size[1] * head_dim
    return tuple(
        sum(macs * PRODUCTS[direction] / loops[i] for direction, loops in speed.items())
        for i in (0, 1)
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, nargs="*", default=[None], help="JSONL files of chats")
    parser.add_argument("--tokenizer", help="name or directory; default: trained on the chats")
    parser.add_argument("--count", type=int, default=200, help="chats of each file")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--arch", default="sm_90", choices=[x for x in ARCHS if x in MODELLED])
    parser.add_argument("--head-dim", type=int, default=64, choices=(64, 128, 256))
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--linear-efficiency", type=float, default=0.7)
    options = parser.parse_args(argv)
    heads = options.hidden_size // options.head_dim
    capability = divmod(int(options.arch.removeprefix("sm_")), 10)

    tile = {
        block: tile_macs(block, options.head_dim, speeds(options.arch, options.head_dim, block))
        for block in MASK_BLOCKS
    }
    for block, (partial, full) in tile.items():
        unit = tile[64, 64][1]
        print(f"tile {block[0]}x{block[1]}: {partial / unit:.2f} partial, {full / unit:.2f} full")
    print()
    head = ["data", "rows", "block", "partial", "full", "minimum", "used", "attention", "share"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for path in options.data:
        examples = load_examples(path, options.tokenizer, options.count)
        visible_until = pack(examples, options.max_length)["visible_until"]
        tokens = visible_until.numel()
        counted = {block: Tiles.count(visible_until, block) for block in MASK_BLOCKS}
        cost = {
            block: tiles.partial * tile[block][0] + tiles.full * tile[block][1]
            for block, tiles in counted.items()
        }
        chosen = (choose_block_size(visible_until, capability),) * 2
        for block, tiles in counted.items():
            attention = heads * cost[block]
            linear = tokens * 3 * 12 * options.hidden_size**2 / options.linear_efficiency
            used = tiles.visible_pairs / ((tiles.partial + tiles.full) * block[0] * block[1])
            cells = [path.name if path else "built-in grammar", len(visible_until)]
            cells += [
                "x".join(map(str, block)) + "*" * (block == chosen),
                tiles.partial,
                tiles.full,
                tiles.minimum,
            ]
            cells += [f"{used:.1%}", f"{cost[block] / min(cost.values()):.2f}"]
            cells += [f"{attention / (attention + linear):.1%}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print()
    print(
        ASSUMPTIONS.format(
            hidden=options.hidden_size, heads=heads, efficiency=options.linear_efficiency
        )
    )


if __name__ == "__main__":
    main()
