"""The kernels for NEON, cross-compiled by setup.py and run in QEMU.

Needs g++-aarch64-linux-gnu and qemu-user. On an ARM machine the other tests run them natively.
"""

import pytest
import torch

from llmjepa_kernels.ops import cpu
from tests.support.emulated_cpu import EmulatedLibrary
from tests.support.helpers import (
    AttentionCase,
    check_attention,
    check_loss,
    check_tubes,
    random_tubes,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not EmulatedLibrary.is_available("aarch64"),
        reason="needs g++-aarch64-linux-gnu and qemu-user",
    ),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return EmulatedLibrary("aarch64", tmp_path_factory.mktemp("aarch64"))


@pytest.fixture(autouse=True)
def emulated(library, monkeypatch):
    assert library.isas == ["neon", "portable"]
    monkeypatch.setattr(cpu, "_library", lambda: library)
    monkeypatch.setenv(cpu.ISA_VARIABLE, "neon")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype):
    case = AttentionCase.random(
        batch=2, heads=6, kv_heads=2, seq=90, head_dim=33, mean_length=15, seed=1
    )
    check_attention(case, "cpu", dtype)
    case = AttentionCase.random(
        heads=4, kv_heads=2, seq=300, head_dim=64, sinks=True, window=9, softcap=2.5, mean_length=80
    )
    check_attention(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["cosine", "l2", "mse", "infonce"])
def test_loss(metric, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 20, 101, generator=generator, dtype=torch.float64)
    pairs = torch.randint(7, (2, 9, 2), generator=generator)
    pairs[0, 4::3] = -1
    check_loss(hidden, pairs, metric, "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tubes(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 20, 101, generator=generator, dtype=torch.float64)
    check_tubes(hidden, random_tubes(2, 9, 20), "cpu", dtype)
