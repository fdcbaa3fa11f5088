"""last_token_loss: the distance between the last tokens of paired views, as one operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed
from torch.nn import functional

from llmjepa_kernels.checks import check_finite
from llmjepa_kernels.ops.collectives import gather_over
from llmjepa_kernels.ops.common import compute_dtype, count_pairs
from llmjepa_kernels.ops.registry import (
    backward_operation,
    load_backend,
    operation,
    refuse_vmap,
    runs_eagerly,
)

if TYPE_CHECKING:  # builds of torch without distributed lack it
    from torch.distributed import ProcessGroup

BACKENDS = {
    "triton": "llmjepa_kernels.ops.triton.loss",
    "cpu": "llmjepa_kernels.ops.cpu",
    "reference": "llmjepa_kernels.ops.reference",
}
METRICS = ("cosine", "l2", "mse", "infonce")
REDUCTIONS = ("mean", "sum", "none")


def last_token_loss(
    hidden: Tensor,
    pairs: Tensor,
    *,
    metric: str = "cosine",
    reduction: str = "mean",
    temperature: float = 0.07,
    group: ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor:
    """The JEPA term: how far each predictor's hidden state is from its target's.

    Args:
        hidden: (batch, seq, hidden_size), the model's last hidden states.
        pairs: (batch, num_pairs, 2) int64, row-local indices of (predictor, target); a pair of
            -1 is padding and counts nowhere.
        metric: "cosine", 1 - cos(x, y); "l2", ``|x - y|``; "mse", the mean of ``(x - y)²``;
            "infonce", cross-entropy of the pair's cosine / `temperature` against the targets of
            all pairs of the batch, and of the batches of `group`.
        reduction: "mean" over the pairs (0 if there are none), "sum", or "none" for
            (batch, num_pairs) with 0 for padding.
        temperature: Of "infonce" only.
        group: Of "infonce" only: the processes whose targets are negatives too, each with any
            number of pairs. All must call this, and backward. Targets receive gradient from
            every process's loss: the sum of the losses over `group` is what is differentiated.
        impl: "triton", "cpu" or "reference". Default: by the device of `hidden`. Of "infonce" they
            gather and normalise the rows; the matrix of cosines is plain PyTorch in all of them.

    Returns:
        loss: float32 (float64 for float64 `hidden`).

    Raises:
        ValueError: A shape, dtype, device or option differs from the above; says which.
        IndexError: A pair lies outside the row (checked on the CPU; asserted on a GPU).

    Source: LLM-JEPA, arXiv:2509.14252; InfoNCE, arXiv:1807.03748.
    """
    _check(hidden, pairs, metric, reduction, temperature)
    if metric != "infonce":
        if runs_eagerly(hidden, pairs):
            return _EagerDistance.apply(hidden, pairs, metric, reduction, impl)
        refuse_vmap(hidden, pairs)
        loss, _ = _OPS.pair_distance(hidden, pairs, metric, reduction, impl)
        return loss
    distance = _infonce(hidden, pairs, temperature, group, impl)
    if reduction == "none":
        return distance
    total = distance.sum()
    return total if reduction == "sum" else total / count_pairs(pairs).clamp(min=1)


def pair_views(hidden: Tensor, pairs: Tensor, *, impl: str | None = None) -> Tensor:
    """The rows of all pairs at length 1, (2, batch, num_pairs, hidden_size); padding is 0.

    Args:
        hidden, pairs, impl: As in `last_token_loss`.
    """
    check_hidden(hidden)
    if runs_eagerly(hidden, pairs):
        return _EagerViews.apply(hidden, pairs, impl)
    refuse_vmap(hidden, pairs)
    views, _ = _OPS.pair_views(hidden, pairs, impl)
    return views


def _infonce(
    hidden: Tensor, pairs: Tensor, temperature: float, group: ProcessGroup | None, impl: str | None
) -> Tensor:
    """Cross-entropy over all targets of the batch; padding is neither query nor negative."""
    views = pair_views(hidden, pairs, impl=impl)
    predictors, targets = views.flatten(1, 2).unbind()
    real = candidates = pairs[..., 0].flatten() >= 0
    own = torch.arange(len(real), device=real.device)
    if group is not None and group.size() > 1:
        targets, candidates, first = _gather_targets(targets, real, group)
        own = own + first
    with torch.autocast(hidden.device.type, enabled=False):
        logits = predictors @ targets.mT / temperature
    logits = logits.masked_fill(~candidates, -torch.inf)
    # A padding pair's own column is hidden; give it a harmless label before it is zeroed.
    logits = torch.where(real[:, None], logits, 0.0)
    distance = functional.cross_entropy(logits, own, reduction="none") * real
    return distance.view(pairs.shape[:2])


def _gather_targets(
    targets: Tensor, real: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, int]:
    """The targets of all processes, which of them are real, and where those of this one begin."""
    longest = torch.tensor(max(len(targets), 1), device=targets.device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX, group=group)
    most = int(longest)
    # One collective carries both: what is real is one more column.
    rows = torch.cat([targets, real[:, None].to(targets)], dim=1)
    rows = functional.pad(rows, (0, 0, 0, most - len(rows)))
    rows = gather_over(rows, group)
    return rows[:, :-1], rows[:, -1] > 0, most * group.rank()


# The operations as torch sees them.

_OPS = torch.ops.llmjepa_kernels


@operation("llmjepa_kernels::pair_distance")
def _pair_distance(
    hidden: Tensor, pairs: Tensor, metric: str, reduction: str, impl: str | None
) -> tuple[Tensor, Tensor]:
    return load_backend(BACKENDS, impl, hidden.device).distance_forward(
        hidden, pairs, metric=metric, reduction=reduction
    )


@torch.library.register_fake("llmjepa_kernels::pair_distance")
def _(hidden, pairs, metric, reduction, impl):
    dtype, shape = compute_dtype(hidden), pairs.shape[:2]
    loss = hidden.new_empty(shape if reduction == "none" else (), dtype=dtype)
    return loss, hidden.new_empty((*shape, 3), dtype=dtype)


@backward_operation("llmjepa_kernels::pair_distance_backward")
def _pair_distance_backward(
    dloss: Tensor,
    hidden: Tensor,
    pairs: Tensor,
    stats: Tensor,
    metric: str,
    reduction: str,
    impl: str | None,
) -> Tensor:
    if reduction == "mean":
        dloss = dloss / count_pairs(pairs).clamp(min=1)
    return load_backend(BACKENDS, impl, hidden.device).distance_backward(
        dloss.expand(pairs.shape[:2]).contiguous(), hidden, pairs, stats, metric=metric
    )


@torch.library.register_fake("llmjepa_kernels::pair_distance_backward")
def _(dloss, hidden, *arguments):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _setup_distance(ctx, inputs, output):
    hidden, pairs, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, pairs, output[1])
    ctx.set_materialize_grads(False)


def _backward_distance(ctx, dloss, _dstats):
    if dloss is None:
        return None, None, None, None, None
    refuse_vmap(dloss)
    dhidden = _OPS.pair_distance_backward(dloss, *ctx.saved_tensors, *ctx.options)
    return dhidden, None, None, None, None


torch.library.register_autograd(
    "llmjepa_kernels::pair_distance", _backward_distance, setup_context=_setup_distance
)


@operation("llmjepa_kernels::pair_views")
def _pair_views(hidden: Tensor, pairs: Tensor, impl: str | None) -> tuple[Tensor, Tensor]:
    """The rows of all pairs at length 1, (2, batch, num_pairs, hidden_size); padding is 0."""
    return load_backend(BACKENDS, impl, hidden.device).views_forward(hidden, pairs)


@torch.library.register_fake("llmjepa_kernels::pair_views")
def _(hidden, pairs, impl):
    shape, dtype = (2, *pairs.shape[:2]), compute_dtype(hidden)
    return (
        hidden.new_empty((*shape, hidden.shape[2]), dtype=dtype),
        hidden.new_empty(shape, dtype=dtype),
    )


@backward_operation("llmjepa_kernels::pair_views_backward")
def _pair_views_backward(
    dviews: Tensor, hidden: Tensor, pairs: Tensor, views: Tensor, squares: Tensor, impl: str | None
) -> Tensor:
    return load_backend(BACKENDS, impl, hidden.device).views_backward(
        dviews.contiguous(), hidden, pairs, views, squares
    )


@torch.library.register_fake("llmjepa_kernels::pair_views_backward")
def _(dviews, hidden, *arguments):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _setup_views(ctx, inputs, output):
    hidden, pairs, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, pairs, *output)
    ctx.set_materialize_grads(False)


def _backward_views(ctx, dviews, _dsquares):
    if dviews is None:
        return None, None, None
    refuse_vmap(dviews)
    return _OPS.pair_views_backward(dviews, *ctx.saved_tensors, ctx.impl), None, None


torch.library.register_autograd(
    "llmjepa_kernels::pair_views", _backward_views, setup_context=_setup_views
)


class _EagerDistance(torch.autograd.Function):
    """`pair_distance` as autograd alone needs it, at a fraction of torch.library's cost."""

    @staticmethod
    def forward(ctx, hidden, pairs, metric, reduction, impl):
        loss, stats = _pair_distance(hidden, pairs, metric, reduction, impl)
        ctx.save_for_backward(hidden, pairs, stats)
        ctx.options = metric, reduction, impl
        return loss

    @staticmethod
    def backward(ctx, dloss):
        refuse_vmap(dloss)
        eager = runs_eagerly(dloss) and not torch.is_grad_enabled()
        run = _pair_distance_backward if eager else _OPS.pair_distance_backward
        return run(dloss, *ctx.saved_tensors, *ctx.options), None, None, None, None


