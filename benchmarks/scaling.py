"""How attention and its mask grow: with the row, with the segments, and against a machine's roof.

python -m benchmarks.scaling --plot
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

from benchmarks.peers import (
    MAX_FLEX_TOKENS,
    PEERS,
    UnavailableError,
    flex_block_mask,
    verify,
    verify_block_mask,
)
from benchmarks.report import Table, progress, show
from benchmarks.timing import copy_bandwidth, interleaved, matmul_rate, median_of
from benchmarks.workload import Case, random_row
from llmjepa_kernels import BlockMask

RUN, DENSE = "SDPA, per run", "SDPA, dense mask"

COLUMNS = (
    ("seq", "tokens", "{:d}"),
    ("mean_length", "segment", "{:d}"),
    ("tiles", "tiles", "{:d}"),
    ("pairs", "visible\npairs", "{:.3g}"),
    ("ours", "ours\nms", "{:.2f}"),
    ("predicted", "fit\nms", "{:.2f}"),
    ("gflops", "ours\nGFLOP/s", "{:.0f}"),
    ("roof_share", "of\nroof", "{:.0%}"),
    (RUN, "SDPA per\nrun ms", "{:.2f}"),
    (DENSE, "SDPA\ndense ms", "{:.2f}"),
)
MASK_COLUMNS = (
    ("seq", "tokens", "{:d}"),
    ("tiles", "tiles", "{:d}"),
    ("milliseconds", "BlockMask\nms", "{:.3f}"),
    ("mib", "MiB", "{:.3f}"),
    ("bytes_per_token", "bytes /\ntoken", "{:.1f}"),
    ("layer_share", "of a layer's\nattention", "{:.2%}"),
    ("flex_milliseconds", "create_block_\nmask ms", "{:,.0f}"),
    ("compiled_milliseconds", "compiled\nms", "{:,.1f}"),
    ("flex_mib", "MiB", "{:,.2f}"),
    ("times", "times as\nfast", "{:,.0f}"),
)


class Roof:
    """The least seconds that arithmetic and memory allow, both as measured here at their best."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.matmul = self.copy = 0.0
        self.measure()

    def measure(self) -> None:
        """Measures once more: what else runs on the machine may have slowed the last time."""
        self.matmul = max(self.matmul, matmul_rate(self.device, self.dtype))
        self.copy = max(self.copy, copy_bandwidth(self.device))

    def seconds(self, case: Case) -> float:
        """Forward and backward: each input and output, and their gradients, moved once."""
        q, k, v = case.tensors
        moved = sum(x.numel() * x.element_size() for x in (q, k, v, q))
        return max(sum(case.flops) / self.matmul, 3 * moved / self.copy)

    def __str__(self) -> str:
        return (
            f"roof: the {self.matmul / 1e9:,.0f} GFLOP/s of PyTorch's large matrix product, the "
            f"{self.copy / 1e9:,.0f} GB/s of its copy; FLOPs count visible pairs only"
        )


def attention_table(title: str, cases: Sequence[Case], rounds: int, roof: Roof) -> Table:
    """Forward and backward of each case, by us and by what else runs, verified and interleaved."""
    steps: dict[tuple[int, str], Callable[[], object]] = {}
    for index, case in enumerate(cases):
        for peer in ("ours", RUN, DENSE):
            try:
                attend = PEERS[peer](case)
                verify(case, attend, backward=True)
            except UnavailableError:
                continue
            steps[index, peer] = _forward_and_backward(case, attend)
        progress(f"{case.seq} tokens, segments of {case.mean_length}: verified")
    seconds = interleaved(steps, rounds=rounds, budget=5, device=cases[0].device, report=progress)
    roof.measure()

    table = Table(title, COLUMNS)
    for index, case in enumerate(cases):
        own = median(seconds[index, "ours"])
        row: dict[str, Any] = {
            "seq": case.seq,
            "mean_length": case.mean_length,
            "tiles": case.block_mask.num_tiles,
            "pairs": case.pairs,
            "gflops": sum(case.flops) / own / 1e9,
            "roof_share": roof.seconds(case) / own,
        }
        for peer in ("ours", RUN, DENSE):
            if (index, peer) in seconds:
                row[peer] = 1e3 * median(seconds[index, peer])
        table.rows.append(row)
    return table


