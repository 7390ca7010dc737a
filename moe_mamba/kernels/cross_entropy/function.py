"""What the torch, C++ and Triton versions share: the loss from a part's statistics, and what its gradient needs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_mamba.kernels import operators
from moe_mamba.kernels.cross_entropy import IGNORED, Reduce

Statistics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(logits, local targets) -> largest logit, sum of exp(logit - largest), logit of the target or 0; (tokens) each."""

Gradient = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(logits, local targets, log of the sum of exp(logit), incoming gradient) -> gradient of the logits.

A log of infinity marks a token that does not count; its gradient is 0, whatever its logits are.
"""


def define_parts(
    backend: str, statistics: Statistics, gradient: Gradient, key: str = operators.ANY_DEVICE
) -> tuple[Statistics, Gradient]:
    """A back end's two parts as operators; what stands between them may talk to other ranks, and is in no operator."""
    return (
        operators.define(
            f"cross_entropy_{backend}(Tensor logits, Tensor local) -> (Tensor largest, Tensor total, Tensor predicted)",
            statistics,
            _statistics_fake,
            key,
        ),
        operators.define(
            f"cross_entropy_{backend}_backward(Tensor logits, Tensor local, Tensor log_sum, Tensor incoming) -> Tensor",
            gradient,
            lambda logits, local, log_sum, incoming: logits.new_empty(logits.shape),
            key,
        ),
    )


def _statistics_fake(logits: Tensor, local: Tensor) -> tuple[Tensor, ...]:
    work = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(logits.shape[0], dtype=work) for _ in range(3))


def losses_of(
    parts: tuple[Tensor, Tensor, Tensor], targets: Tensor, local: Tensor, rows: int, reduce: Reduce | None
) -> tuple[Tensor, Tensor]:
    """Losses (tokens), and the logs that the gradient needs, infinity for tokens that do not count.

    Args:
        parts: what ``Statistics`` gives.
        targets: (tokens), of the whole vocabulary.
        local: the same as rows of these logits.
        rows: of these logits.
        reduce: see ``moe_mamba.kernels.cross_entropy``.
    """
    largest, total, predicted = parts
    if reduce is None:
        predicted = predicted.masked_fill((local < 0) | (local >= rows), torch.nan)
    else:
        largest, total, predicted = reduce(largest, total, predicted)
    log_sum, ignored = total.log() + largest, targets == IGNORED
    return (log_sum - predicted).masked_fill_(ignored, 0), log_sum.masked_fill(ignored, torch.inf)


def with_gradient(
    logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None, statistics: Statistics, gradient: Gradient
) -> tuple[Tensor, Tensor]:
    """Losses (tokens) and the gradient of their sum, without autograd."""
    local = targets - first
    losses, log_sum = losses_of(statistics(logits, local), targets, local, logits.shape[1], reduce)
    return losses, gradient(logits, local, log_sum, torch.ones_like(log_sum))


class CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came, and one number per token."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        first: int,
        reduce: Reduce | None,
        statistics: Statistics,
        gradient: Gradient,
    ) -> Tensor:
        """Losses (tokens); targets become local: rows of these logits, or outside of [0, rows)."""
        local = targets - first
        losses, log_sum = losses_of(statistics(logits, local), targets, local, logits.shape[1], reduce)
        ctx.save_for_backward(logits, local, log_sum)
        ctx.gradient = gradient
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of only the logits."""
        # contiguous: the gradient of a sum is one number expanded
        return ctx.gradient(*ctx.saved_tensors, incoming.contiguous()), None, None, None, None, None
