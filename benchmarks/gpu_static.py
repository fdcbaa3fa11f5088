"""What the compiled GPU kernels promise, read from their machine code; needs no GPU.

    python -m benchmarks.gpu_static                       # the table of every shipped configuration
    python -m benchmarks.gpu_static --arch sm_90 --head-dim 64 128

Kernels are compiled ahead of time through the package's own launchers, on meta tensors, so that
what is examined is what a GPU would be given.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import sass
from llmjepa_kernels.ops.block_mask import BlockMask
from llmjepa_kernels.ops.common import AttentionOptions
from llmjepa_kernels.ops.triton import attention as attention_triton
from llmjepa_kernels.ops.triton import configs as triton_configs
from llmjepa_kernels.ops.triton import loss as loss_triton
from llmjepa_kernels.ops.triton import tubes as tubes_triton
from llmjepa_kernels.ops.triton.configs import Config

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
MODELLED = ("sm_80", "sm_90", "sm_100")
HEAD_DIMS = (64, 80, 96, 128, 256)
MASK_BLOCKS = ((64, 64), (128, 64), (128, 128))
# Multiply-accumulates per visible score and head-dim column
PRODUCTS = {"forward": 2, "dkdv": 4, "dk": 3, "dv": 2, "dq": 3}
# Of FlexAttention's defaults, by the same model: (instructions per score, sim) of the forward on
# full tiles, sim on masked tiles, combined sim of the backward. sm_100: bound instead of sim; the
# backward there is torch 2.13's template in its default configuration, (dq, dkdv) by itself
# (.64, .43), (.64, .55) and (.33, .32) for the three head dims.
FLEX_ATTENTION = {
    ("sm_80", 64): (12.3, 0.62, 0.50, 0.39),
    ("sm_80", 128): (18.4, 0.63, 0.62, 0.41),
    ("sm_80", 256): (39.0, 0.36, None, 0.24),
    ("sm_90", 64): (9.2, 0.53, 0.30, 0.35),
    ("sm_90", 128): (14.0, 0.51, 0.41, 0.47),
    ("sm_90", 256): (29.0, 0.39, None, 0.26),
    ("sm_100", 64): (None, 0.26, None, 0.36),
    ("sm_100", 128): (None, 0.63, None, 0.42),
    ("sm_100", 256): (None, 0.33, None, 0.23),
}
LEGEND = """\
forward, masked, backward: sim (sm_100: bound) on full tiles, on masked ones, of both gradients
n      thread instructions per score, forward and each backward kernel
bound  fraction of the dense bf16 peak that no schedule of this loop can exceed
sim    the same from an in-order replay of the resident warps (sm_80, sm_90)
masked the same for the loop over partial tiles
The model sees neither the latency and bandwidth of L2 and HBM, nor bank conflicts, throttling,
prologue and epilogue, waves, or the imbalance of rows. On published kernels, the measured speed
was about 0.8 of sim; differences under 15 % mean nothing. No figure here was measured on a GPU."""


class _Absent:
    """Stands for the driver of a GPU that is not here."""

    def __init__(self, arch: str):
        backend, name, warp = ("hip", arch, 64) if arch[0] == "g" else ("cuda", int(arch[3:]), 32)
        self.target = GPUTarget(backend, name, warp)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # what compiled kernels are cached by

    def get_current_stream(self, device=None) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[list]:
    """Inside, a kernel launch compiles for `arch` and is appended to the list instead of run.

    The process cannot go back to a GPU of its own afterwards.
    """
    launched, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Absent(arch))
    try:
        yield launched
    finally:
        JITFunction.run = run


def meta_mask(batch: int, seq: int, block_size: tuple[int, int], window=None) -> BlockMask:
    """A mask of the right shapes; `seq` tokens see all before them."""
    blocks = [-(-seq // size) for size in block_size]

    def lists(count):
        return [
            torch.empty(batch, length, dtype=torch.int32, device="meta")
            for length in (count + 1, count, blocks[0] * blocks[1])
        ]

    visible_until = torch.empty(batch, seq, dtype=torch.int32, device="meta")
    return BlockMask(visible_until, block_size, *lists(blocks[0]), *lists(blocks[1]), window=window)


def run_attention(
    head_dim: int, dtype: torch.dtype, mask: BlockMask, *, sinks=False, softcap=None, window=None
) -> None:
    """Launches every attention kernel on meta tensors, laid out as in a model."""
    batch, seq = mask.visible_until.shape

    def tensor(heads):
        x = torch.empty(batch, seq, heads, head_dim, dtype=dtype, device="meta")
        return x.transpose(1, 2)

    q, k, v, dout = tensor(8), tensor(2), tensor(2), tensor(8)
    options = AttentionOptions(
        softmax_scale=head_dim**-0.5,
        position_ids=torch.empty(batch, seq, dtype=torch.int32, device="meta") if window else None,
        window=window,
        softcap=softcap,
        sinks=torch.empty(8, dtype=dtype, device="meta") if sinks else None,
    )
    out, lse = attention_triton.attention_forward(q, k, v, mask, options)
    attention_triton.attention_backward(dout, q, k, v, out, lse, mask, options)


def run_loss(hidden_size: int, dtype: torch.dtype, metric: str, num_pairs: int = 20) -> None:
    """Launches the kernels of a metric, forward and backward, on meta tensors."""
    hidden = torch.empty(2, 300, hidden_size, dtype=dtype, device="meta")
    pairs = torch.empty(2, num_pairs, 2, dtype=torch.int64, device="meta")
    if metric == "infonce":
        views, squares = loss_triton.views_forward(hidden, pairs)
        loss_triton.views_backward(views, hidden, pairs, views, squares)
        return
    loss, stats = loss_triton.distance_forward(hidden, pairs, metric=metric, reduction="none")
    loss_triton.distance_backward(loss, hidden, pairs, stats, metric=metric)


def run_tubes(hidden_size: int, dtype: torch.dtype, num_tubes: int = 20) -> None:
    """Launches every kernel of the tubes on meta tensors."""
    hidden = torch.empty(2, 300, hidden_size, dtype=dtype, device="meta")
    tubes = torch.empty(2, num_tubes, 2, 3, 2, dtype=torch.int64, device="meta")
    vectors = tubes_triton.tubes_forward(hidden, tubes)
    tubes_triton.tubes_backward(vectors, tubes, hidden.shape[1], dtype)


def shipped(arch: str, head_dim: int) -> list[tuple[str, Config, tuple[int, int]]]:
    """(direction, configuration, smallest usual mask block that it divides), each once."""
    found = {}
    directions = triton_configs.directions(arch, head_dim, torch.bfloat16)
    for direction, block_size in itertools.product(directions, MASK_BLOCKS):
        kind = {"arch": arch, "head_dim": head_dim, "dtype": torch.bfloat16}
        for config in triton_configs.candidates(direction, block_size=block_size, **kind):
            found.setdefault((direction, config), block_size)
    return [(direction, config, block_size) for (direction, config), block_size in found.items()]


def examine(job: tuple[str, int, str, Config, tuple[int, int], bool]) -> dict:
    """Compiles one configuration and reads its machine code."""
    arch, head_dim, direction, config, block_size, sim = job
    launch = triton_configs.launch
    with compiling_for(arch) as launched:
        # Only this direction, in this configuration
        triton_configs.launch = lambda name, run, **_: run(config) if name == direction else None
        try:
            run_attention(head_dim, torch.bfloat16, meta_mask(2, 1024, block_size))
        finally:
            triton_configs.launch = launch
    (kernel,) = (kernel for name, kernel in launched if "row_statistics" not in name)
    return {
        "arch": arch,
        "head_dim": head_dim,
        "direction": direction,
        "config": asdict(config),
        "block_size": block_size,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        **_figures(kernel, arch, head_dim, direction, config, sim),
    }


def resources(kernel, arch: str) -> dict[str, int]:
    """Registers of a thread, bytes of shared memory and spills of any kernel."""
    if arch.startswith("gfx"):

        def count(field):
            return int(re.search(rf"\.{field}:\s+(\d+)", kernel.asm["amdgcn"])[1])

        return {
            "registers": count("vgpr_count"),
            "shared": kernel.metadata.shared,
            "spills": count("vgpr_spill_count"),
        }
    analysis = sass.analyze(kernel, sim=False)
    return {
        "registers": analysis.registers,
        "shared": analysis.shared_bytes,
        "spills": analysis.spills,
    }


def _figures(kernel, arch: str, head_dim: int, direction: str, config: Config, sim: bool) -> dict:
    if arch.startswith("gfx"):
        mma = sorted(set(re.findall(r"v_mfma_\w+", kernel.asm["amdgcn"])))
        return {**resources(kernel, arch), "mma": mma, "loops": []}
    analysis = sass.analyze(kernel, sim=sim and arch in MODELLED)
    scores = config.block_m * config.block_n
    loops = []
    for loop in analysis.loops:
        useful = scores * PRODUCTS[direction] * head_dim
        loops.append(
            {
                "n": loop.instructions * analysis.warps * 32 / scores,
                "issued_macs": loop.macs,
                "useful_macs": useful,
                "spills": loop.spills,
                "bound": loop.bound * useful / loop.macs,
                "sim": None if loop.sim is None else loop.sim * useful / loop.macs,
                "limiter": loop.limiter,
            }
        )
    return {
        "registers": analysis.registers,
        "shared": analysis.shared_bytes,
        "ctas": analysis.ctas,
        "spills": analysis.spills,
        "mma": sorted({name for loop in analysis.loops for name in loop.mma}),
        "loops": loops,
    }


def examine_all(
    archs=ARCHS, head_dims=HEAD_DIMS, *, sim: bool = True, processes: int = 2
) -> list[dict]:
    """Records of every shipped configuration."""
    jobs = [
        (arch, head_dim, *entry, sim)
        for arch, head_dim in itertools.product(archs, head_dims)
        for entry in shipped(arch, head_dim)
    ]
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        return list(pool.map(examine, jobs))


def combined_backward(records: list[dict]) -> float:
    """The five necessary products over the time of all kernels, each at its own speed."""
    speed = "sim" if records[0]["loops"][-1]["sim"] is not None else "bound"
    return 5 / sum(PRODUCTS[r["direction"]] / r["loops"][-1][speed] for r in records)


def _describe(config: dict) -> str:
    words = [f"{config['block_m']}x{config['block_n']} w{config['num_warps']}"]
    words.append(f"s{config['num_stages']}")
    words += [name for name in ("tma", "eager_dp") if config[name]]
    words += [f"pieces {config['pieces']}"] if config["pieces"] > 1 else []
    words += [f"r{config['maxnreg']}"] if config["maxnreg"] else []
    return " ".join(words)


def _table(records: list[dict]) -> Iterator[str]:
    head = ["arch", "D", "direction", "configuration", "regs", "smem", "CTAs"]
    head += ["n", "bound", "sim", "masked n", "masked", "limiter"]
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for r in records:
        cells = [r["arch"], r["head_dim"], r["direction"], _describe(r["config"])]
        cells += [r["registers"], r["shared"], r.get("ctas", "")]
        if r["loops"]:
            masked, full = r["loops"][0], r["loops"][-1]
            speed = masked["bound"] if masked["sim"] is None else masked["sim"]
            sim = "" if full["sim"] is None else f"{full['sim']:.2f}"
            cells += [f"{full['n']:.1f}", f"{full['bound']:.2f}", sim]
            cells += [f"{masked['n']:.1f}", f"{speed:.2f}", full["limiter"]]
        else:
            cells += [""] * 6
        yield "| " + " | ".join(map(str, cells)) + " |"


def _against_flex_attention(records: list[dict]) -> Iterator[str]:
    """What runs under masks of large and of small blocks, beside FlexAttention's default."""
    head = ["arch", "D", "mask block", "forward n", "forward", "masked", "backward"]
    yield "| " + " | ".join(head + [f"Flex: {x}" for x in head[3:]]) + " |"
    yield "|" + "---|" * 11
    by_config = {}
    for r in records:
        key = (r["arch"], r["head_dim"], r["direction"], Config(**r["config"]))
        by_config[key] = r
    for ((arch, head_dim), flex), block_size in itertools.product(
        FLEX_ATTENTION.items(), (MASK_BLOCKS[-1], MASK_BLOCKS[0])
    ):
        kind = {"arch": arch, "head_dim": head_dim, "dtype": torch.bfloat16}
        chosen = [
            (direction, triton_configs.candidates(direction, block_size=block_size, **kind)[0])
            for direction in triton_configs.directions(**kind)
        ]
        keys = [(arch, head_dim, *choice) for choice in chosen]
        if keys[0] not in by_config:  # left out on the command line
            continue
        forward, *backward = (by_config[key] for key in keys)
        masked, full = forward["loops"][0], forward["loops"][-1]
        speed = "bound" if full["sim"] is None else "sim"
        ours = (full["n"], full[speed], masked[speed], combined_backward(backward))
        figures = [
            "" if x is None else f"{x:.{1 if i == 0 else 2}f}"
            for numbers in (ours, flex)
            for i, x in enumerate(numbers)
        ]
        block = "x".join(map(str, block_size))
        yield "| " + " | ".join([arch, str(head_dim), block, *figures]) + " |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-sim", action="store_true", help="skip the replay, the slowest part")
    parser.add_argument("--json", action="store_true", help="print the records instead of tables")
    options = parser.parse_args(argv)
    records = examine_all(
        options.arch, options.head_dim, sim=not options.no_sim, processes=options.processes
    )
    if options.json:
        json.dump(records, sys.stdout, indent=1)
        return
    print(*_table(records), "", *_against_flex_attention(records), "", LEGEND, sep="\n")


if __name__ == "__main__":
    main()