def _forward_and_backward(case: Case, attend: Callable) -> Callable[[], object]:
    dout = torch.ones_like(case.tensors[0])
    return lambda: torch.autograd.grad(attend(*case.tensors), case.tensors, dout)


def fit_tiles(table: Table) -> None:
    """Adds the fit of the times to a constant, the tokens, and the tiles that are visited."""
    keys = ("seq", "tiles")
    varying = [key for key in keys if len({row[key] for row in table.rows}) > 1]
    if len(table.rows) <= 1 + len(varying):  # any line would do
        return
    x = np.array([[1.0, *(row[key] for key in varying)] for row in table.rows])
    y = np.array([row["ours"] for row in table.rows])
    # Relative errors count, so that small rows matter as much as large ones.
    coefficients = np.linalg.lstsq(x / y[:, None], np.ones(len(y)), rcond=None)[0]
    predicted = x @ coefficients
    for row, value in zip(table.rows, predicted.tolist(), strict=True):
        row["predicted"] = value
    terms = " + ".join(
        f"{1e3 * c:.3g} µs per {key.removesuffix('s').replace('seq', 'token')}"
        for key, c in zip(varying, coefficients[1:], strict=True)
    )
    error = np.abs(predicted / y - 1)
    table.notes.append(
        f"fit: {coefficients[0]:.3g} ms + {terms}; off by {error.mean():.0%} on average, "
        f"{error.max():.0%} at most"
    )


def exponent(table: Table, x: str, y: str) -> float:
    """The power of x with which y grows: the slope of the line through their logarithms."""
    points = [(row[x], row[y]) for row in table.rows if row.get(y)]
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0])


def mask_table(
    lengths: Sequence[int],
    mean_length: int,
    device: str,
    *,
    budget: float = 5,
    attention: Mapping[int, float] | None = None,
) -> Table:
    """Time and size of our mask, and of torch's where that is affordable.

    Args:
        budget: Seconds that torch may take for one mask, as estimated from a shorter row.
        attention: Milliseconds of attention of one layer, by tokens of the row.
    """
    table = Table(f"Block masks (blocks of 128, segments of {mean_length})", MASK_COLUMNS)
    flex = {"flex_milliseconds": 0.0, "compiled_milliseconds": 0.0}  # per pair, as last measured
    for seq in sorted(lengths):
        visible_until = random_row(seq, mean_length)["visible_until"].to(device)
        build = partial(BlockMask.from_visible_until, visible_until, (128, 128))
        mask = build()
        verify_block_mask(mask, visible_until)
        size = sum(t.numel() * t.element_size() for t in mask.schedule_tensors())
        size += visible_until.numel() * visible_until.element_size()
        milliseconds = 1e3 * median_of(build, device)
        row = {
            "seq": seq,
            "tiles": mask.num_tiles,
            "milliseconds": milliseconds,
            "mib": size / 2**20,
            "bytes_per_token": size / seq,
        }
        if attention and seq in attention:
            row["layer_share"] = milliseconds / attention[seq]
        for key, per_pair in flex.items():
            compiled = key == "compiled_milliseconds"
            if seq**2 * per_pair > 1e3 * budget or not (compiled or seq <= MAX_FLEX_TOKENS):
                continue
            make = flex_block_mask(visible_until, compiled=compiled)
            try:
                verify_block_mask(made := make(), visible_until)
                row["flex_mib"] = _size(made) / 2**20
                row[key] = 1e3 * median_of(make, device)
            except UnavailableError as error:
                table.notes.append(f"{seq} tokens: {error}")
                flex[key] = float("inf")
            else:
                flex[key] = row[key] / seq**2
        if took := [row[key] for key in flex if key in row]:
            row["times"] = min(took) / milliseconds
        table.rows.append(row)
        progress(f"masks of {seq} tokens")
    table.notes.append(
        "create_block_mask evaluates every pair: as it is up to "
        f"{MAX_FLEX_TOKENS} tokens, since it takes ten bytes a pair, and compiled while one takes "
        f"less than {budget:.0f} s (compilation not counted)."
    )
    for name, key in (("BlockMask", "milliseconds"), *(("create_block_mask", key) for key in flex)):
        if sum(key in row for row in table.rows) > 1:
            compiled = ", compiled," if key == "compiled_milliseconds" else ""
            power = exponent(table, "seq", key)
            table.notes.append(f"{name}{compiled} grows with tokens to the power {power:.2f}")
    return table


