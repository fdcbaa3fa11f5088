"""semantic_tube_loss: how far apart the directions of two stretches of a path of hidden states are.

A tube is two vectors, each a sum of steps from one hidden state to another. One operation takes the
vectors of all tubes out of the hidden states; their cosine distance is that of `last_token_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmjepa_kernels.ops.common import compute_dtype, real_tubes
from llmjepa_kernels.ops.loss import check_hidden, last_token_loss
from llmjepa_kernels.ops.registry import (
    backward_operation,
    load_backend,
    operation,
    refuse_vmap,
    runs_eagerly,
)

BACKENDS = {
    "triton": "llmjepa_kernels.ops.triton.tubes",
    "cpu": "llmjepa_kernels.ops.cpu",
    "reference": "llmjepa_kernels.ops.reference",
}
TUBE_SHAPE = (2, 3, 2)  # vectors, steps of each, start and end of a step


def semantic_tube_loss(
    hidden: Tensor, tubes: Tensor, *, reduction: str = "mean", impl: str | None = None
) -> Tensor:
    """The STP term: ``1 - cos(x, y)`` of the two vectors of each tube.

    Args:
        hidden: (batch, seq, hidden_size), the model's last hidden states.
        tubes: (batch, num_tubes, 2, 3, 2) int64. Each of the two vectors is the sum of
            ``hidden[end] - hidden[start]`` over up to three steps (start, end), row-local indices;
            a step of -1 is none. A tube without any step is padding and counts nowhere.
        reduction: "mean" over the tubes (0 if there are none), "sum", or "none" for
            (batch, num_tubes) with 0 for padding.
        impl: "triton", "cpu" or "reference". Default: by the device of `hidden`.

    Returns:
        loss: float32 (float64 for float64 `hidden`).

    Raises:
        ValueError: A shape, dtype, device or option differs from the above; says which.
        IndexError: A step lies outside the row (checked on the CPU; asserted on a GPU).

    Source: Semantic Tube Prediction, arXiv:2602.22617.
    """
    check_hidden(hidden)
    _check_tubes(hidden, tubes)
    if runs_eagerly(hidden, tubes):
        vectors = _EagerVectors.apply(hidden, tubes, impl)
    else:
        refuse_vmap(hidden, tubes)
        vectors = _OPS.tube_vectors(hidden, tubes, impl)
    batch, num_tubes = tubes.shape[:2]
    pairs = torch.arange(2 * num_tubes, device=hidden.device).view(1, num_tubes, 2)
    pairs = torch.where(real_tubes(tubes)[..., None], pairs, -1)
    return last_token_loss(
        vectors.view(batch, 2 * num_tubes, hidden.shape[2]), pairs, reduction=reduction, impl=impl
    )


# The operation as torch sees it.

_OPS = torch.ops.llmjepa_kernels


@operation("llmjepa_kernels::tube_vectors")
def _tube_vectors(hidden: Tensor, tubes: Tensor, impl: str | None) -> Tensor:
    """Both vectors of each tube, (batch, num_tubes, 2, hidden_size)."""
    return load_backend(BACKENDS, impl, hidden.device).tubes_forward(hidden, tubes)


@torch.library.register_fake("llmjepa_kernels::tube_vectors")
def _(hidden, tubes, impl):
    shape = (*tubes.shape[:3], hidden.shape[2])
    return hidden.new_empty(shape, dtype=compute_dtype(hidden))


@backward_operation("llmjepa_kernels::tube_vectors_backward")
def _tube_vectors_backward(
    dvectors: Tensor, tubes: Tensor, seq: int, dtype: torch.dtype, impl: str | None
) -> Tensor:
    """dhidden (batch, seq, hidden_size) of `dtype`."""
    backend = load_backend(BACKENDS, impl, dvectors.device)
    return backend.tubes_backward(dvectors.contiguous(), tubes, seq, dtype)


@torch.library.register_fake("llmjepa_kernels::tube_vectors_backward")
def _(dvectors, tubes, seq, dtype, impl):
    return dvectors.new_empty((len(tubes), seq, dvectors.shape[-1]), dtype=dtype)


def _setup(ctx, inputs, output):
    hidden, tubes, ctx.impl = inputs
    ctx.seq, ctx.dtype = hidden.shape[1], hidden.dtype
    ctx.save_for_backward(tubes)
    ctx.set_materialize_grads(False)


def _backward(ctx, dvectors):
    if dvectors is None:
        return None, None, None
    refuse_vmap(dvectors)
    run = _OPS.tube_vectors_backward
    return run(dvectors, *ctx.saved_tensors, ctx.seq, ctx.dtype, ctx.impl), None, None


torch.library.register_autograd("llmjepa_kernels::tube_vectors", _backward, setup_context=_setup)


class _EagerVectors(torch.autograd.Function):
    """`tube_vectors` as autograd alone needs it, at a fraction of torch.library's cost."""

    @staticmethod
    def forward(ctx, hidden, tubes, impl):
        ctx.save_for_backward(tubes)
        ctx.seq, ctx.dtype, ctx.impl = hidden.shape[1], hidden.dtype, impl
        return _tube_vectors(hidden, tubes, impl)

    @staticmethod
    def backward(ctx, dvectors):
        refuse_vmap(dvectors)
        eager = runs_eagerly(dvectors) and not torch.is_grad_enabled()
        run = _tube_vectors_backward if eager else _OPS.tube_vectors_backward
        return run(dvectors, *ctx.saved_tensors, ctx.seq, ctx.dtype, ctx.impl), None, None


def _check_tubes(hidden: Tensor, tubes: Tensor) -> None:
    right = tubes.dim() == 5 and len(tubes) == len(hidden) and tubes.shape[2:] == TUBE_SHAPE
    if tubes.dtype != torch.int64 or not right:
        raise ValueError(
            f"tubes must be int64 of shape (batch = {len(hidden)}, num_tubes, 2, 3, 2), got "
            f"{tubes.dtype} of shape {tuple(tubes.shape)}"
        )
    if tubes.device != hidden.device:
        raise ValueError(f"tubes must be on hidden's device {hidden.device}, got {tubes.device}")
