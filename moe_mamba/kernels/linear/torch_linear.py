"""Torch's own linear layer; on a CPU that does not multiply bf16 fast, with products in fp32."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.products import is_bf16_on_cpu, multiplies_bf16, product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See ``moe_mamba.kernels.linear``."""
    if multiplies_bf16() or not is_bf16_on_cpu(x):
        return F.linear(x, weight, bias)
    y = _widened(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight.t())


def _x_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    return product(gradient, weight)


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    return product(gradient.t(), x)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad
    return (
        _gradient_of_x(gradient, weight) if needs_x else None,
        _gradient_of_weight(gradient, x) if needs_weight else None,
    )


# Operators, since plain torch would keep the widened matrices of every layer for the backward pass.
_widened = operators.define(
    "linear_torch(Tensor x, Tensor weight) -> Tensor",
    _forward,
    lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
)
_gradient_of_x = operators.define(
    "linear_torch_backward_x(Tensor gradient, Tensor weight) -> Tensor",
    _x_gradient,
    lambda gradient, weight: gradient.new_empty(gradient.shape[0], weight.shape[1]),
)
_gradient_of_weight = operators.define(
    "linear_torch_backward_weight(Tensor gradient, Tensor x) -> Tensor",
    _weight_gradient,
    lambda gradient, x: x.new_empty(gradient.shape[1], x.shape[1]),
)
operators.differentiate(_widened, _keep, _gradients, _gradient_of_x, _gradient_of_weight)