class _EagerViews(torch.autograd.Function):
    """The same for `pair_views`."""

    @staticmethod
    def forward(ctx, hidden, pairs, impl):
        views, squares = _pair_views(hidden, pairs, impl)
        ctx.save_for_backward(hidden, pairs, views, squares)
        ctx.impl = impl
        return views

    @staticmethod
    def backward(ctx, dviews):
        refuse_vmap(dviews)
        eager = runs_eagerly(dviews) and not torch.is_grad_enabled()
        run = _pair_views_backward if eager else _OPS.pair_views_backward
        return run(dviews, *ctx.saved_tensors, ctx.impl), None, None


def check_hidden(hidden: Tensor) -> None:
    """Raises ValueError unless `hidden` is what the losses take."""
    if hidden.dim() != 3 or not hidden.dtype.is_floating_point:
        raise ValueError(
            "hidden must be floating point of shape (batch, seq, hidden_size), got "
            f"{hidden.dtype} of shape {tuple(hidden.shape)}"
        )
    if hidden.stride(-1) != 1 and hidden.shape[-1] != 1:
        raise ValueError(
            f"hidden must have unit stride in hidden_size, got strides {hidden.stride()}; "
            "call .contiguous()"
        )


def _check(hidden: Tensor, pairs: Tensor, metric: str, reduction: str, temperature: float) -> None:
    check_hidden(hidden)
    if pairs.dtype != torch.int64 or pairs.dim() != 3 or pairs.shape[::2] != (len(hidden), 2):
        raise ValueError(
            f"pairs must be int64 of shape (batch = {len(hidden)}, num_pairs, 2), got "
            f"{pairs.dtype} of shape {tuple(pairs.shape)}"
        )
    if pairs.device != hidden.device:
        raise ValueError(f"pairs must be on hidden's device {hidden.device}, got {pairs.device}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    check_finite("temperature", temperature, positive=True)
