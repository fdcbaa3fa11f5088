"""Attention over packed rows: forward, backward and both, against every peer that can run."""

from dataclasses import replace

import pytest
import torch

from benchmarks.peers import PEERS, UnavailableError, verify
from benchmarks.timing import synchronize
from benchmarks.workload import Case, name_of, real_row

BASE = Case("", seq=2048, mean_length=64)
FULL = Case("", seq=16384, mean_length=64)


def sweep(full):
    """Around one base case: segment length, row length, head dim, grouping, dtype."""
    base = FULL if full else BASE
    variations = [
        *({"mean_length": n} for n in ((32, 128, 512, 2048, 8192) if full else (32, 256, 1024))),
        *({"seq": 1024 * n} for n in ((1, 4, 16, 64) if full else (1, 2, 4))),
        *({"head_dim": n} for n in (128, 256)),
        *({"heads": h, "kv_heads": g} for h, g in ((8, 8), (8, 1))),
        {"dtype": torch.bfloat16},
        *([{"dtype": torch.float16}] if full else []),
    ]
    cases = []
    for changes in variations:
        case = replace(base, **changes)
        dtype = str(case.dtype).removeprefix("torch.")
        name = (
            f"N{case.seq}-segment{case.mean_length}-heads{case.heads}:{case.kv_heads}"
            f"-dim{case.head_dim}-{dtype}"
        )
        cases.append(replace(case, name=name))
    return cases


def pytest_generate_tests(metafunc):
    option = metafunc.config.option
    cases = sweep(option.full) + [
        replace(BASE, name=f"{name_of(data)}-{count}-examples", data=data, examples=count)
        for data in option.data or [None]
        for count in ((32, 256) if option.full else (32,))
    ]
    cases = [replace(case, device=option.device) for case in cases]
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("peer", PEERS)
def test_attention(benchmark, case, peer, direction, load, request):
    if case.examples:
        case = replace(case, row=real_row(load(case.data), case.examples))
    if peer == "FlexAttention" and case.device == "cpu":
        if direction != "forward":
            pytest.skip(f"{peer}: no backward on a CPU")
        if replace(case, name="") != BASE and not request.config.option.full:
            pytest.skip(f"{peer}: each shape compiles for ten seconds on a CPU, see --full")
    try:
        attend = PEERS[peer](case)
        verify(case, attend, backward=direction != "forward")
    except UnavailableError as reason:
        pytest.skip(f"{peer}: {reason}")

    dout = torch.ones_like(case.tensors[0])
    forward_flops, backward_flops = case.flops
    if direction == "forward":
        flops = forward_flops

        def run():
            with torch.no_grad():
                attend(*case.tensors)
            synchronize(case.device)

    elif direction == "backward":
        flops = backward_flops
        out = attend(*case.tensors)

        def run():
            torch.autograd.grad(out, case.tensors, dout, retain_graph=True)
            synchronize(case.device)

    else:
        flops = forward_flops + backward_flops

        def run():
            torch.autograd.grad(attend(*case.tensors), case.tensors, dout)
            synchronize(case.device)

    benchmark.group = f"attention {direction}: {case.name}"
    benchmark(run)
    if benchmark.stats:
        rate = flops / benchmark.stats.stats.median
        benchmark.extra_info["visible_pair_gflops_per_second"] = rate / 1e9
