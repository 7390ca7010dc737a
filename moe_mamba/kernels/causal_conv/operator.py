"""A back end of the convolution as an operator: nothing but the inputs is kept between forward and backward."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_mamba.kernels import operators

OPERANDS = "Tensor x, Tensor weight, Tensor bias, Tensor? document_starts, Tensor initial_state"


def define_conv(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], key: str = operators.ANY_DEVICE
) -> Callable[..., Any]:
    """Make the operators ``name`` and ``name_backward``; returns the back end, less its final state.

    Args:
        name: of the operator.
        forward: operands -> y.
        backward: (gradient of y, operands) -> gradients of x, weight, bias and the initial state.
        key: dispatch key of the devices.
    """
    run = operators.define(f"{name}({OPERANDS}) -> Tensor", forward, _forward_fake, key)
    gradients_of = operators.define(
        f"{name}_backward(Tensor y_gradient, {OPERANDS}) -> (Tensor x, Tensor weight, Tensor bias, Tensor state)",
        backward,
        _backward_fake,
        key,
    )

    def gradients(ctx: Any, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, state = gradients_of(y_gradient, *ctx.saved_tensors)
        return x, weight, bias, None, state

    operators.differentiate(run, _keep, gradients, gradients_of)
    return run


def define_step(name: str, run: Callable[..., Any], key: str = operators.ANY_DEVICE) -> Callable[..., Any]:
    """Make the operator of a step, (x, weight, bias, state) -> y and the new state; it has no gradient."""
    schema = f"{name}(Tensor x, Tensor weight, Tensor bias, Tensor state) -> (Tensor y, Tensor new_state)"
    return operators.define(schema, run, _step_fake, key, True)


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _forward_fake(x: Tensor, *others: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    y_gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> tuple[Tensor, ...]:
    weight_gradient = weight.new_empty(weight.t().shape).t()
    return (
        x.new_empty(x.shape),
        weight_gradient,
        bias.new_empty(bias.shape),
        initial_state.new_empty(initial_state.shape),
    )


def _step_fake(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)
