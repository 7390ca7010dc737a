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


def cross_entropy_with_gradient(
    logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None
) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.cross_entropy``; autograd's gradient."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        losses = cross_entropy(leaf, targets, first, reduce)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient
