"""Sums over tensor-parallel ranks, with their gradients, where every rank keeps the whole.

Megatron-core's own reduce in place what they are given and return it. torch.compile takes that for a view whose base
changes, and refuses; and where it is not contiguous, a copy would be reduced and lost. These leave their input alone.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _Sum(torch.autograd.Function):
    """The sum over the ranks; what each does with it is its own, so a gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Share(torch.autograd.Function):
    """The same on all ranks; its gradient is the sum of what each of them does with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def sum_over_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' ``x``, on all of them; each rank's gradient is that of its own result.

    Args:
        x: of any shape, one on all ranks.
        group: the ranks.
    """
    return _Sum.apply(x, group)


def share_with_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """``x``, which all ranks have alike, for different uses on each; its gradient is the sum over them.

    Args:
        x: of any shape, the same on all ranks.
        group: the ranks.
    """
    return _Share.apply(x, group)
