"""The C++ kernels of last_token_loss, on every instruction set that this machine runs."""

import os
import subprocess
import sys
import sysconfig

import pytest
import torch

from llmjepa_kernels import last_token_loss, semantic_tube_loss
from llmjepa_kernels.ops import cpu
from tests.support.helpers import check_loss

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the library was not compiled")
ISAS = cpu.isas() if cpu.is_available() else ["none"]
COMPILER = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
DISTANCES = ["cosine", "l2", "mse"]
METRICS = [*DISTANCES, "infonce"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, request.param)
    return request.param


def case(seq=40, dim=64, num_pairs=9, batch=2, seed=0):
    """Hidden states and pairs, some of them padding and many of them sharing rows."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, seq, dim, generator=generator, dtype=torch.float64)
    pairs = torch.randint(seq // 3 + 1, (batch, num_pairs, 2), generator=generator)
    pairs[0, num_pairs // 2 :: 3] = -1
    return hidden, pairs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [5, 64, 576, 1027])
def test_matches_reference(isa, dim, metric, dtype):
    check_loss(*case(dim=dim), metric, "cpu", dtype)


@pytest.mark.parametrize("metric", METRICS)
def test_one_row_in_every_pair(isa, metric):
    hidden, pairs = case(seq=30, dim=100)
    pairs[..., 0] = torch.where(pairs[..., 0] >= 0, 7, -1)
    pairs[1, 3:, 1] = 7
    for dtype in (torch.float32, torch.bfloat16):
        check_loss(hidden, pairs, metric, "cpu", dtype)


@pytest.mark.parametrize("metric", METRICS)
def test_only_padding(isa, metric):
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    for num_pairs in (0, 3):
        pairs = torch.full((2, num_pairs, 2), -1)
        loss = last_token_loss(hidden, pairs, metric=metric, reduction="sum", impl="cpu")
        (dhidden,) = torch.autograd.grad(loss, hidden)
        assert loss == 0
        assert (dhidden == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(isa, metric):
    hidden, pairs = case(seq=6, dim=5, num_pairs=4)
    distinct = pairs[..., 0] != pairs[..., 1]  # |x - y| has no derivative at 0
    pairs = torch.where(distinct[..., None], pairs, -1)

    def distance(hidden):
        return last_token_loss(hidden, pairs, metric=metric, reduction="none", impl="cpu")

    assert torch.autograd.gradcheck(distance, hidden.requires_grad_())


def test_equal_rows_have_no_l2_gradient(isa):
    hidden = torch.ones(1, 3, 20, requires_grad=True)
    loss = last_token_loss(hidden, torch.tensor([[[0, 2]]]), metric="l2", impl="cpu")
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert loss == 0
    assert (dhidden == 0).all()


@pytest.mark.parametrize("metric", ["cosine", "infonce"])
def test_a_zero_row_has_the_clamped_cosine(isa, metric):
    hidden, pairs = case(batch=1)[0].float(), torch.tensor([[[0, 1], [2, 3]]])
    hidden[0, 1] = 0
    x = hidden.requires_grad_()
    grads = [
        torch.autograd.grad(last_token_loss(x, pairs, metric=metric, impl=impl), x)[0]
        for impl in ("cpu", "reference")
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)  # that of the zero row is 1e8 large


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions_leave_padding_out(isa, reduction):
    hidden, pairs = case()
    real = pairs[..., 0] >= 0
    each = last_token_loss(hidden, pairs, reduction="none", impl="cpu")
    expected = getattr(each[real], reduction)()
    loss = last_token_loss(hidden, pairs, reduction=reduction, impl="cpu")
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("metric", ["cosine", "infonce"])
@pytest.mark.parametrize("wrong", [[5, 40], [40, 5], [-2, 3], [3, -1], [-1, 3], [-2, -2]])
def test_a_pair_outside_the_row_is_never_read(isa, metric, wrong):
    hidden, pairs = case(seq=40)
    pairs[1, 3] = torch.tensor(wrong)
    with pytest.raises(IndexError, match=rf"0 \.\. 39.*pairs\[1, 3\] = \[{wrong[0]}, {wrong[1]}\]"):
        last_token_loss(hidden, pairs, metric=metric, impl="cpu")


@pytest.mark.parametrize("metric", DISTANCES)
def test_a_row_that_is_not_finite_shows_only_where_it_is_used(isa, metric):
    hidden, _ = case()
    pairs = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [-1, -1]]])
    hidden[0, 3, 5] = float("nan")
    hidden = hidden.float().requires_grad_()
    distance = last_token_loss(hidden, pairs, metric=metric, reduction="none", impl="cpu")
    (dhidden,) = torch.autograd.grad(distance.sum(), hidden)
    assert distance.isnan().tolist() == [[False, True], [False, False]]
    assert dhidden[0, 2:4].isnan().any(dim=-1).all()
    dhidden[0, 2:4] = 0
    assert dhidden.isfinite().all()


def test_strided_hidden(isa):
    hidden, pairs = case(dim=48)
    wide = torch.randn(2, 40, 100)
    wide[..., 30:78] = hidden
    grads = []
    for x in (wide[..., 30:78], wide[..., 30:78].contiguous()):
        x = x.detach().requires_grad_()
        grads.append(torch.autograd.grad(last_token_loss(x, pairs, impl="cpu"), x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_threads_do_not_change_a_bit(metric, dtype):
    hidden, pairs = case(seq=900, dim=512, num_pairs=900)  # several tasks of every kind
    before = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            x = hidden.to(dtype).requires_grad_()
            distance = last_token_loss(x, pairs, metric=metric, reduction="none", impl="cpu")
            runs.append([distance, *torch.autograd.grad(distance.sum(), x)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_float16_has_its_subnormals_where_the_process_flushes_floats(isa):
    hidden = torch.full((1, 3, 40), 3e-5, dtype=torch.float16)
    hidden[0, 2] = torch.linspace(-7e-5, 7e-5, 40)
    pairs = torch.tensor([[[0, 1], [0, 2], [1, 2]]])
    found = []
    try:
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            found.append(last_token_loss(hidden, pairs, reduction="none", impl="cpu"))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(*found)
    assert found[0][0, 0].abs() < 1e-6 < found[0][0, 1]


def test_another_default_device_is_not_taken():
    hidden, pairs = case()
    hidden = hidden.float().requires_grad_()
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            distance = last_token_loss(hidden, pairs, impl="cpu")
            vectors = semantic_tube_loss(hidden, pairs[:, :3, None, None].expand(-1, -1, 2, 3, -1))
            contrast = last_token_loss(hidden, pairs, metric="infonce", impl="cpu")
            loss = distance + vectors + contrast
            results.append([loss, *torch.autograd.grad(loss, hidden)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_library_of_other_sources_is_refused(monkeypatch, tmp_path):
    """As after a pull without an install."""
    (tmp_path / "api.cpp").write_text("// another")
    monkeypatch.setattr(cpu, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match="compiled from another version of the sources"):
        cpu._library.__wrapped__()


def test_a_library_of_another_version_is_refused(tmp_path):
    """One whose structures differ would read and write where it must not."""
    subprocess.run(
        [COMPILER, "-shared", "-xc", "-", "-o", tmp_path / "other.so"],
        input=b"long long lk_attention_size(void) { return 8; } void lk_sources(void) {}",
        check=True,
    )
    script = "from llmjepa_kernels.ops import cpu; cpu.isas()"
    environment = {**os.environ, cpu.LIBRARY_VARIABLE: str(tmp_path / "other.so")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert "other.so was compiled from another version of the sources" in done.stderr
