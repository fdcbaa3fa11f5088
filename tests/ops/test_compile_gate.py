"""Kernel configurations that ship, compiled ahead of time for GPUs that are not here.

All of them with ``LLMJEPA_GATES=all`` in the environment, as in CI, which takes ten minutes of a
processor; else some of each kind.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
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
TENSOR_MEMORY = 512  # columns, of sm_100
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# Configurations are chosen by what this compiler makes of them; older ones find fewer registers.
without_spills = pytest.mark.skipif(TRITON < (3, 9), reason="Triton 3.9 is what spills nothing")

EVERYTHING = os.environ.get("LLMJEPA_GATES") == "all"
# (architectures, head dims) of which every configuration is compiled
SHIPPED = [(("sm_80", "sm_100"), (64,)), (("sm_90", "gfx942"), (128,))]
if EVERYTHING:
    SHIPPED = [
        (("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"), (64, 80, 96, 128, 256)),
        (("sm_80", "sm_86"), (160, 192)),
        (("sm_89",), (64, 128)),  # the configurations of sm_86
    ]
# Served by the configurations of their neighbours
NEW_ARCHS = ["sm_103", "sm_120", "sm_121", "gfx90a", "gfx950", "gfx1100", "gfx1201"]
if TRITON >= (3, 9):
    NEW_ARCHS += ["sm_75", "sm_110"]


def python(arguments, cache, timeout=1800):
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
    found = []
    for archs, head_dims in SHIPPED:
        dims = map(str, head_dims)
        command = ["-m", "benchmarks.gpu_static", "--json", "--no-sim"]
        found += python([*command, "--arch", *archs, "--head-dim", *dims], cache)
    return found


@pytest.fixture(scope="module")
def fitting(records):
    """What a device runs: `launch` goes on to the next configuration where one does not fit."""
    return [r for r in records if r["tensor_memory"] <= TENSOR_MEMORY]


def name(record):
    config = " ".join(f"{key}={x}" for key, x in record["config"].items() if x)
    return f"{record['arch']} D{record['head_dim']} {record['direction']}: {config}"


def test_every_architecture_head_dim_and_direction_ships(records, fitting):
    directions = {}
    for r in fitting:
        directions.setdefault((r["arch"], r["head_dim"]), set()).add(r["direction"])
    shipped = {(arch, d) for archs, head_dims in SHIPPED for arch, d in product(archs, head_dims)}
    assert set(directions) == shipped
    for found in directions.values():
        assert found in ({"forward", "dkdv", "dq"}, {"forward", "dk", "dv", "dq"})
    # Before Triton 3.8 accumulators and operands of a product share no tensor memory.
    assert len(fitting) == len(records) or TRITON < (3, 8)


def test_shared_memory_and_registers_fit_the_device(fitting):
    for r in fitting:
        assert 0 < r["shared"] <= SHARED_BYTES[r["arch"]], name(r)
        assert 0 < r["registers"] <= MAX_REGISTERS.get(r["arch"], 255), name(r)


def test_hot_loops_use_the_matrix_instruction(fitting):
    for r in fitting:
        assert r["mma"], name(r)
        assert all(x.startswith(MATRIX_INSTRUCTION[r["arch"]]) for x in r["mma"]), name(r)


def test_both_loops_issue_no_product_more_than_they_use(fitting):
    for r in fitting:
        if r["arch"] != "gfx942":
            assert len(r["loops"]) >= 2, name(r)
            for loop in r["loops"]:
                assert loop["issued_macs"] == loop["useful_macs"], name(r)


@without_spills
def test_no_hot_loop_spills(fitting):
    for r in fitting:
        if r["arch"] == "gfx942":
            assert r["spills"] == 0, name(r)
            continue
        assert all(loop["spills"] == 0 for loop in r["loops"]), name(r)


OPTIONS = """
import json, sys
from itertools import product
import torch
from benchmarks.gpu_static import compiling_for, meta_mask, run_attention

kernels = set()
for arch, *head_dims in json.loads(sys.argv[1]):
    with compiling_for(arch) as launched:
        for head_dim, dtype in product(head_dims, (torch.float16, torch.float32)):
            mask = meta_mask(2, 300, (64, 64))
            run_attention(head_dim, dtype, mask, sinks=True, softcap=30.0, window=100)
        run_attention(72, torch.bfloat16, meta_mask(2, 300, (32, 32)))
    kernels |= {(arch, name) for name, _ in launched}
print(json.dumps(sorted(kernels)))
"""


def test_options_compile(tmp_path):
    archs = [["sm_80", 64, 192], ["sm_90", 64], ["sm_100", 64], ["gfx942", 64]]
    archs = archs if EVERYTHING else archs[:1]
    kernels = python(["-c", OPTIONS, json.dumps(archs)], tmp_path)
    assert len(kernels) == 4 * len(archs), kernels


FLOAT32 = """
import json, sys
import torch
from benchmarks.gpu_static import compiling_for, meta_mask, resources, run_attention