def _size(mask: FlexBlockMask) -> int:
    tensors = (x for x in vars(mask).values() if isinstance(x, torch.Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)


def plot(table: Table, roof: Roof, path: Path) -> None:
    """Throughput over visible pairs against segment length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for peer, color in (("ours", "#c44e52"), (RUN, "#4c72b0"), (DENSE, "#8c8c8c")):
        rows = [row for row in table.rows if peer in row]
        rates = [row["gflops"] * row["ours"] / row[peer] for row in rows]
        axis.loglog([row["mean_length"] for row in rows], rates, "o-", color=color, label=peer)
    axis.axhline(
        roof.matmul / 1e9, color="black", linestyle=":", linewidth=0.8, label="matrix product"
    )
    axis.set_xticks([row["mean_length"] for row in table.rows])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_title(table.title, fontsize=10, loc="left")
    axis.set_xlabel("mean segment length")
    axis.set_ylabel("GFLOP/s over visible pairs")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--segment", type=int, default=64, help="mean length, where it is fixed")
    parser.add_argument(
        "--tokens", type=int, default=65536 if gpu else 4096, help="of a row, where it is fixed"
    )
    rows = [2**n for n in (range(12, 19) if gpu else range(10, 17))]
    parser.add_argument("--rows", type=int, nargs="+", default=rows, help="tokens of a row")
    segments = [2**n for n in range(5, 14 if gpu else 12)]
    parser.add_argument("--segments", type=int, nargs="+", default=segments, help="mean lengths")
    masks = [2**n for n in range(10, 21, 2)]
    parser.add_argument("--masks", type=int, nargs="+", default=masks, help="tokens of a mask")
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], help="of q, and of k and v")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/scaling.json"))
    parser.add_argument("--plot", action="store_true", help="draw throughput beside the JSON")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    dtype = getattr(torch, args.dtype)

    def case(seq: int, mean_length: int) -> Case:
        return Case("", seq, mean_length, *args.heads, args.head_dim, dtype, args.device)

    segments = [n for n in args.segments if n <= args.tokens]
    if not segments:
        parser.error(f"--segments must have one of at most --tokens {args.tokens}")
    roof = Roof(args.device, dtype)
    by_row = attention_table(
        f"Attention, forward and backward, against the row (segments of {args.segment})",
        [case(seq, args.segment) for seq in args.rows],
        args.rounds,
        roof,
    )
    fit_tiles(by_row)
    if len({row["seq"] for row in by_row.rows}) > 1:
        by_row.notes.append(
            f"time grows with tokens to the power {exponent(by_row, 'seq', 'ours'):.2f}"
        )
    by_segment = attention_table(
        f"Attention, forward and backward, against the segments ({args.tokens} tokens)",
        [case(args.tokens, n) for n in segments],
        args.rounds,
        roof,
    )
    fit_tiles(by_segment)
    by_segment.notes.append(str(roof))
    attention = {row["seq"]: row["ours"] for row in by_row.rows}
    masks = mask_table(args.masks, args.segment, args.device, attention=attention)
    show([by_row, by_segment, masks], args.output, args.device, vars(args))
    if args.plot:
        plot(by_segment, roof, args.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
