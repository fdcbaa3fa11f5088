"""The public operation and its reference back end; the other back ends have their own files."""

import pytest
import torch
from torch.nn import functional

from llmjepa_kernels import last_token_loss
from llmjepa_kernels.ops import cpu

IMPLS = ["reference", *(["cpu"] if cpu.is_available() else [])]
DISTANCES = {
    "cosine": lambda x, y: 1 - functional.cosine_similarity(x, y, dim=-1),
    "l2": lambda x, y: (x - y).norm(dim=-1),
    "mse": lambda x, y: ((x - y) ** 2).mean(dim=-1),
}
# Padded, with one index in several pairs and on both sides, and a pair of equal rows.
PAIRS = torch.tensor([[[0, 3], [3, 5], [0, 5], [2, 2]], [[1, 6], [1, 0], [-1, -1], [-1, -1]]])


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_()


def plain(hidden, metric):
    """(real pairs,) by indexing each pair."""
    distance = DISTANCES[metric]
    return torch.stack(
        [
            distance(hidden[b, predictor], hidden[b, target])
            for b, row in enumerate(PAIRS.tolist())
            for predictor, target in row
            if predictor >= 0
        ]
    )


@pytest.mark.parametrize("metric", DISTANCES)
def test_reference_equals_the_plain_expression(metric):
    hidden = inputs()
    expected = plain(hidden, metric)
    each = last_token_loss(hidden, PAIRS, metric=metric, reduction="none", impl="reference")
    assert each.shape == (2, 4)
    assert (each[1, 2:] == 0).all()
    torch.testing.assert_close(each[PAIRS[..., 0] >= 0], expected, rtol=1e-12, atol=1e-12)

    for reduction in ("mean", "sum"):
        loss = last_token_loss(hidden, PAIRS, metric=metric, reduction=reduction, impl="reference")
        (dhidden,) = torch.autograd.grad(loss, hidden)
        reference = getattr(expected, reduction)()
        (dexpected,) = torch.autograd.grad(reference, hidden, retain_graph=True)
        torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dhidden, dexpected.nan_to_num(0.0), rtol=1e-11, atol=1e-11)


