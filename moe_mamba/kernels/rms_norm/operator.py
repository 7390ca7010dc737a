"""A back end of the norm as an operator: it keeps the stream and one number per row; autograd keeps three tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_mamba.kernels import operators


def define_norm(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[[Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]:
    """Make the operators ``name`` and ``name_backward``; returns the back end.

    Args:
        name: of the operator.
        forward: (x, weight, epsilon, residual) -> what ``new_outputs`` makes room for.
        backward: (gradient of y, gradient of the stream or None, stream, weight, scale) -> gradients of x (and of the
            residual, which is the same) and of the weight.
    """
    norm = operators.define(
        f"{name}(Tensor x, Tensor weight, float epsilon, Tensor? residual) -> (Tensor y, Tensor stream, Tensor scale)",
        forward,
        new_outputs,
    )
    gradient_of = operators.define(
        f"{name}_backward(Tensor y_gradient, Tensor? stream_gradient, Tensor stream, Tensor weight, Tensor scale) -> "
        "(Tensor x, Tensor weight)",
        backward,
        _backward_fake,
    )

    def gradients(
        ctx: Any, y_gradient: Tensor | None, stream_gradient: Tensor | None, scale_gradient: None
    ) -> tuple[Tensor | None, ...]:
        if y_gradient is None:
            return stream_gradient, None, None, stream_gradient if ctx.has_residual else None
        gradient, weight_gradient = gradient_of(y_gradient, stream_gradient, *ctx.saved_tensors)
        return gradient, weight_gradient, None, gradient if ctx.has_residual else None

    operators.differentiate(norm, _keep, gradients, gradient_of)

    def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        y, stream, _ = norm(x, weight, epsilon, residual)
        return y, x if residual is None else stream

    return rms_norm


def new_outputs(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, ...]:
    """Room for y, the stream (none without a residual), and one over the root mean square of each row."""
    work = torch.promote_types(x.dtype, torch.float32)
    stream = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), stream, x.new_empty(x.shape[:-1], dtype=work)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, residual = inputs
    _, stream, scale = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(*((scale,) if ctx.has_residual else (scale, stream)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(stream if ctx.has_residual else x, weight, scale)


def _backward_fake(
    y_gradient: Tensor, stream_gradient: Tensor | None, stream: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return stream.new_empty(stream.shape), weight.new_empty(weight.shape)
