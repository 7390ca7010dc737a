"""Products of bf16 matrices with sums in fp32 in C++ (``csrc/product.cpp``), for processors that have no fast ones."""

import ctypes

import torch
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.extension import library


class _Product(ctypes.Structure):
    """``Product`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "inner", "columns", "threads")),
        *((name, ctypes.c_int64) for name in ("a_row", "a_inner", "b_inner", "b_column", "y_row")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "y")),
    )


def widened_product(a: Tensor, b: Tensor, y: Tensor) -> None:
    """Write ``a @ b``, (rows, inner) and (inner, columns), to ``y``; all bf16, with the library there.

    Each may lie in any order; a ``y`` whose columns lie apart is copied to. Sums are in fp32 and rounded once, in an
    order that does not depend on the number of threads.
    """
    _operator(a, b, y)


def _run(a: Tensor, b: Tensor, y: Tensor) -> None:
    if y.numel() > 0 and y.stride(1) != 1:
        made = torch.empty_like(y, memory_format=torch.contiguous_format)
        _run(a, b, made)
        y.copy_(made)
        return
    (rows, inner), columns = a.shape, b.shape[1]
    arguments = _Product(
        rows, inner, columns, torch.get_num_threads(),
        *a.stride(), *b.stride(), y.stride(0), a.data_ptr(), b.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    library().product(ctypes.byref(arguments))


# Also where it is called in no other operator, as by the head: fake tensors have no addresses.
_operator = operators.define(
    "widened_product(Tensor a, Tensor b, Tensor(c!) y) -> ()", _run, lambda a, b, y: None, "CPU", is_constant=True
)
