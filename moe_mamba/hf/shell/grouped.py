"""Experts' products in plain torch: as many rows each as the router sent, or, with a capacity, all alike.

How many rows an expert has is known on the device alone, so what traces a graph (compile, export) sees one operator
where there is no capacity, and not a loop.
"""

from typing import Any

import torch
from torch import Tensor


def plain_grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, capacity: int | None) -> Tensor:
    """See ``moe_mamba.kernels.grouped_matmul``."""
    if capacity is not None:
        return torch.bmm(x.unflatten(0, (len(weight), capacity)), weight).flatten(0, 1)
    return grouped_product(x, weight, counts) if torch.compiler.is_compiling() else _products(x, weight, counts)


def _products(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each group's rows times its matrix: (rows, in), (groups, in, out), (groups,) -> (rows, out)."""
    parts = x.split(counts.tolist())
    return torch.cat([rows @ matrix for rows, matrix in zip(parts, weight, strict=True)])


@torch.library.custom_op("moe_mamba_plain::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``_products`` as one operator."""
    return _products(x, weight, counts)


@torch.library.custom_op("moe_mamba_plain::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, gradient: Tensor, counts: Tensor) -> Tensor:
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
    return grouped_product(gradient, weight.transpose(1, 2), counts), grouped_outer(x, gradient, counts), None


grouped_product.register_fake(_product_shape)
grouped_outer.register_fake(_outer_shape)
grouped_product.register_autograd(_gradients, setup_context=_keep)
