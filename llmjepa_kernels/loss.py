"""last_token_loss: the distance between the last tokens of paired views, as one operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llmjepa_kernels.attention import load_backend

BACKENDS = {
    "triton": "llmjepa_kernels.loss_triton",
    "cpu": "llmjepa_kernels.cpu",
    "reference": "llmjepa_kernels.reference",
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
    impl: str | None = None,
) -> Tensor:
    """The JEPA term: how far each predictor's hidden state is from its target's.

    Args:
        hidden: (batch, seq, hidden_size), the model's last hidden states.
        pairs: (batch, num_pairs, 2) int64, row-local indices of (predictor, target); a pair of
            -1 is padding and counts nowhere.
        metric: "cosine", 1 - cos(x, y); "l2", ``|x - y|``; "mse", the mean of ``(x - y)²``;
            "infonce", cross-entropy of the pair's cosine / `temperature` against the targets of
            all pairs of the batch.
        reduction: "mean" over the pairs (0 if there are none), "sum", or "none" for
            (batch, num_pairs) with 0 for padding.
        temperature: Of "infonce" only.
        impl: "triton", "cpu" or "reference". Default: by the device of `hidden`. "infonce" is
            plain PyTorch in all of them.

    Returns:
        loss: float32 (float64 for float64 `hidden`).

    Raises:
        ValueError: A shape, dtype, device or option differs from the above; says which.
        IndexError: A pair lies outside the row (checked on the CPU; asserted on a GPU).

    Source: LLM-JEPA, arXiv:2509.14252; InfoNCE, arXiv:1807.03748.
    """
    _check(hidden, pairs, metric, reduction, temperature)
    if metric == "infonce":
        load_backend(BACKENDS, impl, hidden.device)  # for its errors
        distance = _infonce(hidden, pairs, temperature)
    else:
        distance, _ = torch.ops.llmjepa_kernels.pair_distance(hidden, pairs, metric, impl)
    if reduction == "none":
        return distance
    total = distance.sum()
    if reduction == "sum":
        return total
    return total / (pairs[..., 0] >= 0).sum().clamp(min=1)


def _infonce(hidden: Tensor, pairs: Tensor, temperature: float) -> Tensor:
    """Cross-entropy over all targets of the batch; padding is neither query nor negative."""
    if not torch.compiler.is_compiling():  # the answer depends on data
        _check_range(pairs, hidden.shape[1])
    valid = pairs[..., 0] >= 0
    rows = torch.arange(len(pairs), device=pairs.device)[:, None, None]
    views = hidden[rows, pairs.clamp(min=0)]
    views = views.to(torch.promote_types(views.dtype, torch.float32))
    # What stands where padding points to must not reach the matrix product, NaN above all.
    views = torch.where(valid[..., None, None], views, 0.0)
    predictor, target = functional.normalize(views, dim=-1).flatten(0, 1).unbind(1)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = predictor @ target.mT / temperature
    logits = logits.masked_fill(~valid.flatten(), -torch.inf)
    own = torch.arange(len(logits), device=logits.device)
    # A padding pair's own column is hidden; give it a harmless label before it is zeroed.
    logits = torch.where(valid.flatten()[:, None], logits, 0.0)
    return functional.cross_entropy(logits, own, reduction="none").view_as(valid) * valid


@torch.library.custom_op("llmjepa_kernels::pair_distance", mutates_args=())
def _pair_distance(
    hidden: Tensor, pairs: Tensor, metric: str, impl: str | None
) -> tuple[Tensor, Tensor]:
    _check_range(pairs, hidden.shape[1])
    return load_backend(BACKENDS, impl, hidden.device).distance_forward(
        hidden, pairs, metric=metric
    )


@_pair_distance.register_fake
def _(hidden, pairs, metric, impl):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(pairs.shape[:2], dtype=dtype),
        hidden.new_empty((*pairs.shape[:2], 3), dtype=dtype),
    )


@torch.library.custom_op("llmjepa_kernels::pair_distance_backward", mutates_args=())
def _pair_distance_backward(
    ddistance: Tensor, hidden: Tensor, pairs: Tensor, stats: Tensor, metric: str, impl: str | None
) -> Tensor:
    return load_backend(BACKENDS, impl, hidden.device).distance_backward(
        ddistance.contiguous(), hidden, pairs, stats, metric=metric
    )


@_pair_distance_backward.register_fake
def _(ddistance, hidden, pairs, stats, metric, impl):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    hidden, pairs, ctx.metric, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, pairs, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, ddistance, _dstats):
    if ddistance is None:
        return None, None, None, None
    dhidden = torch.ops.llmjepa_kernels.pair_distance_backward(
        ddistance, *ctx.saved_tensors, ctx.metric, ctx.impl
    )
    return dhidden, None, None, None


torch.library.register_autograd(
    "llmjepa_kernels::pair_distance", _backward, setup_context=_setup_context
)


def _check(hidden: Tensor, pairs: Tensor, metric: str, reduction: str, temperature: float) -> None:
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
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_range(pairs: Tensor, seq: int) -> None:
    if pairs.device.type == "cpu" and pairs.numel():
        low, high = pairs.aminmax()
        if low.item() >= 0 and high.item() < seq:
            return  # as a rule: a row of small operations costs more than the loss itself
    padding = (pairs == -1).all(dim=-1, keepdim=True)
    wrong = ~padding & ((pairs < 0) | (pairs >= seq))
    if pairs.device.type != "cpu":
        torch._assert_async(~wrong.any(), "pairs must hold indices in 0 .. seq - 1, or -1 twice")
    elif wrong.any():
        b, p, _ = wrong.nonzero()[0].tolist()
        raise IndexError(
            f"pairs must hold indices in 0 .. {seq - 1}, or -1 twice for padding; "
            f"got pairs[{b}, {p}] = {pairs[b, p].tolist()}"
        )
