"""The CPU kernels against SDPA, the matrix product and plain PyTorch.

    python -m benchmarks.cpu_speed

Ours and all outputs are verified against float64 before anything is timed. A ratio says how many
times faster ours is, the median over the rounds; of the matrix product it is our FLOP/s over its,
of medians, where attention counts 4 · visible pairs · head dim forward and 3.5 times that with the
backward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from benchmarks import peers
from benchmarks.report import Table, progress, show
from benchmarks.timing import PeakMemory, interleaved, ratio
from benchmarks.workload import Case, filled_row, load_examples
from llmjepa_kernels import PackedBatch, last_token_loss, view_attention
from llmjepa_kernels.ops import cpu
from llmjepa_kernels.ops.reference import distance_backward

COLUMNS = (
    ("work", "work", "{}"),
    ("threads", "threads", "{}"),
    ("against", "against", "{}"),
    ("forward", "forward", "{:.2f}x"),
    ("both", "+ backward", "{:.2f}x"),
    ("ms_forward", "ms", "{:.2f}"),
    ("ms_both", "+ backward", "{:.2f}"),
)
MATMUL = 1024


def causal_rows(head_dim: int, dtype: torch.dtype, rounds: int) -> list[dict]:
    """One causal segment, against SDPA's own causal kernel and the matrix product."""
    shape = {"heads": 4, "kv_heads": 4, "head_dim": head_dim}
    case = Case("", 2048, 0, dtype=dtype, row=one_segment(2048), **shape)
    a, b = torch.randn(2, MATMUL, MATMUL, dtype=dtype)
    functions = {
        "ours": peers.ours(case),
        "SDPA is_causal": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    times = time_attention(case, functions, rounds, {"matmul": lambda: a @ b})
    name = f"one segment of {case.seq}, head dim {head_dim}, {str(dtype).removeprefix('torch.')}"
    matmul_rate = 2 * MATMUL**3 / median(times["matmul"])
    forward, backward = case.flops
    of_matmul = {
        "work": name,
        "against": f"torch matmul {MATMUL}³",
        "forward": forward / median(times["ours"]) / matmul_rate,
        "both": (forward + backward) / median(times["ours both"]) / matmul_rate,
    }
    return [compared(name, "SDPA is_causal", times), {**of_matmul, **milliseconds(times)}]


def packed_rows(row: PackedBatch, rounds: int) -> list[dict]:
    """A packed row of real examples, in the head shape of SmolLM2-135M."""
    case = Case("", row["visible_until"].shape[1], 0, row=row)
    functions = {"ours": peers.ours(case)}
    others = {"SDPA dense mask": peers.sdpa_dense_mask, "SDPA per segment": peers.sdpa_per_run}
    for other, make in others.items():
        try:
            functions[other] = make(case)
        except peers.UnavailableError as reason:
            progress(f"{other} is left out: {reason}")
    times = time_attention(case, functions, rounds)
    name = f"packed row of {case.seq}, heads 9/3"
    return [compared(name, other, times) for other in list(functions)[1:]]


def loss_rows(rounds: int) -> list[dict]:
    """The fused loss against indexing and cosine_similarity; its forward kernel also alone."""
    hidden = torch.randn(1, 4096, 576, requires_grad=True)
    pairs = torch.randperm(4096)[:128].view(1, 64, 2)

    def plain(hidden: Tensor) -> Tensor:
        x, y = hidden[0, pairs[0, :, 0]], hidden[0, pairs[0, :, 1]]
        return (1 - cosine_similarity(x, y, dim=-1)).mean()

    functions = {"ours": lambda hidden: last_token_loss(hidden, pairs), "plain PyTorch": plain}
    exact = hidden.detach().double()
    expected = plain(exact)
    stats = torch.stack(
        [(exact[0, pairs[0, :, i]] * exact[0, pairs[0, :, j]]).sum(-1) for i, j in COSINE_STATS], -1
    )
    weight = torch.full((1, 64), 1 / 64, dtype=torch.float64)
    gradient = distance_backward(weight, exact, pairs, stats[None], metric="cosine")
    for function in functions.values():
        loss = function(hidden)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        (dhidden,) = torch.autograd.grad(loss, hidden)
        torch.testing.assert_close(dhidden.double(), gradient, rtol=1e-4, atol=1e-7)

    steps = {}
    for name, function in functions.items():
        steps[name] = without_gradients(function, hidden)
        steps[f"{name} both"] = lambda function=function: torch.autograd.grad(
            function(hidden), hidden
        )
    steps["kernel"] = lambda: cpu.distance_forward(hidden, pairs, metric="cosine", reduction="mean")
    times = interleaved(steps, rounds=20 * rounds)
    name = "loss, 4096 x 576, 64 pairs"
    kernel = {
        "work": f"{name}: kernel alone",
        "threads": torch.get_num_threads(),
        "against": "plain PyTorch",
        "forward": ratio(times["plain PyTorch"], times["kernel"]),
        "ms_forward": 1e3 * median(times["kernel"]),
    }
    return [compared(name, "plain PyTorch", times), kernel]


COSINE_STATS = ((0, 1), (0, 0), (1, 1))


def memory_notes(tokens: int, segment: int) -> list[str]:
    """Peak memory beyond inputs, outputs and gradients on long rows."""
    notes = []
    for name, case in {
        f"packed, segments of {segment}": Case("", tokens, segment),
        "one segment": Case("", tokens, 0, row=one_segment(tokens)),
    }.items():
        inputs = case.tensors
        mask = case.block_mask
        # A small call first, for what is allocated once per process.
        small = Case("", 256, 16)
        peers.verify(small, peers.ours(small), backward=True)
        with PeakMemory() as peak:
            out = view_attention(*inputs, case.visible_until, block_mask=mask)
            gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
        if peak.bytes is None:
            return ["extra peak memory cannot be read on this system"]
        # lse is one more output; the gradient of out an input of the backward pass.
        kept = [out, out, *gradients, out[..., 0]]
        extra = peak.bytes - sum(x.numel() * x.element_size() for x in kept)
        notes.append(f"extra peak memory at {tokens} tokens, {name}: {extra / 2**20:.1f} MiB")
    return notes


def time_attention(
    case: Case,
    functions: dict[str, peers.Attention],
    rounds: int,
    others: dict[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each function, and under "… both" those with the backward pass."""
    dout = torch.randn_like(case.tensors[0])
    steps = dict(others or {})
    for name, attend in functions.items():
        # SDPA's own gradients miss the bound where a query sees a single key: theirs is not 0.
        peers.verify(case, attend, backward=name == "ours")
        steps[name] = without_gradients(attend, *case.tensors)
        steps[f"{name} both"] = lambda attend=attend: torch.autograd.grad(
            attend(*case.tensors), case.tensors, dout
        )
    for step in steps.values():
        step()
    return interleaved(steps, rounds=rounds)


def without_gradients(function: Callable, *inputs: Tensor) -> Callable[[], object]:
    def step() -> None:
        with torch.no_grad():
            function(*inputs)

    return step


def compared(work: str, against: str, times: dict[str, list[float]]) -> dict:
    return {
        "work": work,
        "against": against,
        "forward": ratio(times[against], times["ours"]),
        "both": ratio(times[f"{against} both"], times["ours both"]),
        **milliseconds(times),
    }


def milliseconds(times: dict[str, list[float]]) -> dict:
    ours, both = (1e3 * median(times[name]) for name in ("ours", "ours both"))
    return {"ms_forward": ours, "ms_both": both, "threads": torch.get_num_threads()}


def one_segment(seq: int) -> PackedBatch:
    return PackedBatch(visible_until=torch.full((1, seq), seq, dtype=torch.int32))


@contextmanager
def num_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_speed", description=__doc__)
    parser.add_argument("--data", type=Path, help="JSONL of chats; default: the built-in grammar")
    parser.add_argument("--tokenizer", help="of --data; default: one trained on it")
    parser.add_argument("--tokens", type=int, default=4096, help="of the packed row")
    parser.add_argument("--threads", type=int, default=2, help="for the packed row and the loss")
    parser.add_argument("--memory-tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/cpu_speed.json"))
    args = parser.parse_args(argv)

    table = Table("CPU kernels: how many times faster", COLUMNS)
    with num_threads(1):
        for dtype in (torch.float32, torch.bfloat16):
            for head_dim in (64, 128):
                table.rows += causal_rows(head_dim, dtype, args.rounds)
    examples = load_examples(args.data, args.tokenizer, 200)
    row = filled_row(examples, args.tokens)
    with num_threads(args.threads):
        table.rows += packed_rows(row, args.rounds)
        table.rows += loss_rows(args.rounds)
        table.notes += memory_notes(args.memory_tokens, 64)
    table.notes.append(f"instruction sets: {', '.join(cpu.isas())}; the first runs")
    show([table], args.output, "cpu", vars(args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
