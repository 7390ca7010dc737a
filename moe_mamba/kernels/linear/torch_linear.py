"""Torch's own linear layer; on a CPU that does not multiply bf16 fast, with products in fp32."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.products import Product, is_bf16_on_cpu, multiplies_bf16, torch_product


def define_widened(name: str, product: Product) -> operators.Operator:
    """The operator of bf16 rows and a bf16 weight that widens both, and its gradients, by ``product``.

    Operators, since plain torch would keep the widened matrices of every layer for the backward pass.
    """
    forward = operators.define(
        f"{name}(Tensor x, Tensor weight) -> Tensor",
        lambda x, weight: product(x, weight.t()),
        lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
    )
    gradient_of_x = operators.define(
        f"{name}_backward_x(Tensor gradient, Tensor weight) -> Tensor",
        lambda gradient, weight: product(gradient, weight),
        lambda gradient, weight: gradient.new_empty(gradient.shape[0], weight.shape[1]),
    )
    gradient_of_weight = operators.define(
        f"{name}_backward_weight(Tensor gradient, Tensor x) -> Tensor",
        lambda gradient, x: product(gradient.t(), x),
        lambda gradient, x: x.new_empty(gradient.shape[1], x.shape[1]),
    )

    def gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            gradient_of_x(gradient, weight) if needs_x else None,
            gradient_of_weight(gradient, x) if needs_weight else None,
        )

    operators.differentiate(forward, _keep, gradients, gradient_of_x, gradient_of_weight)
    return forward


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_widened = define_widened("linear_torch", torch_product)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, widened: Callable[[Tensor, Tensor], Tensor] = _widened
) -> Tensor:
    """See ``moe_mamba.kernels.linear``; ``widened`` multiplies where this CPU does not multiply bf16."""
    if multiplies_bf16() or not is_bf16_on_cpu(x):
        return F.linear(x, weight, bias)
    y = widened(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias
