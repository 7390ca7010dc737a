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
        starts: (sequences, length) bool, True where a document or a window starts; None: documents run together.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    starts: torch.Tensor | None

    @property
    def counted(self) -> int:
        """Targets that the loss counts."""
        return int((self.targets != UNCOUNTED).sum())

    def uncounted(self) -> "Batch":
        """The same windows, of which the loss counts nothing."""
        return Batch(self.tokens, torch.full_like(self.targets, UNCOUNTED), self.starts)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        starts = None if self.starts is None else self.starts.to(device, non_blocking=True)
        return Batch(self.tokens.to(device, non_blocking=True), self.targets.to(device, non_blocking=True), starts)
