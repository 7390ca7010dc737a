"""The recurrence in torch's own operations, in about 2 sqrt(length) steps in the place of length ones.

The length is split into sqrt(length) chunks that advance side by side. A first pass finds what each chunk adds to the
state that enters it; those are carried from chunk to chunk; a second pass starts every chunk from its own entering
state and reads. Nothing but plain operations, so it is differentiable, and what traces a graph sees all of it; the
graph grows with the square root of the length, which must be known when it is traced.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.kernels.selective_scan.operands import Operands


def selective_scan(operands: Operands) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.selective_scan``; computes in fp64 for fp64 inputs, else in fp32."""
    x, delta, A, B, C, D, z, delta_bias, document_starts, initial_state = operands
    dtype, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    batch, length, _ = x.shape
    size = 1
    while size * size < length:  # comparisons: a traced length is bounded by them, and need not be one number
        size += 1
    x, A, B, C, D = (tensor.to(work) for tensor in (x, A, B, C, D))
    step = F.softplus(delta.to(work) if delta_bias is None else delta.to(work) + delta_bias.to(work))

    def chunks(tensor: Tensor) -> Tensor:
        """(batch, length, ...) as (batch, chunks, size, ...); a step of zero behind the end leaves the state alone."""
        padding = (0, 0) * (tensor.dim() - 2) + (0, -length % size)
        return F.pad(tensor, padding).unflatten(1, (-1, size))

    steps, entering, B, C = (chunks(tensor) for tensor in (step, step * x, B, C))
    resets = None if document_starts is None else chunks(document_starts)

    def advance(h: Tensor, t: int) -> Tensor:
        """The states (batch, chunks, d_inner, d_state) after the chunks' tokens number ``t``."""
        if resets is not None:  # select, because 0 x NaN is NaN
            h = h.masked_fill(resets[:, :, t, None, None], 0)
        return torch.exp(steps[:, :, t, :, None] * A) * h + entering[:, :, t, :, None] * B[:, :, t, None]

    added = x.new_zeros(batch, steps.shape[1], *A.shape)
    for t in range(size):
        added = advance(added, t)
    decay = torch.exp(steps.sum(2)[..., None] * A)
    carried = [x.new_zeros(batch, *A.shape) if initial_state is None else initial_state.to(work)]
    for chunk in range(steps.shape[1]):
        passed = decay[:, chunk] * carried[-1]
        if resets is not None:
            passed = passed.masked_fill(resets[:, chunk].any(1)[:, None, None], 0)
        carried.append(passed + added[:, chunk])
    h, read = torch.stack(carried[:-1], 1), []
    for t in range(size):
        h = advance(h, t)
        read.append((h @ C[:, :, t, :, None])[..., 0])  # (batch, chunks, d_inner)
    y = torch.stack(read, 2).flatten(1, 2)[:, :length] + D * x
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(dtype), carried[-1]
