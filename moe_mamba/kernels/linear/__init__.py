"""A linear layer: torch's, but for bf16 on a CPU, where that is slow for a few rows, and on some processors for all."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.kernels.backends import choose

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """``x W^T + b``, as ``torch.nn.functional.linear``, whose errors are these.

    Args:
        x: (..., in).
        weight: (out, in), dtype of x.
        bias: (out), dtype of x.
        backend: ``auto``, ``cpu`` or ``torch``.

    Returns:
        (..., out) in the dtype of x.
    """
    if x.dtype != torch.bfloat16 or weight.dtype != x.dtype or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    _, function = choose("linear", "cpu", x.dtype, backend)
    return function(x, weight, bias)
