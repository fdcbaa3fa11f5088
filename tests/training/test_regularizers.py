"""SIGReg and VICReg: against their definitions, and what they hold apart."""

import numpy as np
import pytest
import torch

from llmjepa_kernels import pack
from llmjepa_kernels.hf.patch import patch_model
from llmjepa_kernels.training.objective import llm_jepa_loss
from llmjepa_kernels.training.regularizers import sigreg, vicreg
from tests.support.helpers import random_examples
from tests.support.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

REGULARIZERS = (sigreg, vicreg)


def states(count, size, seed=0, dtype=torch.float64):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def all_real(x):
    return torch.ones(len(x), dtype=torch.bool)


@pytest.mark.parametrize(("count", "size", "num_slices"), [(7, 5, 3), (1, 2, 4), (40, 3, 1)])
def test_sigreg_is_the_epps_pulley_statistic_of_projections(count, size, num_slices):
    """Integrated over the whole line, with complex numbers, a slice at a time."""
    x = 0.3 + 2 * states(count, size)
    found = sigreg(x, all_real(x), seed=9, num_slices=num_slices)
    generator = torch.Generator().manual_seed(9)
    slices = torch.randn(size, num_slices, generator=generator, dtype=x.dtype).numpy()
    knots = np.linspace(-3, 3, 33)
    normal = np.exp(-(knots**2) / 2)
    statistics = []
    for direction in slices.T:
        projected = x.numpy() @ (direction / np.linalg.norm(direction))
        empirical = np.exp(1j * np.outer(knots, projected)).mean(axis=1)
        error = np.abs(empirical - normal) ** 2 * normal
        statistics.append(count * ((error[1:] + error[:-1]) / 2 * np.diff(knots)).sum())
    assert found.item() == pytest.approx(np.mean(statistics), rel=1e-12)


def test_sigreg_tells_a_normal_distribution_from_others():
    normal = states(2000, 8)
    least = sigreg(normal, all_real(normal))
    for other in (0.5 * normal, normal + 0.5, torch.ones_like(normal)):
        assert sigreg(other, all_real(other)) > 10 * least


def test_sigreg_draws_directions_by_its_seed():
    x = states(5, 6)
    first, same, other = (sigreg(x, all_real(x), seed=seed, num_slices=2) for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize(("count", "size"), [(9, 4), (3, 7), (2, 1)])
def test_vicreg_is_its_definition(count, size):
    x = 0.4 * states(count, size)
    covariance = torch.from_numpy(np.cov(x.numpy(), rowvar=False).reshape(size, size))
    low = torch.relu(1 - (x.var(dim=0) + 1e-4).sqrt()).mean()
    others = covariance[~torch.eye(size, dtype=torch.bool)].square().sum() / size
    torch.testing.assert_close(vicreg(x, all_real(x)), low + others / 25)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_gradients(regularizer):
    x = (0.5 * states(6, 3)).requires_grad_()
    real = torch.tensor([True, True, False, True, True, True])
    assert torch.autograd.gradcheck(lambda x: regularizer(x, real), [x])
    regularizer(x, real).backward()
    assert (x.grad[2] == 0).all()


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_counts_nowhere_and_sums_are_in_float32(regularizer, dtype):
    x = states(12, 6, dtype=torch.float32).to(dtype)
    real = torch.arange(12) % 3 > 0
    x[~real] = 1e4
    found = regularizer(x, real)
    assert found.dtype == torch.float32
    # Directions are drawn in float32: rounding of sums alone tells them apart.
    torch.testing.assert_close(found, regularizer(x[real].float(), all_real(x[real])))


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_nothing_or_too_little_is_zero_and_nan_is_seen(regularizer):
    empty = torch.zeros(0, 4, requires_grad=True)
    assert regularizer(empty, all_real(empty)) == 0
    hidden = states(3, 4).requires_grad_()
    loss = regularizer(hidden, torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros(3, 4))
    one = states(1, 4).requires_grad_()
    loss = vicreg(one, all_real(one))
    loss.backward()
    assert loss == 0
    assert torch.isfinite(one.grad).all()
    bad = states(3, 4)
    bad[1, 2] = torch.nan
    assert regularizer(bad, all_real(bad)).isnan()


@pytest.mark.parametrize("name", ["sigreg", "vicreg"])
@pytest.mark.parametrize("detach_target", [False, True])
def test_terms_of_the_loss(name, detach_target):
    """Of predictions and targets, each by itself; of targets even where they are cut off."""
    model = patch_model(tiny_model("llama", dtype=torch.float64), impl="reference")
    batch = pack(random_examples(6, seed=7), 80)
    output = llm_jepa_loss(
        model,
        batch,
        jepa_weight=0.0,
        ntp_weight=0.0,
        detach_target=detach_target,
        slices_seed=5,
        **{f"{name}_weight": 0.7},
    )
    model.zero_grad()
    output.loss.backward()
    found = [p.grad.clone() for p in model.base_model.parameters()]

    keys = ("input_ids", "position_ids", "visible_until")
    model.zero_grad()
    hidden = model(**{key: batch[key] for key in keys}, output_hidden_states=True).hidden_states[-1]
    row, pair = (batch["view_pairs"][..., 0] >= 0).nonzero(as_tuple=True)
    sides = hidden[row[:, None], batch["view_pairs"][row, pair]].unbind(dim=1)
    options = {"seed": 5} if name == "sigreg" else {}
    regularizer = sigreg if name == "sigreg" else vicreg
    expected = sum(regularizer(side, all_real(side), **options) for side in sides) / 2
    torch.testing.assert_close(output[f"{name}_loss"], expected)
    torch.testing.assert_close(output.loss, 0.7 * expected)
    (0.7 * expected).backward()
    for gradient, parameter in zip(found, model.base_model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-9)

    plain = llm_jepa_loss(model, batch)
    assert plain.sigreg_loss is None
    assert plain.vicreg_loss is None


def test_micro_batches_count_by_their_pairs():
    model = patch_model(tiny_model("llama", dtype=torch.float64), impl="reference")
    examples = random_examples(7, seed=11)
    options = {"sigreg_weight": 1.0, "vicreg_weight": 1.0}
    for part in (examples[:2], examples[2:]):
        alone = llm_jepa_loss(model, pack(part), **options)
        shared = llm_jepa_loss(model, pack(part), **options, num_pairs_in_batch=7)
        for name in ("sigreg_loss", "vicreg_loss"):
            torch.testing.assert_close(shared[name], alone[name] * alone.num_pairs / 7)


@pytest.mark.parametrize("function", [sigreg, vicreg])
def test_autocast_changes_nothing(function):
    states = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    real = torch.ones(40, dtype=torch.bool)
    expected = function(states, real)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(states, real), expected)
