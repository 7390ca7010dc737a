"""Cross entropy written down, plain autograd. It defines what the other back ends must give."""

import torch
from torch import Tensor

from moe_mamba.kernels.cross_entropy import IGNORED, Reduce, torch_cross_entropy


def cross_entropy(logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None) -> Tensor:
    """See ``moe_mamba.kernels.cross_entropy``; with ``reduce``, which autograd cannot see through, torch's version."""
    if reduce is not None:
        return torch_cross_entropy.cross_entropy(logits, targets, first, reduce)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    local = targets - first
    is_outside = (local < 0) | (local >= logits.shape[1])
    predicted = wide.gather(1, local.masked_fill(is_outside, 0)[:, None])[:, 0].masked_fill(is_outside, torch.nan)
    return (wide.logsumexp(1) - predicted).masked_fill(targets == IGNORED, 0)
