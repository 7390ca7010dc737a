"""A loop over groups, any dtype, plain autograd. It defines what the other back ends must give."""

import torch
from torch import Tensor


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, capacity: int | None) -> Tensor:
    """See ``moe_mamba.kernels.grouped_matmul``."""
    parts = x.split(read_counts(counts) if capacity is None else capacity)
    return torch.cat([rows @ matrix for rows, matrix in zip(parts, weight, strict=True)])


def read_counts(counts: Tensor) -> list[int]:
    """Rows of each group: read from the device, which is waited for."""
    return counts.tolist()
