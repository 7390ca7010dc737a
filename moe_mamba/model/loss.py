"""The loss: a sum and a count, so that micro-steps and devices add up to the mean over a whole batch."""

from torch import Tensor

from moe_mamba.kernels import cross_entropy
from moe_mamba.kernels.cross_entropy import IGNORED, Reduce


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, *, first: int = 0, reduce: Reduce | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sum the cross entropy over the targets that count.

    Args:
        logits: (..., vocab), any float dtype; of a sharded vocabulary, a part of its rows.
        targets: (...) int64, of the whole vocabulary; -100 is not counted.
        first: number of the first row that the logits have.
        reduce: combines the parts of a sharded vocabulary, see ``kernels.cross_entropy``.
        backend: see ``kernels.cross_entropy``.

    Returns:
        The sum in nats, () in fp32 (float64 for float64 logits), and how many targets count, () int64.
    """
    losses = cross_entropy(logits.flatten(0, -2), targets.flatten(), first, reduce, backend)  # (tokens,)
    return losses.sum(), (targets != IGNORED).sum()