def test_infonce_is_cross_entropy_against_all_targets_of_the_batch():
    hidden = inputs()
    real = [(b, p, t) for b, row in enumerate(PAIRS.tolist()) for p, t in row if p >= 0]
    x = functional.normalize(torch.stack([hidden[b, p] for b, p, _ in real]), dim=-1)
    y = functional.normalize(torch.stack([hidden[b, t] for b, _, t in real]), dim=-1)
    expected = functional.cross_entropy(x @ y.T / 0.2, torch.arange(len(real)))
    loss = last_token_loss(hidden, PAIRS, metric="infonce", temperature=0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (actual,) = torch.autograd.grad(loss, hidden)
    (gradient,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(actual, gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("metric", [*DISTANCES, "infonce"])
def test_no_pairs_give_zero_and_a_gradient_of_zero(metric):
    hidden = inputs()
    for pairs in (torch.full((2, 3, 2), -1), torch.empty(2, 0, 2, dtype=torch.int64)):
        loss = last_token_loss(hidden, pairs, metric=metric, impl="reference")
        (dhidden,) = torch.autograd.grad(loss, hidden)
        assert loss.item() == 0.0
        assert (dhidden == 0).all()


@pytest.mark.parametrize("metric", DISTANCES)
def test_zero_rows_give_finite_gradients(metric):
    hidden = torch.zeros(1, 3, 4, requires_grad=True)
    loss = last_token_loss(hidden, torch.tensor([[[0, 2]]]), metric=metric, impl="reference")
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == (1.0 if metric == "cosine" else 0.0)
    assert (dhidden == 0).all()


@pytest.mark.parametrize("metric", [*DISTANCES, "infonce"])
def test_nan_never_passes(metric):
    hidden = inputs().detach()
    hidden[0, 3, 1] = torch.nan
    assert last_token_loss(hidden, PAIRS, metric=metric, impl="reference").isnan()


def test_infonce_reads_no_row_that_nobody_pairs():
    hidden = inputs().detach()
    pairs = PAIRS.clone()
    pairs[1] = -1
    hidden[1] = torch.nan
    hidden.requires_grad_()
    loss = last_token_loss(hidden, pairs, metric="infonce")
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite()
    assert dhidden.isfinite().all()


def test_infonce_keeps_its_precision_under_autocast():
    hidden = inputs(torch.float32)
    expected = last_token_loss(hidden, PAIRS, metric="infonce")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(last_token_loss(hidden, PAIRS, metric="infonce"), expected)


@pytest.mark.parametrize("metric", ["cosine", "infonce"])
def test_half_a_pair_is_refused(metric):
    pairs = PAIRS.clone()
    pairs[0, 0, 1] = -1
    with pytest.raises(IndexError, match=r"pairs\[0, 0\] = \[0, -1\]"):
        last_token_loss(inputs(), pairs, metric=metric, impl="reference")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype):
    hidden = inputs(dtype)
    loss = last_token_loss(hidden, PAIRS, impl="reference")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(hidden.float(), "cosine").mean())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("metric", "reduction"), [("cosine", "mean"), ("l2", "sum"), ("mse", "none")]
)
def test_opcheck(metric, reduction, impl):
    pairs = PAIRS[:, :2]  # gradients of equal rows under l2 are one-sided
    operation = torch.ops.llmjepa_kernels.pair_distance
    torch.library.opcheck(operation, (inputs(), pairs, metric, reduction, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_of_the_views(impl):
    torch.library.opcheck(torch.ops.llmjepa_kernels.pair_views, (inputs(), PAIRS, impl))


@pytest.mark.parametrize("metric", ["cosine", "infonce"])
def test_torch_compile_traces_through(metric):
    def loss(hidden):
        return last_token_loss(hidden, PAIRS, metric=metric)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    hidden = inputs()
    expected, actual = loss(hidden), compiled(hidden)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(x, hidden)[0] for x in (expected, actual)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("metric", [*DISTANCES, "infonce"])
def test_gradcheck(metric):
    hidden = inputs()

    def distances(x):
        return last_token_loss(x, PAIRS[:, :2], metric=metric, reduction="none", impl="reference")

    assert torch.autograd.gradcheck(distances, (hidden,))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", ["cosine", "l2", "infonce"])
def test_nan_in_a_row_reaches_all_of_the_pair(metric, impl):
    hidden = inputs().detach()
    hidden[0, 3, 1] = torch.nan
    hidden.requires_grad_()
    loss = last_token_loss(hidden, PAIRS[:, :1], metric=metric, impl=impl)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isnan()
    assert gradient[0, PAIRS[0, 0]].isnan().all()


@pytest.mark.parametrize("metric", ["cosine", "infonce"])
def test_second_derivatives_are_refused(metric):
    hidden = inputs()
    (gradient,) = torch.autograd.grad(
        last_token_loss(hidden, PAIRS, metric=metric), hidden, create_graph=True
    )
    penalty = gradient.square().sum() + hidden.square().sum()  # which has a derivative of its own
    with pytest.raises(RuntimeError, match="the losses have no second derivatives"):
        penalty.backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": torch.zeros(7, 5)}, ValueError, r"hidden must .* got .* \(7, 5\)"),
        ({"hidden": torch.zeros(2, 7, 5).int()}, ValueError, "hidden must be floating point"),
        ({"hidden": torch.zeros(2, 7, 9)[..., ::2]}, ValueError, "unit stride"),
        ({"pairs": PAIRS.int()}, ValueError, "pairs must be int64.*int32"),
        ({"pairs": PAIRS[:1]}, ValueError, r"batch = 2.*\(1, 4, 2\)"),
        ({"pairs": PAIRS[..., 0]}, ValueError, "pairs must be int64 of shape"),
        ({"pairs": PAIRS + 2}, IndexError, r"0 \.\. 6.*pairs\[0, 1\] = \[5, 7\]"),
        ({"pairs": PAIRS.clamp(min=-1) - 1}, IndexError, r"pairs\[0, 0\] = \[-1, 2\]"),
        ({"metric": "dot"}, ValueError, "metric must be one of .* got 'dot'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of .* got 'max'"),
        (
            {"temperature": 0.0},
            ValueError,
            "temperature must be a number, positive and finite in float32, got 0.0",
        ),
        ({"impl": "fast"}, ValueError, "impl must be one of .* got 'fast'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    good = {"hidden": torch.zeros(2, 7, 5), "pairs": PAIRS, "impl": "reference"}
    with pytest.raises(error, match=message):
        last_token_loss(**{**good, **arguments})


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_large_states(impl):
    """Whose norms to the fourth float32 does not hold."""
    hidden = inputs(torch.float32).detach() * 1e9
    exact = hidden.double().requires_grad_()
    expected = torch.autograd.grad(last_token_loss(exact, PAIRS, impl="reference"), exact)[0]
    hidden.requires_grad_()
    found = torch.autograd.grad(last_token_loss(hidden, PAIRS, impl=impl), hidden)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-15)
