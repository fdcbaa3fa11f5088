"""Whether the views of training collapse: the objective is met, and all examples look alike."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from llmjepa_kernels.rank import rank_me

WINDOW = 256  # targets that the rank is taken over
MET = 0.95  # cosine of the pairs at which the objective counts as met
APART = 0.05  # how much lower that with other targets must be at least


class CollapseTelemetry:
    """Sums up the views of each batch at the cost of a few of its rows, and reports on them.

    - ``other_cosine``: the mean cosine of a prediction and the target of another pair of its batch:
      as high as ``cosine`` where the views tell nothing apart;
    - ``target_variance``: the variance of the targets at length 1 over their batch, the sum over
      all dimensions: from 0, all in one direction, to about 1;
    - ``target_rank``: RankMe of the last targets of this process at length 1.

    It warns once, when the cosine of the pairs is above 0.95 and that with other targets no more
    than 0.05 lower.

    Args:
        device: Of what is summed up over the processes, whose collectives may not take others.

    Source: RankMe, arXiv:2210.02885.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._targets: deque[Tensor] = deque()
        self._warned = False
        self._reset()

    def _reset(self) -> None:
        # Of all ordered pairs of different pairs of a batch: dot products of prediction and target
        # and of two targets, and their number.
        self._sums = torch.zeros(3, device=self._device)

    def add(self, views: Tensor) -> None:
        """Takes the views of a batch.

        Args:
            views: (2, batch, num_pairs, hidden_size), predictors and targets at length 1; padding
                is 0.
        """
        predictors, targets = views.detach().flatten(1, 2).float().unbind()
        predictor_sum, target_sum = predictors.sum(dim=0), targets.sum(dim=0)
        count = targets.square().sum()
        others = predictor_sum @ target_sum - (predictors * targets).sum()
        target_others = target_sum.square().sum() - count
        summands = torch.stack([others, target_others, count * (count - 1)])
        self._sums += summands.to(self._device)
        self._targets.append(targets)
        while sum(map(len, self._targets)) - len(self._targets[0]) >= WINDOW:
            self._targets.popleft()

    def logs(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What was found since the last call; nothing without two pairs in any batch.

        Args:
            reduce: Adds up a tensor over the processes.
        """
        others, target_others, count = reduce(self._sums).tolist()
        self._reset()
        if count < 1:
            return {}
        found = {"other_cosine": others / count, "target_variance": 1 - target_others / count}
        if self._targets:  # there may be some on other processes only
            found["target_rank"] = rank_me(torch.cat(list(self._targets))[-WINDOW:])
        return found

    def warn_of_collapse(self, cosine: float, other_cosine: float) -> None:
        """Warns once if the objective is met without telling examples apart."""
        if self._warned or cosine < MET or cosine - other_cosine >= APART:
            return
        self._warned = True
        warnings.warn(
            f"the views collapse: the cosine of the pairs is {cosine:.3f}, but that with the "
            f"targets of other pairs is {other_cosine:.3f}. The JEPA loss is met without telling "
            "examples apart; a smaller jepa_weight, metric='infonce' or a sigreg_weight may "
            "prevent that",
            RuntimeWarning,
            stacklevel=2,
        )
