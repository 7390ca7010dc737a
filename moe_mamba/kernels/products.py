"""Products of two matrices: torch's, but in fp32 for bf16 on a CPU that does not multiply bf16.

Without such instructions torch's products of bf16 take from four times (AVX-512) to fifty times (AVX2) as long as those
of fp32. So both matrices are widened there: in C++ as they are packed, or for torch, which costs a pass over them. What
is widened is not kept.
"""

import os
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from moe_mamba.kernels.backends import choose
from moe_mamba.kernels.levels import processor_flags, processor_vendor
from moe_mamba.kernels.widened import widened_product

ISA = "ONEDNN_MAX_CPU_ISA"  # environment variable: the most that oneDNN, which multiplies, may use
AMD = "AuthenticAMD"


def multiplies_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices faster than fp32 ones, and oneDNN is free to use that."""
    return read_processor()


# What traces a caller does not read files. torch.compiler.assume_constant_result would import the compiler.
multiplies_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def read_processor() -> bool:
    """See ``multiplies_bf16``, which does not read it twice."""
    flags, most = processor_flags(), os.environ.get(ISA, "ALL").upper()
    is_free = most in ("ALL", "DEFAULT")
    if "amx_bf16" in flags and (is_free or "AMX" in most):
        return True
    # Twice as fast as fp32 on AMD's since Zen 4. Intel's are no faster than fp32, and oneDNN packs for them.
    if "avx512_bf16" in flags and processor_vendor() == AMD:
        return is_free or any(name in most for name in ("BF16", "FP16", "AMX", "AVX10"))
    return "bf16" in flags and is_free  # ARM


def is_bf16_on_cpu(tensor: Tensor) -> bool:
    """Whether its products have a way of their own."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


class Product(Protocol):
    """``torch_product`` or ``cpp_product``."""

    def __call__(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """``a @ b``, (rows, inner) and (inner, columns), in their dtype.

        Args:
            a: may be transposed in memory, as ``b`` may.
            b: see there.
            out: where to write it.
        """


def torch_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """See ``Product``; by torch alone."""
    if not is_bf16_on_cpu(a) or multiplies_bf16():
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    made = torch.mm(a.float(), b.float())
    return made.to(a.dtype) if out is None else out.copy_(made)


def cpp_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """See ``Product``; for those who know that our C++ library is there."""
    if not is_bf16_on_cpu(a) or multiplies_bf16():
        return torch_product(a, b, out)
    y = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    widened_product(a, b, y)
    return y


def product_of(tensor: Tensor, backend: str) -> Product:
    """What multiplies such a tensor; ``backend``: as ``run.kernels``, of the linear layer."""
    if multiplies_bf16() or not is_bf16_on_cpu(tensor):
        return torch_product
    return cpp_product if choose("linear", "cpu", tensor.dtype, backend)[0] == "cpu" else torch_product


def window(rows: int) -> int:
    """How many rows to multiply where ``rows`` are wanted, so that few different numbers ever are.

    oneDNN makes code for every new shape, which takes 20 ms where the product itself takes one, and keeps that of the
    last 1,024. The numbers of rows that experts get change with every step: they are rounded up by 4 % on average, in
    eight steps to the next power of two, and to whole tiles of AMX, 16 rows.
    """
    step = max(16, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step
