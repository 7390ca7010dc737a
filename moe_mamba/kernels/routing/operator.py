"""Gathering and combining of a back end as operators: which of its functions is whose gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_mamba.kernels import operators

Gathering = Callable[[Tensor, Tensor], Tensor]
"""(x (tokens, d), token (rows)) -> (rows, d)."""

Summation = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(rows (rows, d), weight (rows) or None, slot (tokens, k)) -> the sum over each token's slots, (tokens, d)."""

Spreading = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(gradient (tokens, d), rows (rows, d), weight (rows), token (rows)) -> gradients of the rows and of the weights."""


def define_gather(backend: str, gathering: Gathering, summation: Summation) -> Callable[..., Tensor]:
    """Make the operators of ``gather_rows``: a token's gradient is the sum over its slots."""
    name = f"gather_rows_{backend}"
    gather = operators.define(
        f"{name}(Tensor x, Tensor token, Tensor slot) -> Tensor",
        lambda x, token, slot: gathering(x, token),
        lambda x, token, slot: x.new_empty(token.shape[0], x.shape[1]),
    )
    gradient_of = operators.define(
        f"{name}_backward(Tensor gradient, Tensor slot) -> Tensor",
        lambda gradient, slot: summation(gradient, None, slot),
        _sums_fake,
    )

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    def gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient_of(gradient, *ctx.saved_tensors), None, None

    operators.differentiate(gather, keep, gradients, gradient_of)
    return gather


def define_combine(backend: str, summation: Summation, spreading: Spreading) -> Callable[..., Tensor]:
    """Make the operators of ``combine_rows``."""
    name = f"combine_rows_{backend}"
    combine = operators.define(
        f"{name}(Tensor rows, Tensor weight, Tensor token, Tensor slot) -> Tensor",
        lambda rows, weight, token, slot: summation(rows, weight, slot),
        _sums_fake,
    )
    gradient_of = operators.define(
        f"{name}_backward(Tensor gradient, Tensor rows, Tensor weight, Tensor token) -> (Tensor rows, Tensor weight)",
        spreading,
        lambda gradient, rows, weight, token: (rows.new_empty(rows.shape), weight.new_empty(weight.shape)),
    )

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    def gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *gradient_of(gradient, *ctx.saved_tensors), None, None

    operators.differentiate(combine, keep, gradients, gradient_of)
    return combine


def _sums_fake(rows: Tensor, *others: Tensor) -> Tensor:
    return rows.new_empty(others[-1].shape[0], rows.shape[1])
