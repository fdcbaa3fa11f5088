"""Every kernel, compiled and launched on a CUDA driver that checks and runs nothing.

For more architectures with ``LLMJEPA_GATES=all`` in the environment, as in CI.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.support import stub_gpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux"),
    pytest.mark.skipif(stub_gpu.cuda_include() is None, reason="no cuda.h to build the stub with"),
]

ROOT = Path(__file__).parents[2]

ARCHS = [90, 80]
if os.environ.get("LLMJEPA_GATES") == "all":
    ARCHS += [100, 120, 86]

LAUNCHES = """
import json, sys
from pathlib import Path
from tests.support import stub_gpu

folder, arch = Path(sys.argv[1]), int(sys.argv[2])
stub = stub_gpu.activate(folder, arch)

import torch
from llmjepa_kernels import BlockMask, last_token_loss, semantic_tube_loss, view_attention

kernels = set()
stub_gpu.compare_parameters(stub, kernels.add)


def attention(dtype, D, H, KV, N, block, *, batch=1, heads_first=False, travels=True, **options):
    # heads_first: whole heads after each other; else as models store them
    def tensor(heads):
        x = torch.zeros(batch, N, heads, D, dtype=dtype).transpose(1, 2)
        return (x.contiguous() if heads_first else x).requires_grad_()

    q, k, v = tensor(H), tensor(KV), tensor(KV)
    visible_until = torch.full((batch, N), N, dtype=torch.int32)
    positions = torch.arange(N, dtype=torch.int32).repeat(batch, 1)
    window = options.get("window")
    mask = BlockMask.from_visible_until(
        visible_until, (block, block), position_ids=positions, window=window if travels else None
    )
    if options.pop("sinks", False):
        options["sinks"] = torch.zeros(H, dtype=dtype, requires_grad=True)
    if window:
        options["position_ids"] = positions
    out = view_attention(q, k, v, visible_until, block_mask=mask, impl="triton", **options)
    out.backward(torch.zeros_like(out))


half = torch.bfloat16
everything = {"window": 100, "softcap": 30.0, "sinks": True}
metrics = ["cosine", "infonce"]
attention(half, 64, 8, 2, 300, 128, batch=2, **everything)
attention(half, 80, 4, 2, 333, 64, batch=2)
attention(torch.float32, 32, 4, 1, 77, 32, sinks=True)
if arch in (80, 90, 100):  # 86 and 120 share their configurations
    attention(half, 64, 9, 3, 1000, 64)
    attention(torch.float16, 128, 8, 1, 1000, 128, softmax_scale=-0.1)
    attention(half, 128, 4, 4, 77, 64, batch=3, heads_first=True, travels=False, **everything)
    attention(half, 256, 4, 1, 333, 128, batch=2)
    metrics += ["l2", "mse"]

hidden = torch.zeros(2, 300, 2048, dtype=half, requires_grad=True)
pairs = torch.randint(300, (2, 20, 2))
for metric in metrics:
    last_token_loss(hidden, pairs, metric=metric, impl="triton").backward()
tubes = torch.randint(300, (2, 20, 2, 3, 2))
semantic_tube_loss(hidden, tubes, impl="triton").backward()
print(json.dumps({"kernels": sorted(kernels), "maps": stub.stub_maps()}))
"""

ATTENTION = {"forward", "dkdv", "dq", "row_statistics"}
LOSS = {f"_{name}_kernel" for name in (
    "distance_forward", "distance_backward", "views_forward", "views_dot", "views_backward",
    "tubes_forward", "tubes_backward",
)}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stub_gpu.build(tmp_path_factory.mktemp("libcuda"))


@pytest.fixture(scope="module")
def records(folder, tmp_path_factory):
    """What was launched on each architecture; two processes at a time."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "OMP_NUM_THREADS": "1",
        "DISABLE_PTXAS_OPT": "1",  # nothing runs; the compile gate reads optimised code
    }
    waiting, found, running = ARCHS.copy(), {}, {}
    while waiting or running:
        while waiting and len(running) < 2:
            arch = waiting.pop(0)
            running[arch] = subprocess.Popen(
                [sys.executable, "-c", LAUNCHES, str(folder), str(arch)],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        arch, process = next(iter(running.items()))
        out, error = process.communicate(timeout=1800)
        del running[arch]
        found[arch] = json.loads(out) if process.returncode == 0 else error[-3000:]
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_launched_with_what_it_declares(records, arch):
    record = records[arch]
    assert isinstance(record, dict), record
    kernels = set(record["kernels"])
    assert {f"_attention_{name}_kernel" for name in ATTENTION} | LOSS == kernels
    assert (record["maps"] > 0) == (arch in (90, 100))
