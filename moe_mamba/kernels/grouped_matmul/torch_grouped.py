"""``torch.nn.functional.grouped_mm``, with its two conditions met.

Its backward wants a gradient with real strides (the one that ``.sum()`` hands down is expanded), and all its row
strides must be multiples of 16 bytes, so that odd widths are padded with zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # bytes
# torch.compile knows shapes of bf16 products alone (torch 2.13): the others stay outside what it compiles.
_uncompiled = torch.compiler.disable(F.grouped_mm)


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See ``moe_mamba.kernels.grouped_matmul``."""
    out = weight.shape[2]
    multiple = ALIGNMENT // x.element_size()
    pad_in, pad_out = -x.shape[1] % multiple, -out % multiple
    if pad_in or pad_out:
        x, weight = F.pad(x, (0, pad_in)), F.pad(weight, (0, pad_out, 0, pad_in))
    offsets = counts.cumsum(0).to(torch.int32)  # end of each group
    multiply = F.grouped_mm if x.dtype == torch.bfloat16 else _uncompiled
    y = multiply(x.contiguous(), weight.contiguous(), offs=offsets)
    return _ContiguousGradient.apply(y)[:, :out]


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
