"""Microseconds of Python that a call costs before anything runs; needs no GPU.

    python -m benchmarks.launch_cost
    python -m benchmarks.launch_cost --arch 80 --profile

The kernels are compiled and launched for real, on a CUDA driver that runs nothing, with one thread.
Beside it stands what torch needs for the smallest forward and backward of its own attention on a
CPU, which is hardly more than dispatch and autograd.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support import stub_gpu


def microseconds(
    runs: dict[str, Callable[[], object]], repeats: int = 25, rounds: int = 40
) -> dict[str, float]:
    """Of each, the mean of its best round: a busy machine adds little to that.

    Rounds take turns, and what counts is the time of this process alone.
    """
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            for _ in range(repeats):
                run()
            best[name] = min(best[name], (time.process_time() - start) / repeats * 1e6)
    return best


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, default=90, choices=stub_gpu.SHARED_BYTES)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--profile", action="store_true", help="where the time of attention goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stub_gpu.activate(stub_gpu.build(Path(folder)), options.arch)
        measure(options.head_dim, options.profile)


def measure(head_dim: int, profile: bool) -> None:
    """Attention of one row of 256 tokens with 9 heads, and the loss of 20 pairs."""
    import torch
    from torch.nn import functional

    from llmjepa_kernels import BlockMask, last_token_loss, view_attention

    torch.set_num_threads(1)

    def tensor(heads: int) -> torch.Tensor:
        x = torch.zeros(1, 256, heads, head_dim, dtype=torch.bfloat16).transpose(1, 2)
        return x.requires_grad_()

    q, k, v, dout = tensor(9), tensor(3), tensor(3), tensor(9).detach()
    visible_until = torch.full((1, 256), 256, dtype=torch.int32)
    mask = BlockMask.from_visible_until(visible_until, (64, 64))
    tiny = [torch.zeros(1, 1, 1, 8, requires_grad=True) for _ in range(3)]
    hidden = torch.zeros(1, 256, 64, requires_grad=True)
    pairs = torch.arange(40).view(1, 20, 2)

    def attend() -> torch.Tensor:
        return view_attention(q, k, v, visible_until, block_mask=mask, impl="triton")

    def attend_and_back() -> None:
        torch.autograd.grad(attend(), (q, k, v), dout)

    def attend_only() -> None:
        with torch.no_grad():
            attend()

    def loss_and_back() -> None:
        torch.autograd.grad(last_token_loss(hidden, pairs, impl="triton"), hidden)

    def sdpa() -> None:
        torch.autograd.grad(functional.scaled_dot_product_attention(*tiny), tiny, tiny[0].detach())

    attend_and_back()
    loss_and_back()
    costs = microseconds(
        {
            "scaled_dot_product_attention, tiny, CPU, forward + backward": sdpa,
            "view_attention, forward": attend_only,
            "view_attention, forward + backward": attend_and_back,
            "last_token_loss, forward + backward": loss_and_back,
        }
    )
    baseline = next(iter(costs.values()))
    print(f"torch {torch.__version__}, one thread, microseconds of the processor")
    for name, cost in costs.items():
        print(f"{name:60} {cost:6.0f}  {cost / baseline:4.1f} x")
    if profile:
        with cProfile.Profile(time.process_time) as profiler:
            for _ in range(300):
                attend_and_back()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
