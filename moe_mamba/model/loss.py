"""The loss: a sum and a count, so that micro-steps and devices add up to the mean over a whole batch."""

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""A target that is not counted."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross entropy over the targets that count.

    Args:
        logits: (..., vocab), any float dtype.
        targets: (...) int64; -100 is not counted.

    Returns:
        The sum in nats, () in fp32 (float64 for float64 logits), and how many targets count, () int64.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    total = functional.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (targets != IGNORED).sum()
