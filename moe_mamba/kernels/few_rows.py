"""Products of a few bf16 rows with a bf16 matrix in C++ (``csrc/few_rows.cpp``), which is read once, as it lies."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from moe_mamba.kernels.extension import library
from moe_mamba.kernels.products import multiplies_bf16


class _FewRows(ctypes.Structure):
    """``FewRows`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "inner", "out", "is_transposed", "threads")),
        *((name, ctypes.c_int64) for name in ("x_stride", "weight_stride")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y")),
    )


def few_rows(x: Tensor, weight: Tensor, is_transposed: bool, y: Tensor) -> None:
    """Write the product of ``x`` (rows, in) and a matrix (in, out), or transposed (out, in), to ``y`` (rows, out).

    All are bf16, and the last axis of each is dense; ``y`` has no gaps. Sums are in fp32, in an order that does not
    depend on the number of threads.
    """
    rows, inner = x.shape
    arguments = _FewRows(
        rows, inner, y.shape[1], is_transposed, torch.get_num_threads(), x.stride(0), weight.stride(0),
        x.data_ptr(), weight.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    library().few_rows(ctypes.byref(arguments))


@cache
def most_rows() -> int:
    """Up to how many rows this is quicker than a library: those for bf16 win from 5 on, a detour over fp32 later."""
    return 4 if multiplies_bf16() else 16
