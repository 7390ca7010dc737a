"""A linear layer of bf16 on a CPU: a few rows in C++, as in generation, and all that the processor cannot multiply."""

import torch
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.few_rows import few_rows, most_rows
from moe_mamba.kernels.launch import unit_stride
from moe_mamba.kernels.linear import torch_linear
from moe_mamba.kernels.products import cpp_product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See ``moe_mamba.kernels.linear``."""
    if torch.is_grad_enabled() or x.dtype != torch.bfloat16:
        return torch_linear.linear(x, weight, bias, _widened)
    y = _product(x, weight)
    return y if bias is None else y + bias


def _run(x: Tensor, weight: Tensor) -> Tensor:
    if x.dim() != 2:
        return _run(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    y = x.new_empty(x.shape[0], weight.shape[0])
    if 0 < x.shape[0] <= most_rows():
        few_rows(unit_stride(x), unit_stride(weight), True, y)
    else:
        cpp_product(x, weight.t(), out=y)
    return y


_widened = torch_linear.define_widened("linear_cpu_widened", cpp_product)
_product = operators.define(
    "linear_cpu(Tensor x, Tensor weight) -> Tensor",
    _run,
    lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]),
    "CPU",
    is_constant=True,
)
