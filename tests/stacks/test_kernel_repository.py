"""The operations as a kernel of the Hugging Face hub, loaded from a local repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

kernels = pytest.importorskip("kernels")

ROOT = Path(__file__).parents[2]
# In a process of its own, where Triton interprets; offline, so that nothing else is loaded.
PROGRAM = """
import sys
import torch
from kernels import get_local_kernel
import llmjepa_kernels  # the package beside it, with operations of its own

kernel = get_local_kernel(__import__("pathlib").Path(sys.argv[1]), backend="cpu")
assert kernel.view_attention is not llmjepa_kernels.view_attention
assert kernel.__name__ + ".ops.attention" in sys.modules
torch.manual_seed(0)
until = torch.tensor([[9, 5, 5, 5, 5, 9, 9, 9, 9]], dtype=torch.int32)
q, k, v = torch.randn(3, 1, 2, 9, 16, requires_grad=True)
expected = llmjepa_kernels.view_attention(q, k, v, until, impl="reference")
wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
for impl in ("reference", "triton"):
    mask = kernel.BlockMask.from_visible_until(until)
    out = kernel.view_attention(q, k, v, until, block_mask=mask, impl=impl)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    torch.testing.assert_close(found, wanted)
hidden = torch.randn(1, 9, 8, requires_grad=True)
pairs = torch.tensor([[[4, 8], [0, 5]]])
for impl in ("reference", "triton"):
    torch.testing.assert_close(
        kernel.last_token_loss(hidden, pairs, impl=impl),
        llmjepa_kernels.last_token_loss(hidden, pairs, impl="reference"),
    )
tubes = torch.tensor([[[[[1, 3], [-1, -1], [-1, -1]], [[4, 6], [-1, -1], [-1, -1]]]]])
torch.testing.assert_close(
    kernel.semantic_tube_loss(hidden, tubes, impl="reference"),
    llmjepa_kernels.semantic_tube_loss(hidden, tubes, impl="reference"),
)
print(kernel.__name__)
"""


def python(*command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_loads_beside_the_package_and_computes_the_same(tmp_path):
    repository = tmp_path / "kernel"
    assert "llmjepa-attention 1" in python(ROOT / ".ci" / "kernel_repository.py", repository)
    assert python("-c", PROGRAM, repository).startswith("_llmjepa_attention_cpu_")
    backends = kernels._rust.Build.open(repository).general.backends
    assert [str(backend) for backend in backends] == ["cpu", "cuda", "rocm", "xpu"]
    built = {p.relative_to(repository / "build") for p in repository.glob("build/*/__init__.py")}
    assert {str(p.parent) for p in built} == {"torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"}
    for path in (repository / "build").rglob("*.py"):  # under any name
        assert "import llmjepa_kernels" not in path.read_text()
        assert "from llmjepa_kernels" not in path.read_text()
