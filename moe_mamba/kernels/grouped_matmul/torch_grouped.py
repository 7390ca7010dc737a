"""``torch.nn.functional.grouped_mm``, with its conditions met; where all groups are as high, one batched product.

Read in torch's source (2.11 to 2.13), and what follows from it:

- Its kernel is only for bf16 on GPUs of compute capability 9.0 and newer. Other dtypes and older GPUs, like CPUs, get
  a loop that reads the offsets, and so waits for the GPU. With a capacity there is nothing to read: ``bmm`` runs on
  every GPU in every dtype, and its gradients are products of transposed views.
- Addresses and row strides of all operands, the gradient too, are multiples of 16 bytes: odd widths are padded with
  zeros, odd addresses copied, and a gradient that is expanded (as ``.sum()`` hands it down) made real.
- Row-major weights (groups, in, out) are taken as they lie, and transposed views of them in the gradient of x. The
  gradient of the weights multiplies x transposed, with columns together, by rows: the one layout in which a group may
  be empty and of any height.
- On a CPU it multiplies one group after the other, as many rows as each has; see ``loop.py`` for bf16.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.grouped_matmul import loop
from moe_mamba.kernels.products import Product, is_bf16_on_cpu, multiplies_bf16, torch_product

ALIGNMENT = 16  # bytes


def _by_group(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One product for each group that has rows: the few tokens of a step of generation go to a few of the experts."""
    if is_bf16_on_cpu(x):
        return loop.product_by_group(x, weight, counts, torch_product)
    y = x.new_empty(len(x), weight.shape[2])
    for group, rows in loop.for_groups(counts):
        torch.mm(x[rows], weight[group], out=y[rows])
    return y


def _by_offsets(x: Tensor, weight: Tensor, counts: Tensor, product: Product) -> Tensor:
    if is_bf16_on_cpu(x):
        return loop.product_by_group(x, weight, counts, product)
    y = F.grouped_mm(_aligned(_padded(x)), _aligned(_padded(weight, 1)), offs=_offsets(counts))
    return _cropped(y, weight.shape[2])


def _x_gradient(gradient: Tensor, weight: Tensor, counts: Tensor, product: Product) -> Tensor:
    """The gradient of the rows, by transposed views of the matrices as they lie."""
    if is_bf16_on_cpu(gradient):
        return loop.product_by_group(gradient, weight.transpose(1, 2), counts, product)
    x_gradient = F.grouped_mm(
        _aligned(_padded(gradient)), _aligned(_padded(weight, 1)).transpose(1, 2), offs=_offsets(counts)
    )
    return _cropped(x_gradient, weight.shape[1])


def _weight_gradient(gradient: Tensor, x: Tensor, counts: Tensor, product: Product) -> Tensor:
    """The gradient of the matrices, (groups, in, out)."""
    if is_bf16_on_cpu(x):
        return loop.weight_gradient_by_group(gradient, x, counts, product)
    made = F.grouped_mm(_aligned(_padded(x)).t(), _aligned(_padded(gradient)), offs=_offsets(counts))
    return _cropped(made[:, : x.shape[1]], gradient.shape[1])


def _offsets(counts: Tensor) -> Tensor:
    """The end of each group."""
    return counts.cumsum(0, dtype=torch.int32)


def _padded(tensor: Tensor, leading: int = 0) -> Tensor:
    """With zeros up to a multiple of 16 bytes along the last dimension, and as many dimensions before it."""
    multiple = ALIGNMENT // tensor.element_size()
    padding = [amount for size in tensor.shape[: -2 - leading : -1] for amount in (0, -size % multiple)]
    return F.pad(tensor, padding) if any(padding) else tensor


def _cropped(tensor: Tensor, columns: int) -> Tensor:
    """The tensor itself, or a copy of its first columns."""
    return tensor[..., :columns].contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from an address that is a multiple of 16 bytes; the storage's own is one."""
    if tensor.numel() == 0:  # may be expanded, and counts as contiguous
        return tensor.new_empty(tensor.shape)
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.storage_offset() * tensor.element_size() % ALIGNMENT else tensor


def _product_fake(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def define_products(name: str, product: Product) -> operators.Operator:
    """The operator of a grouped product and its gradients; what this CPU does not multiply goes by ``product``.

    Operators, since torch's function knows only shapes of bf16 products (torch 2.13), and reads addresses here.
    """
    forward = operators.define(
        f"{name}(Tensor x, Tensor weight, Tensor counts) -> Tensor",
        partial(_by_offsets, product=product),
        _product_fake,
    )
    gradient_of_x = operators.define(
        f"{name}_backward_x(Tensor gradient, Tensor weight, Tensor counts) -> Tensor",
        partial(_x_gradient, product=product),
        lambda gradient, weight, counts: gradient.new_empty(gradient.shape[0], weight.shape[1]),
    )
    gradient_of_weight = operators.define(
        f"{name}_backward_weight(Tensor gradient, Tensor x, Tensor counts) -> Tensor",
        partial(_weight_gradient, product=product),
        lambda gradient, x, counts: x.new_empty(counts.shape[0], x.shape[1], gradient.shape[1]),
    )

    def gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, counts = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return (
            gradient_of_x(gradient, weight, counts) if needs_x else None,
            gradient_of_weight(gradient, x, counts) if needs_weight else None,
            None,
        )

    operators.differentiate(forward, _keep, gradients, gradient_of_x, gradient_of_weight)
    return forward


_product = define_products("grouped_matmul_torch", torch_product)
_product_by_group = operators.define(
    "grouped_matmul_torch_by_group(Tensor x, Tensor weight, Tensor counts) -> Tensor",
    _by_group,
    _product_fake,
    is_constant=True,
)


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    capacity: int | None,
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = _product,
) -> Tensor:
    """See ``moe_mamba.kernels.grouped_matmul``; ``product`` is an operator of ``define_products``."""
    if capacity is not None and (multiplies_bf16() or not is_bf16_on_cpu(x)):
        return torch.bmm(x.unflatten(0, (len(weight), capacity)), weight).flatten(0, 1)
    is_plain = x.device.type == "cpu" and not torch.is_grad_enabled()
    return _product_by_group(x, weight, counts) if is_plain else product(x, weight, counts)
