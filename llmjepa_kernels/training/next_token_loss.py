"""The next-token loss, without all logits at once where there are many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llmjepa_kernels.example import IGNORE
from llmjepa_kernels.hf.forward import gather_tokens, mark_varying
from llmjepa_kernels.hf.head import Head
from llmjepa_kernels.hf.layer import running
from llmjepa_kernels.training import liger_head

MAX_LOGITS = 2**27  # 0.5 GiB in float32, of which the loss and its backward keep four copies

HEAD_IMPLS = {"liger": liger_head}


def next_token_loss(
    model: nn.Module,
    tensors: dict[str, Tensor],
    positions: Tensor,
    targets: Tensor,
    max_logits: int | None,
    head_impl: str | None = None,
) -> tuple[Any, Tensor]:
    """The outputs of one forward pass, and the sum of the next-token losses.

    Args:
        model: After `patch_model`.
        tensors: The arguments of its forward, but for the next.
        positions: (batch, n) int64, the tokens that need logits; −1 for padding.
        targets: (batch, n) int64, the token that follows each.
        max_logits, head_impl: See `llm_jepa_loss`.
    """
    if head_impl is not None:
        return _by_head_impl(model, tensors, positions, targets, head_impl)
    if max_logits is not None and not torch.compiler.is_compiling():
        head = Head(model)
        rows = max(1, max_logits // head.vocab_size)
        # Processes that share work find out together whether the head may be trusted, which can
        # take a second forward.
        finds_out = head.is_exact is None and is_distributed()
        if head.is_exact is not False and (targets.numel() > rows or finds_out):
            trusted = head.is_exact
            outputs, hidden = _forward_without_head(model, head, tensors, positions)
            if head.gives(hidden[:, : outputs.logits.shape[1]], outputs.logits):
                with head.precision(hidden.device):
                    return outputs, cross_entropy_in_parts(head, hidden, targets, rows)
            if trusted and is_distributed():  # others may see no need of another forward
                raise RuntimeError(
                    "the head gives other logits than the model does, which it did not at first: "
                    "pass max_logits=None"
                )
            del outputs, hidden  # their graph, before that of another forward
    outputs = _forward(model, tensors, positions)
    return outputs, cross_entropy_sum(outputs.logits, targets)


def _by_head_impl(
    model: nn.Module,
    tensors: dict[str, Tensor],
    positions: Tensor,
    targets: Tensor,
    head_impl: str,
) -> tuple[Any, Tensor]:
    if head_impl not in HEAD_IMPLS:
        raise ValueError(
            f"head_impl must be one of {sorted(HEAD_IMPLS)} or None, got {head_impl!r}"
        )
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"head_impl={head_impl!r} cannot be part of a compiled loss: compile the model alone"
        )
    fused = HEAD_IMPLS[head_impl]
    head = Head(model)
    fused.check(head, targets.device)
    outputs, hidden = _forward_without_head(model, head, tensors, positions)
    if not head.gives(hidden[:, : outputs.logits.shape[1]], outputs.logits):
        raise RuntimeError(
            f"head_impl={head_impl!r} needs the whole head, outside of FSDP and DeepSpeed, and "
            "nothing behind it but a factor and a cap that the config of "
            f"{type(head.model).__name__} names; its logits are others: pass head_impl=None"
        )
    with head.precision(hidden.device):
        return outputs, fused.cross_entropy(head, hidden, targets)


def _forward_without_head(
    model: nn.Module, head: Head, tensors: dict[str, Tensor], positions: Tensor
) -> tuple[Any, Tensor]:
    """Outputs with the logits of a few positions, and the last hidden states of all of them."""
    few = positions[:, :2]  # 2, since torch.compile makes a graph of its own for 1
    running.autocast = None
    outputs = _forward(model, tensors, few)
    head.autocast = running.autocast
    return outputs, gather_tokens(outputs.hidden_states[-1], positions)


def _forward(model: nn.Module, tensors: dict[str, Tensor], head_positions: Tensor) -> Any:
    tensors = {**tensors, "head_positions": head_positions}
    mark_varying(tensors.values())
    outputs = model(**tensors, use_cache=False)
    logits = getattr(outputs, "logits", None)  # which a model without a head has not
    if logits is None or logits.shape[:-1] != head_positions.shape:
        shape = None if logits is None else tuple(logits.shape)
        raise RuntimeError(
            f"the model must return logits of shape {(*head_positions.shape, 'vocab')} for "
            f"head_positions of shape {tuple(head_positions.shape)}, got {shape}"
        )
    if not outputs.hidden_states:
        raise RuntimeError(
            "the model must hand on the hidden_states of its base model, which hold the last one "
            f"for head_positions; got {outputs.hidden_states}"
        )
    return outputs


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross entropies of (…, vocab) logits and (…) targets, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def cross_entropy_in_parts(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, rows: int
) -> Tensor:
    """The same of ``head(hidden)``, whose logits exist for so many rows at once.

    The backward computes them again, which costs a third of the head's time.

    Args:
        hidden: (…, hidden_size).
        targets: (…) int64.
        rows: At least 1.
    """

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy_sum(head(hidden), targets)

    if targets.numel() <= rows:
        return part(hidden, targets)
    parts = zip(hidden.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True)
    sums = [checkpoint(part, *each, use_reentrant=False) for each in parts]
    return torch.stack(sums).sum()


def is_distributed() -> bool:
    """Whether processes train together."""
    there = distributed.is_available() and distributed.is_initialized()
    return there and distributed.get_world_size() > 1
