"""Windows of tokens with their targets, as every source of data gives them."""

from dataclasses import dataclass

import torch

UNCOUNTED = -100  # target that the loss leaves out


@dataclass(frozen=True)
class Batch:
    """Windows of tokens.

    Attributes:
        tokens: (sequences, length) int64.
        targets: (sequences, length) int64, the token that follows; -100: not counted.
        document_starts: (sequences, length) bool, True where a document or a window starts; None: documents run on.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    document_starts: torch.Tensor | None

    @property
    def counted(self) -> int:
        """Targets that the loss counts."""
        return int((self.targets != UNCOUNTED).sum())

    def uncounted(self) -> "Batch":
        """The same windows, of which the loss counts nothing."""
        return Batch(self.tokens, torch.full_like(self.targets, UNCOUNTED), self.document_starts)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        tokens, targets = (tensor.to(device, non_blocking=True) for tensor in (self.tokens, self.targets))
        starts = None if self.document_starts is None else self.document_starts.to(device, non_blocking=True)
        return Batch(tokens, targets, starts)
