"""What the torch and the Triton version share: which of their functions is whose gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gathering = Callable[[Tensor, Tensor], Tensor]
"""(x (tokens, d), token (rows)) -> (rows, d)."""

Summation = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(rows (rows, d), weight (rows) or None, slot (tokens, k)) -> the sum over each token's slots, (tokens, d)."""

Spreading = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rows (rows, d), weight (rows), token (rows), gradient (tokens, d)) -> gradients of the rows and of the weights."""


class Gather(torch.autograd.Function):
    """Rows of tokens; a token's gradient is the sum over its slots."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, slot: Tensor, gathering: Gathering, summation: Summation) -> Tensor:
        """Rows (rows, d)."""
        ctx.save_for_backward(slot)
        ctx.summation = summation
        return gathering(x, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of only x (tokens, d)."""
        (slot,) = ctx.saved_tensors
        return ctx.summation(gradient, None, slot), None, None, None, None


class Combine(torch.autograd.Function):
    """The weighted sum over each token's slots."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor, summation: Summation, spreading: Spreading
    ) -> Tensor:
        """Sums (tokens, d)."""
        ctx.save_for_backward(rows, weight, token)
        ctx.spreading = spreading
        return summation(rows, weight, slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows (rows, d) and weight (rows)."""
        rows_gradient, weight_gradient = ctx.spreading(*ctx.saved_tensors, gradient)
        return rows_gradient, weight_gradient, None, None, None, None