records = []
for arch, head_dim, precision in json.loads(sys.argv[1]):
    torch.set_float32_matmul_precision(precision)
    with compiling_for(arch) as launched:
        run_attention(head_dim, torch.float32, meta_mask(2, 300, (64, 64)))
    for name, kernel in launched:
        records.append([arch, head_dim, precision, name, resources(kernel, arch)["spills"]])
print(json.dumps(records))
"""


@without_spills
def test_float32_spills_nothing(tmp_path):
    kinds = [*product(["sm_80"], [64, 128], ["high"]), ("sm_90", 64, "highest")]
    if EVERYTHING:
        kinds = [
            *product(["sm_80", "sm_90"], [64, 96, 128, 256], ["highest"]),
            *product(["sm_86", "sm_100"], [64, 128], ["highest"]),
            *product(["sm_80", "sm_90"], [64, 128], ["high", "medium"]),
        ]
    records = python(["-c", FLOAT32, json.dumps(kinds)], tmp_path)
    assert len(records) == 4 * len(kinds)
    assert [r for r in records if r[-1]] == []


NEIGHBOURS = """
import json, sys
import torch
from benchmarks.gpu_static import compiling_for, meta_mask, run_attention

kernels = {}
for arch in sys.argv[1:]:
    with compiling_for(arch) as launched:
        run_attention(64, torch.float16, meta_mask(2, 300, (64, 64)))
    kernels[arch] = len(launched)
print(json.dumps(kernels))
"""


def test_neighbours_of_the_architectures_compile(tmp_path):
    archs = NEW_ARCHS if EVERYTHING else ["sm_120"]
    kernels = python(["-c", NEIGHBOURS, *archs], tmp_path)
    assert kernels == dict.fromkeys(archs, 4)


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
    archs = MATRIX_INSTRUCTION if EVERYTHING else ["sm_90"]
    records = python(["-c", LOSS, *archs], tmp_path)
    kernels = {(r["arch"], r["name"]) for r in records}
    assert len(kernels) == len(archs) * 7, kernels
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
    counts = python(["-c", PACKINGS], tmp_path)
    # Three kernels know of the window; the row statistics and the losses do not.
    assert counts == [11] + [14] * 99


ROWS_OF_A_BATCH = """
import random
import torch
from benchmarks.gpu_static import compiling_for
from llmjepa_kernels import BlockMask
from llmjepa_kernels.ops.common import AttentionOptions
from llmjepa_kernels.ops.triton import attention

rng = random.Random(0)
starts = set()
with compiling_for("sm_90") as launched:
    for _ in range(6):
        seq = rng.randint(300, 900)
        until = torch.full((8, seq), seq, dtype=torch.int32)
        until[:, : seq // 2] = seq // 2
        mask = BlockMask.from_visible_until(until, (64, 64))
        some = BlockMask(until[2:4], (64, 64), *(x[2:4] for x in mask.schedule_tensors()))
        tensors = some.visible_until, *some.schedule_tensors()
        starts.add(tuple(x.data_ptr() % 16 for x in tensors))
        q = torch.empty(2, seq, 2, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        attention.attention_forward(q, q, q, some, AttentionOptions(softmax_scale=0.1))
assert len(starts) > 2, starts
print(len({id(kernel) for _, kernel in launched}))
"""


def test_a_few_rows_of_a_batch_compile_nothing_anew(tmp_path):
    """Their masks begin at other multiples of four bytes in every packing."""
    assert python(["-c", ROWS_OF_A_BATCH], tmp_path) == 1


FAR_APART = r"""
import json, re
import torch
from benchmarks.gpu_static import compiling_for, meta_mask
from llmjepa_kernels.ops.common import AttentionOptions
from llmjepa_kernels.ops.triton import attention

products = []
for batch in (2, 4096):  # stored by position: one row is batch * 64 * 128 numbers from the next
    q = torch.empty(128, batch, 64, 128, dtype=torch.bfloat16, device="meta").permute(1, 2, 0, 3)
    with compiling_for("sm_80") as launched:
        mask = meta_mask(batch, 128, (128, 128))
        attention.attention_forward(q, q, q, mask, AttentionOptions(softmax_scale=0.1))
    found = re.findall(r"muli .* tensor<128x1x(i\d+)>", launched[0][1].asm["ttir"])
    products.append(sorted(set(found)))
print(json.dumps(products))
"""


def test_rows_that_lie_far_apart_are_counted_in_64_bits(tmp_path):
    near, far = python(["-c", FAR_APART], tmp_path)
    assert "i32" in near
    assert far == ["i64"]
