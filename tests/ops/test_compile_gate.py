"""Every kernel configuration that ships, compiled ahead of time for GPUs that are not here."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MATRIX_INSTRUCTION = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma",
}
SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
MAX_REGISTERS = {"gfx942": 512}


def python(arguments, cache, timeout):
    """Runs Python with a compiler where this process may have Triton's interpreter."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    return python(["-m", "benchmarks.gpu_static", "--json", "--no-sim"], cache, timeout=600)


def name(record):
    config = " ".join(f"{key}={x}" for key, x in record["config"].items() if x)
    return f"{record['arch']} D{record['head_dim']} {record['direction']}: {config}"


def test_every_architecture_head_dim_and_direction_ships(records):
    found = {}
    for r in records:
        found.setdefault((r["arch"], r["head_dim"]), set()).add(r["direction"])
    assert set(found) == set(itertools.product(MATRIX_INSTRUCTION, (64, 80, 96, 128, 256)))
    for directions in found.values():
        assert directions in ({"forward", "dkdv", "dq"}, {"forward", "dk", "dv", "dq"})


def test_shared_memory_and_registers_fit_the_device(records):
    for r in records:
        assert 0 < r["shared"] <= SHARED_BYTES[r["arch"]], name(r)
        assert 0 < r["registers"] <= MAX_REGISTERS.get(r["arch"], 255), name(r)


def test_hot_loops_use_the_matrix_instruction(records):
    for r in records:
        assert r["mma"], name(r)
        assert all(x.startswith(MATRIX_INSTRUCTION[r["arch"]]) for x in r["mma"]), name(r)


def test_both_loops_issue_no_product_more_than_they_use(records):
    for r in records:
        if r["arch"] != "gfx942":
            assert len(r["loops"]) >= 2, name(r)
            for loop in r["loops"]:
                assert loop["issued_macs"] == loop["useful_macs"], name(r)


def test_no_hot_loop_spills(records):
    for r in records:
        if r["arch"] == "gfx942":
            assert r["spills"] == 0, name(r)
            continue
        assert all(loop["spills"] == 0 for loop in r["loops"]), name(r)


OPTIONS = """
import json
import torch
from benchmarks.gpu_static import compiling_for, meta_mask, run_attention

kernels = set()
for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
    with compiling_for(arch) as launched:
        for dtype in (torch.float16, torch.float32):
            mask = meta_mask(2, 300, (64, 64))
            run_attention(64, dtype, mask, sinks=True, softcap=30.0, window=100)
        run_attention(72, torch.bfloat16, meta_mask(2, 300, (32, 32)))
    kernels |= {(arch, name) for name, _ in launched}
print(json.dumps(sorted(kernels)))
"""


def test_options_compile(tmp_path):
    kernels = python(["-c", OPTIONS], tmp_path, timeout=300)
    assert len(kernels) == 4 * 4, kernels


LOSS = """
import json, sys
import torch
from benchmarks.gpu_static import compiling_for, resources, run_loss, run_tubes

records = []
for arch in sys.argv[1:]:
    with compiling_for(arch) as launched:
        for metric in ("cosine", "l2", "mse", "infonce"):
            run_loss(2048, torch.bfloat16, metric)
        run_tubes(2048, torch.bfloat16)
    records += [{"arch": arch, "name": name, **resources(k, arch)} for name, k in launched]
print(json.dumps(records))
"""


def test_the_losses_compile_without_spills_for_every_architecture(tmp_path):
    records = python(["-c", LOSS, *MATRIX_INSTRUCTION], tmp_path, timeout=300)
    kernels = {(r["arch"], r["name"]) for r in records}
    assert len(kernels) == len(MATRIX_INSTRUCTION) * 7, kernels
    for r in records:
        assert 0 < r["registers"] <= MAX_REGISTERS.get(r["arch"], 255), r
        assert 0 <= r["shared"] <= SHARED_BYTES[r["arch"]], r
        assert r["spills"] == 0, r


PACKINGS = """
import json, random
import torch
from benchmarks.gpu_static import compiling_for, meta_mask, run_attention, run_loss, run_tubes

rng = random.Random(0)
counts = []
with compiling_for("sm_90") as launched:
    for packing in range(100):
        batch, seq = rng.randint(1, 4), rng.choice([1, 16, rng.randint(2, 5000)])
        window = 100 if packing % 2 else None
        mask = meta_mask(batch, seq, (64, 64), window)
        run_attention(64, torch.bfloat16, mask, window=window)
        for metric in ("cosine", "infonce"):
            run_loss(2048, torch.bfloat16, metric, num_pairs=rng.choice([1, 8, rng.randint(2, 99)]))
        run_tubes(2048, torch.bfloat16, num_tubes=rng.choice([1, 8, rng.randint(2, 99)]))
        counts.append(len({id(kernel) for _, kernel in launched}))
print(json.dumps(counts))
"""


def test_a_hundred_packings_compile_nothing_after_the_first(tmp_path):
    counts = python(["-c", PACKINGS], tmp_path, timeout=300)
    # Three kernels know of the window; the row statistics and the losses do not.
    assert counts == [11] + [14] * 99
