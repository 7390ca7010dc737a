"""The norm written down, plain autograd. It defines what the other back ends must give."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.rms_norm``."""
    stream = x if residual is None else residual + x
    wide = stream.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale * weight).to(x.dtype), stream
