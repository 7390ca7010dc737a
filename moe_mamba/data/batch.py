"""Windows of tokens with their targets, as every source of data gives them."""

from collections.abc import Callable
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

    def pinned_for(self, device: torch.device) -> "Batch":
        """The same batch in memory from which ``to`` copies without waiting: pinned for a GPU, as it is for a CPU.

        To pin takes a copy by the processor: for whoever reads ahead, beside the steps.
        """
        return self._map(torch.Tensor.pin_memory) if device.type == "cuda" else self

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device, on its way there; the caller waits only for memory that is not pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        starts = None if self.document_starts is None else change(self.document_starts)
        return Batch(change(self.tokens), change(self.targets), starts)
