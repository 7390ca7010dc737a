"""Experts' products of bf16 on a CPU in C++: a few rows, as in generation, and all that the processor cannot do."""

import torch
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.few_rows import few_rows, most_rows
from moe_mamba.kernels.grouped_matmul import torch_grouped
from moe_mamba.kernels.grouped_matmul.loop import for_groups, product_of_rows
from moe_mamba.kernels.launch import unit_stride
from moe_mamba.kernels.products import cpp_product


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, capacity: int | None) -> Tensor:
    """See ``moe_mamba.kernels.grouped_matmul``."""
    if torch.is_grad_enabled() or x.dtype != torch.bfloat16:
        return torch_grouped.grouped_matmul(x, weight, counts, capacity, _trained)
    return _product(x, weight, counts)


def _run(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    x, y = unit_stride(x), x.new_empty(len(x), weight.shape[2])
    most = most_rows() if x.numel() and y.numel() else 0
    for group, rows in for_groups(counts):
        matrix = weight[group]
        if rows.stop - rows.start <= most and matrix.stride(1) == 1:
            few_rows(x[rows], matrix, False, y[rows])
        elif rows.stop - rows.start <= most and matrix.stride(0) == 1:
            few_rows(x[rows], matrix.t(), True, y[rows])
        else:
            product_of_rows(x, rows, matrix, y, cpp_product)
    return y


_trained = torch_grouped.define_products("grouped_matmul_cpu_trained", cpp_product)
_product = operators.define(
    "grouped_matmul_cpu(Tensor x, Tensor weight, Tensor counts) -> Tensor",
    _run,
    lambda x, weight, counts: x.new_empty(x.shape[0], weight.shape[2]),
    "CPU",
    is_constant=True,
)
