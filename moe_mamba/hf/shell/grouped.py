"""Experts' products in plain torch: as many rows each as the router sent, or, with a capacity, all alike.

How many rows an expert has is known only on the device, so what traces a graph (compile, export) sees one operator
where there is no capacity, and not a loop.
"""

from typing import Any

import torch
from torch import Tensor


def plain_grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, capacity: int | None) -> Tensor:
    """See ``moe_mamba.kernels.grouped_matmul``."""
    if capacity is not None:
        return torch.bmm(x.unflatten(0, (len(weight), capacity)), weight).flatten(0, 1)
    if torch.compiler.is_compiling():
        return torch.ops.moe_mamba_plain.grouped_product(x, weight, counts)
    return _products(x, weight, counts)


def _products(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each group's rows times its matrix: (rows, in), (groups, in, out), (groups,) -> (rows, out)."""
    parts = x.split(counts.tolist())
    return torch.cat([rows @ matrix for rows, matrix in zip(parts, weight, strict=True)])


def _outer(x: Tensor, gradient: Tensor, counts: Tensor) -> Tensor:
    """The gradient of the matrices: (rows, in), (rows, out), (groups,) -> (groups, in, out)."""
    parts = zip(x.split(counts.tolist()), gradient.split(counts.tolist()), strict=True)
    return torch.stack([rows.t() @ part for rows, part in parts])


def _product_shape(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _outer_shape(x: Tensor, gradient: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], x.shape[1], gradient.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, counts = ctx.saved_tensors
    operators = torch.ops.moe_mamba_plain
    x_gradient = operators.grouped_product(gradient, weight.transpose(1, 2), counts)
    return x_gradient, operators.grouped_outer(x, gradient, counts), None


def _register() -> None:
    """Make the operators once per process: code of several folders may be loaded, and a second making breaks both."""
    if hasattr(torch.ops.moe_mamba_plain, "grouped_outer"):
        return
    product, outer = "moe_mamba_plain::grouped_product", "moe_mamba_plain::grouped_outer"
    torch.library.define(product, "(Tensor x, Tensor weight, Tensor counts) -> Tensor")
    torch.library.define(outer, "(Tensor x, Tensor gradient, Tensor counts) -> Tensor")
    torch.library.impl(product, "default", _products)
    torch.library.impl(outer, "default", _outer)
    torch.library.register_fake(product, _product_shape)
    torch.library.register_fake(outer, _outer_shape)
    torch.library.register_autograd(product, _gradients, setup_context=_keep)


_register()
