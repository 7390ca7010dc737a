"""Cross entropy of each token from logits that may be a part of the vocabulary's, never held in fp32 as a whole.

loss = log(sum over j of exp(logits[j])) - logits[target]

A vocabulary may be sharded over several ranks: each knows its shard's largest logit, sum and target, and ``reduce``
makes the vocabulary's of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels.backends import choose
from moe_mamba.kernels.validation import require_dimensions, require_shapes

__all__ = ["IGNORED", "Reduce", "cross_entropy", "cross_entropy_with_gradient"]

IGNORED = -100
"""The target of a token that does not count, as in torch."""

Reduce = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(largest, total, predicted) of a part of the vocabulary -> of the whole; (tokens) each."""


def cross_entropy(
    logits: Tensor, targets: Tensor, first: int = 0, reduce: Reduce | None = None, backend: str = "auto"
) -> Tensor:
    """The loss of each token; its gradient reaches the logits, in their dtype.

    Args:
        logits: (tokens, rows), of the vocabulary's rows ``first`` to ``first + rows - 1``; minus infinity is legal.
        targets: (tokens) int64, of the whole vocabulary; -100 is not counted.
        first: row of the vocabulary that the first logit belongs to.
        reduce: makes of this part's largest logit, sum of exp(logit - largest), and logit of the target (0 where the
            target lies elsewhere), (tokens) each, in fp32 at least, the whole vocabulary's; every part must then see
            the same results. Largest and sum of a part of nothing but minus infinity are minus infinity and 0.
            None: the logits are the whole vocabulary's.
        backend: ``auto``, or one of ``BACKENDS["cross_entropy"]``.

    Returns:
        (tokens) in fp32, fp64 for fp64 logits: 0, and so its gradient, where the target is -100. Where it lies
        outside the vocabulary, which a GPU cannot report without waiting for it: NaN without ``reduce``; with
        ``reduce``, where no part knows that none has the target, the loss of a target whose logit is constantly 0.

    Raises:
        UserError: shapes or dtypes that disagree, or a back end that does not exist.
    """
    _check("cross_entropy", logits, targets)
    _, function = choose("cross_entropy", logits.device.type, logits.dtype, backend)
    return function(logits, targets, first, reduce)


@torch.no_grad()
def cross_entropy_with_gradient(
    logits: Tensor, targets: Tensor, first: int = 0, reduce: Reduce | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The loss of each token, and the gradient of their sum with respect to the logits; without autograd.

    The logits are given up: where the back end can, the gradient takes their place in memory.

    Args:
        logits: see ``cross_entropy``, as for all others.
        targets: see there.
        first: see there.
        reduce: see there.
        backend: see there.

    Returns:
        Losses as ``cross_entropy`` has them, (tokens), and the gradient, (tokens, rows) in the logits' dtype.

    Raises:
        UserError: see there.
    """
    name = "cross_entropy_with_gradient"
    _check(name, logits, targets)
    _, function = choose(name, logits.device.type, logits.dtype, backend)
    return function(logits, targets, first, reduce)


def _check(name: str, logits: Tensor, targets: Tensor) -> None:
    require_dimensions(name, "logits", logits, "tokens rows")
    require_shapes(name, (("targets", targets, (logits.shape[0],)),))
    if targets.dtype != torch.int64:
        raise UserError(f"{name}: targets is {targets.dtype}, and must be torch.int64")
