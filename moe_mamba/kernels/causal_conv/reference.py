"""The convolution written down: a loop over taps, plain autograd. It defines what the other back ends must give."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> Tensor:
    """See ``moe_mamba.kernels.causal_conv``, less its final state; computes in fp64 for fp64 inputs, else in fp32."""
    work = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[1], weight.shape[1]
    past = torch.cat((initial_state, x), 1).to(work)  # (batch, width - 1 + length, channels)
    out = bias.to(work).expand(x.shape)
    # True: a start lies between tap and present
    hidden = None if document_starts is None else torch.zeros_like(document_starts)
    for back in range(width):
        tap = past[:, width - 1 - back : width - 1 - back + length]
        if document_starts is not None and hidden is not None:
            tap = tap.masked_fill(hidden[..., None], 0)
            hidden = hidden | F.pad(document_starts, (back, 0))[:, :length]
        out = out + tap * weight[:, width - 1 - back].to(work)
    return F.silu(out).to(x.dtype)
