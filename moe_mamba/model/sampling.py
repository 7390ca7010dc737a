"""How the next token is drawn from logits: on the CPU, so that a seed gives the same text on any device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from moe_mamba.errors import UserError

CANDIDATES = 256  # most probable tokens among which top_p is looked for before the whole vocabulary is sorted

COLD = 1e-6  # a temperature below it takes the argmax: quotients by it overflow, and the best token has all the share


@dataclass(frozen=True)
class Sampling:
    """Which tokens may be drawn, and how likely each is.

    Attributes:
        temperature: divides the logits; 0 takes the argmax.
        top_k: only this many of the most probable tokens are drawn from; None: all.
        top_p: only the most probable tokens that together have this probability are drawn from (Holtzman et al., 2020).

    Raises:
        UserError: a setting out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature}: give 0 (greedy decoding) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} leaves no token: give 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is not a probability: give more than 0 and at most 1")

    def draw(self, logits: Tensor, generators: Sequence[Generator]) -> list[int]:
        """Draw a token for each row.

        Args:
            logits: (rows, vocab) on any device; greedy tokens are found there.
            generators: of the rows, on the CPU; each gives one number per token, so that rows do not depend on others.

        Raises:
            UserError: the logits are NaN or Inf.
        """
        if self.temperature < COLD:
            best, argmax = logits.max(dim=-1)
            _require_finite(best)
            return argmax.tolist()
        probability, token = self._candidates(logits.float().cpu() / self.temperature)
        total = probability.double().cumsum(-1)  # (rows, candidates)
        _require_finite(total[:, -1])
        uniform = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
        place = torch.searchsorted(total, torch.stack(uniform) * total[:, -1:], right=True)  # (rows, 1)
        # A product may be rounded up to the total itself, past the last token that has a share.
        last = (probability > 0).long().cumsum(-1).argmax(-1, keepdim=True)
        place = place.minimum(last)
        return (place if token is None else token.gather(1, place))[:, 0].tolist()

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shares (rows, candidates), which need not sum to one, and their tokens; None: every token, in order."""
        vocab = logits.shape[1]
        if self.top_k is None and self.top_p == 1:
            return logits.softmax(dim=-1), None
        count = min(CANDIDATES if self.top_k is None else self.top_k, vocab)
        value, token = logits.topk(count)
        whole = logits if self.top_k is None else value
        probability = (value - whole.logsumexp(-1, keepdim=True)).exp()
        if self.top_k is None and (probability.sum(-1) < self.top_p).any():
            probability, token = logits.softmax(dim=-1).sort(descending=True)
        # A token stays while those before it have less than top_p: so the first always does.
        before = probability.cumsum(-1) - probability
        return probability.masked_fill(before >= self.top_p, 0), token


def _require_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise UserError("the model's logits are NaN or Inf: use an earlier checkpoint")
