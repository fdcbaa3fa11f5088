"""Against collapse: terms that keep the states of a batch apart, whatever they are compared with.

Both are functions of the whole batch, not sums over its pairs, so those of the parts of an
accumulated batch do not add up to that of all of it. Over processes they are exact: sums and counts
are added up, not means, as packed rows hold unequal numbers of pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from llmjepa_kernels.ops.collectives import sum_over

if TYPE_CHECKING:  # builds of torch without distributed lack it
    from torch.distributed import ProcessGroup

NUM_SLICES = 256
NUM_KNOTS, LAST_KNOT = 17, 3.0
LEAST_STD, EPS = 1.0, 1e-4  # of VICReg's variance
COVARIANCE_WEIGHT = 1 / 25  # beside that of the variance, in its paper


def sigreg(
    states: Tensor,
    real: Tensor,
    *,
    seed: int = 0,
    num_slices: int = NUM_SLICES,
    group: ProcessGroup | None = None,
) -> Tensor:
    """How far states are from a standard normal distribution, seen from random directions.

    The Epps-Pulley statistic of the states' projections on random directions, the mean over these:
    the squared difference of empirical and normal characteristic function, integrated under the
    normal density by the trapezoid rule, times the number of states.

    Args:
        states: (count, size).
        real: (count,) bool; the others count nowhere.
        seed: Of the directions, which must be the same in all processes; take another each update.
        num_slices: Directions.
        group: The processes whose states belong together; all must call this, and backward.

    Returns:
        statistic: float32 scalar (float64 for float64 states); 0 without states.

    Source: LeJEPA, arXiv:2511.08544.
    """
    with torch.autocast(states.device.type, enabled=False):
        return _sigreg(states, real, seed, num_slices, group)


def _sigreg(
    states: Tensor, real: Tensor, seed: int, num_slices: int, group: ProcessGroup | None
) -> Tensor:
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    generator = torch.Generator(states.device).manual_seed(seed)
    slices = torch.randn(
        states.shape[-1], num_slices, generator=generator, device=states.device, dtype=states.dtype
    )
    slices = slices / slices.norm(dim=0)
    knots = torch.linspace(0, LAST_KNOT, NUM_KNOTS, device=states.device, dtype=states.dtype)
    normal = torch.exp(-knots.square() / 2)
    # The integrand is even, so the half line counts twice, but for its ends.
    weights = torch.full_like(knots, 2 * LAST_KNOT / (NUM_KNOTS - 1))
    weights[0] /= 2
    weights[-1] /= 2
    at = (states @ slices)[..., None] * knots
    waves = torch.stack([at.cos(), at.sin()]) * real[:, None, None]
    sums, count = _add_up(waves.sum(dim=1), real, group)
    cosine, sine = sums / count.clamp(min=1)
    errors = (cosine - normal).square() + sine.square()
    return count * (errors @ (weights * normal)).mean()


def vicreg(states: Tensor, real: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """VICReg's variance and covariance terms, at the proportion of its paper, 25 to 1.

    The mean over dimensions of how much a standard deviation is below 1, and the sum of the squared
    covariances of different dimensions, over their number. They take (size, size) of memory.

    Args:
        states, real, group: As in `sigreg`.

    Returns:
        float32 scalar (float64 for float64 states); 0 for fewer than two states.

    Source: VICReg, arXiv:2105.04906.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32)) * real[:, None]
    sums, count = _add_up(states.sum(dim=0), real, group)
    centred = (states - sums / count.clamp(min=1)) * real[:, None]
    with torch.autocast(states.device.type, enabled=False):
        products, _ = _add_up(centred.mT @ centred, real, group)
    covariance = products / (count - 1).clamp(min=1)
    variances = covariance.diagonal()
    low = (LEAST_STD - (variances + EPS).sqrt()).clamp(min=0).mean()
    others = (covariance.square().sum() - variances.square().sum()) / len(covariance)
    return (low + COVARIANCE_WEIGHT * others) * (count > 1)


def _add_up(sums: Tensor, real: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Sums and the number of states, over all processes."""
    count = real.sum().to(sums.dtype)
    if group is None or distributed.get_world_size(group) < 2:
        return sums, count
    # One collective carries both.
    both = torch.cat([sums.flatten(), count[None]])
    both = sum_over(both, group)
    return both[:-1].view(sums.shape), both[-1].detach()
