"""Times many configurations of every attention kernel on the GPU at hand, each alone.

    python -m benchmarks.gpu_configs --output DIR --head-dim 64 128

The static model of gpu_static proposes; this decides what comes first in the table of
`llmjepa_kernels.ops.triton.configs`. Every result is compared with that of the shipped
configuration, and what the device has no room for is left out. Compiles in processes of its own,
as many as there are cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gpu_parts import real_row
from benchmarks.report import free_name, progress
from benchmarks.timing import device_seconds
from benchmarks.workload import Case
from llmjepa_kernels import BlockMask
from llmjepa_kernels.ops.common import AttentionOptions
from llmjepa_kernels.ops.triton import attention, configs
from llmjepa_kernels.ops.triton.configs import Config

MAX_ERROR = 2e-2  # against the shipped configuration, as a fraction of its norm


def cases(head_dim: int) -> dict[str, Case]:
    """In the head shapes of Llama 1B and 8B and of Gemma."""
    heads, kv_heads = (8, 4) if head_dim == 256 else (32, 8)
    base = Case("", 8192, 512, heads, kv_heads, head_dim, torch.bfloat16, "cuda")
    return {"512": base, "NL-RX": replace(base, row=real_row(8192))}


def grid(direction: str, head_dim: int, mask_block: int) -> Iterator[Config]:
    """All that might be fast, the shipped ones first."""
    kind = {"arch": configs.current_arch(), "head_dim": head_dim, "dtype": torch.bfloat16}
    shipped = configs.candidates(direction, block_size=(mask_block, mask_block), **kind)
    yield from shipped
    sides = [side for side in (32, 64, 128) if side <= mask_block]
    eager = (False,) if direction in ("forward", "dv") else (False, True)
    for m, n, warps, stages, tma, early in itertools.product(
        sides, sides, (4, 8), (1, 2, 3), (True, False), eager
    ):
        config = Config(m, n, warps, stages, tma, eager_dp=early)
        outer, inner = (n, m) if direction in ("dkdv", "dk", "dv") else (m, n)
        shared = head_dim * 2 * (stages * 2 * inner + outer * (1 if direction == "forward" else 2))
        if (
            config not in shipped
            and outer >= 16 * warps  # a warpgroup multiplies 64 rows
            and shared <= 227 << 10
            and m * n >= 2048
            and not (warps == 8 and m * n < 8192)
            and not (stages == 1 and inner < 128)
            and not (early and not tma)
            and not (stages == 3 and not tma and inner > 64)
        ):
            yield config


@cache
def prepared(
    head_dim: int, name: str, mask_block: int
) -> tuple[dict[str, Callable[[Config], None]], dict[str, list[Tensor]]]:
    """{direction: what runs it in a configuration}, {direction: where its results are}."""
    case = cases(head_dim)[name]
    q, k, v = (x.detach() for x in case.tensors)
    mask = BlockMask.from_visible_until(case.visible_until, (mask_block, mask_block))
    options = AttentionOptions(softmax_scale=head_dim**-0.5)
    runs: dict[str, Callable[[Config], None]] = {}
    out, lse = attention.attention_forward(q, k, v, mask, options)
    gradients = attention.attention_backward(torch.ones_like(out), q, k, v, out, lse, mask, options)
    del gradients
    launch = configs.launch
    configs.launch = lambda direction, run, **_: runs.update({direction: run})
    try:
        again, _ = attention.attention_forward(q, k, v, mask, options)
        dout = torch.randn_like(out)
        dq, dk, dv, _ = attention.attention_backward(dout, q, k, v, out, lse, mask, options)
    finally:
        configs.launch = launch
    results = {"forward": [again], "dkdv": [dk, dv], "dk": [dk], "dv": [dv], "dq": [dq]}
    return runs, results


Job = tuple[int, str, int, str, Config]


def compile_one(job: Job) -> str | None:
    """Compiles into the cache that processes share; returns what went wrong."""
    head_dim, name, mask_block, direction, config = job
    try:
        prepared(head_dim, name, mask_block)[0][direction](config)
        torch.cuda.synchronize()
    except OutOfResources as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


def measure(job: Job) -> dict:
    """Milliseconds of one configuration, and how far its results are from the shipped one's."""
    head_dim, name, mask_block, direction, config = job
    runs, results = prepared(head_dim, name, mask_block)
    expected = _expected(head_dim, name, mask_block, direction)
    for x in results[direction]:
        x.fill_(torch.nan)
    runs[direction](config)
    error = max(
        ((x.float() - y).norm() / y.norm()).item()
        for x, y in zip(results[direction], expected, strict=True)
    )
    seconds = device_seconds(lambda: runs[direction](config), "cuda", budget=0.01)
    return {"milliseconds": 1e3 * seconds, "error": error, "wrong": not error <= MAX_ERROR}


@cache
def _expected(head_dim: int, name: str, mask_block: int, direction: str) -> list[Tensor]:
    runs, results = prepared(head_dim, name, mask_block)
    runs[direction](next(grid(direction, head_dim, mask_block)))
    return [x.float() for x in results[direction]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/gpu_configs"))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--mask-block", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    path = free_name(options.output / "gpu_configs.jsonl")

    def jobs(names: Sequence[str]) -> list[Job]:
        return [
            (head_dim, name, mask_block, direction, config)
            for head_dim, name, mask_block in itertools.product(
                options.head_dim, names, options.mask_block
            )
            for direction in configs.directions(configs.current_arch(), head_dim, torch.bfloat16)
            for config in grid(direction, head_dim, mask_block)
        ]

    context = multiprocessing.get_context("spawn")
    failed = {}
    # What is compiled for one row serves all.
    to_compile = jobs(["512"])
    with concurrent.futures.ProcessPoolExecutor(options.processes, context) as pool:
        compiled = [(job, pool.submit(compile_one, job)) for job in to_compile]
        for job, found in compiled:
            try:
                reason = found.result()
            except concurrent.futures.BrokenExecutor as error:  # a compiler has crashed
                reason = f"{type(error).__name__}: {error}"
            if reason is not None:
                failed[job[0], job[2:]] = reason
    progress(f"compiled {len(to_compile)}, of which {len(failed)} failed")
    rows = []
    with path.open("w", encoding="utf-8") as file:
        for job in jobs(["512", "NL-RX"]):
            head_dim, name, mask_block, direction, config = job
            row = {
                "head_dim": head_dim,
                "row": name,
                "mask_block": mask_block,
                "direction": direction,
                "config": asdict(config),
            }
            if reason := failed.get((head_dim, job[2:])):
                row["failed"] = reason
            else:
                try:
                    row |= measure(job)
                except Exception as error:  # of this configuration, or of the device from now on
                    row["failed"] = f"{type(error).__name__}: {error}"
                else:
                    rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    keys = ("head_dim", "row", "direction", "mask_block")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for key, group in sorted(groups.items(), key=str):
        shipped = group[0]
        right = sorted((r for r in group if not r["wrong"]), key=lambda r: r["milliseconds"])
        print(*key, f"shipped {shipped['milliseconds']:.3f} ms, {len(group) - len(right)} wrong")
        for row in right[:3]:
            print(f"    {row['milliseconds']:.3f} ms  {Config(**row['config'])}")


if __name__ == "__main__":
    main()
