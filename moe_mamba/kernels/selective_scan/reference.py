"""The recurrence written down: a loop over time, plain autograd. It defines what the other back ends must give."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.kernels.selective_scan.operands import Operands


def selective_scan(operands: Operands) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.selective_scan``; computes in fp64 for fp64 inputs, else in fp32."""
    x, delta, A, B, C, D, z, delta_bias, document_starts, initial_state = operands
    work = torch.promote_types(x.dtype, torch.float32)
    dtype = x.dtype
    x, A, B, C, D = (tensor.to(work) for tensor in (x, A, B, C, D))
    step = delta.to(work) if delta_bias is None else delta.to(work) + delta_bias.to(work)
    step = F.softplus(step)  # (batch, length, d_inner)
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(work)
    read = []
    for t, (x_t, step_t, B_t, C_t) in enumerate(zip(*(v.unbind(1) for v in (x, step, B, C)), strict=True)):
        if document_starts is not None:  # select, because 0 x NaN is NaN
            h = h.masked_fill(document_starts[:, t, None, None], 0)
        decay = torch.exp(step_t[..., None] * A)  # (batch, d_inner, d_state)
        h = decay * h + (step_t * x_t)[..., None] * B_t[:, None]
        read.append((h @ C_t[..., None])[..., 0])  # (batch, d_inner)
    y = torch.stack(read, 1) + D * x  # (batch, length, d_inner)
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(dtype), h
