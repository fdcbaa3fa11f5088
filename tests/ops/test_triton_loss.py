"""The Triton back end of the last-token loss against the float64 reference, as for attention."""

import pytest
import torch

from llmjepa_kernels import last_token_loss
from tests.support.helpers import check_loss

pytest.importorskip("triton")

METRICS = ["cosine", "l2", "mse", "infonce"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.float32]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # which the interpreter computes wrongly
# Padded, with one index in several pairs and on both sides, and a pair of equal rows.
AWKWARD = torch.tensor([[[0, 3], [3, 5], [0, 5], [2, 2]], [[1, 6], [1, 0], [-1, -1], [-1, -1]]])

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


def random_pairs(batch, num_pairs, seq, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(seq, (batch, num_pairs, 2), generator=generator)
    pairs[torch.rand(batch, num_pairs, generator=generator) < 0.3] = -1
    return pairs


def random_hidden(batch, seq, hidden_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq, hidden_size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("hidden_size", [5, 1024, 2050])
def test_awkward_pairs(metric, hidden_size, dtype):
    check_loss(random_hidden(2, 7, hidden_size), AWKWARD, metric, "triton", dtype, DEVICE)


@pytest.mark.parametrize("metric", ["cosine", "infonce"])
@pytest.mark.parametrize("num_pairs", [1, 31, 33, 70])  # across the blocks of compared slots
def test_an_index_repeated_in_many_pairs(num_pairs, metric):
    pairs = random_pairs(2, num_pairs, 9, seed=num_pairs)
    check_loss(random_hidden(2, 9, 33), pairs, metric, "triton", torch.float32, DEVICE)


@pytest.mark.parametrize("metric", ["cosine", "l2", "infonce"])
def test_rows_of_zeros(metric):
    """The clamped norm of the cosine, and the distance's own kink."""
    hidden = random_hidden(2, 7, 16)
    hidden[0, 0] = hidden[0, 3] = 0
    check_loss(hidden, AWKWARD, metric, "triton", torch.float32, DEVICE)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("metric", ["cosine", "l2", "infonce"])
def test_nan_in_a_row_reaches_all_of_the_pair(metric):
    hidden = random_hidden(2, 7, 16).float()
    hidden[0, 3, 1] = torch.nan
    hidden = hidden.to(DEVICE).requires_grad_()
    loss = last_token_loss(hidden, AWKWARD[:, :1].to(DEVICE), metric=metric, impl="triton")
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isnan()
    assert gradient[0, [0, 3]].isnan().all()


def test_strided_rows():
    """A slice of a longer sequence and of wider rows is read where it lies."""
    wide = random_hidden(2, 10, 40).float().to(DEVICE)
    hidden = wide[:, 2:9, 8:24]
    pairs = AWKWARD.to(DEVICE)
    options = {"metric": "cosine", "reduction": "none"}
    actual = last_token_loss(hidden, pairs, impl="triton", **options)
    expected = last_token_loss(hidden.double(), pairs, impl="reference", **options)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_no_pairs_and_only_padding():
    hidden = torch.ones(2, 4, 8, device=DEVICE, requires_grad=True)
    for pairs in (torch.zeros(2, 0, 2, dtype=torch.int64), torch.full((2, 3, 2), -1)):
        for metric in ("cosine", "infonce"):
            loss = last_token_loss(hidden, pairs.to(DEVICE), metric=metric, impl="triton")
            (dhidden,) = torch.autograd.grad(loss, hidden)
            assert loss == 0
            assert not dhidden.any()


@pytest.mark.parametrize("metric", METRICS)
def test_other_rows_change_no_bit(metric):
    hidden = random_hidden(2, 7, 64).float().to(DEVICE)
    pairs = AWKWARD.to(DEVICE)

    def run(hidden):
        hidden = hidden.detach().requires_grad_()
        loss = last_token_loss(hidden, pairs, metric=metric, reduction="none", impl="triton")
        return loss.detach(), torch.autograd.grad(loss.sum(), hidden)[0]

    changed = hidden.clone()
    changed[0, [1, 4, 6]] = torch.inf
    changed[1, 2:6] = torch.nan
    for before, after in zip(run(hidden), run(changed), strict=True):
        assert torch.equal(before, after)


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"hidden must be float16, .* got torch.float64"):
        last_token_loss(random_hidden(2, 7, 4).to(DEVICE), AWKWARD.to(DEVICE), impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_model_sized_batch_natively(metric, dtype):
    pairs = random_pairs(8, 60, 4096, seed=1)
    check_loss(random_hidden(8, 4096, 2048), pairs, metric, "triton", dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_two_hundred_and_fifty_runs_give_the_same_bits(metric):
    hidden = random_hidden(4, 100, 2048).bfloat16().cuda().requires_grad_()
    pairs = random_pairs(4, 300, 100, seed=2).cuda()

    def run():
        loss = last_token_loss(hidden, pairs, metric=metric)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    first = run()
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
