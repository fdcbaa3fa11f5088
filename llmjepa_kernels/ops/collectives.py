"""Collectives over processes that gradients flow through: all must call them, and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:  # builds of torch without distributed lack it
    from torch.distributed import ProcessGroup


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all processes' x. What each makes of it counts: their losses are added up."""
    return _Sum.apply(x, group)


def gather_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """All processes' x, of the same shape, one after the other along the first dimension."""
    return _Gather.apply(x, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx, dout):
        return _summed(dout, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, dout):
        parts = _summed(dout, ctx.group).chunk(distributed.get_world_size(ctx.group))
        return parts[distributed.get_rank(ctx.group)], None


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total
