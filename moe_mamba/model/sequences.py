"""What goes with the flat residual stream to every layer: its sequences, and what a caller wants to see of the pass."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recording:
    """Intermediate results that a caller asked for, appended layer by layer; a None list is not asked for.

    Attributes:
        streams: the residual stream (batch, length, d_model) before each layer.
        attentions: (batch, heads, length, past + length) weights of each attention layer; asking for them makes
            attention compute them, which takes memory by the square of the length.
        router_logits: (tokens, experts) of each router, in the dtype of its weight.
    """

    streams: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    router_logits: list[Tensor] | None = None


@dataclass(frozen=True)
class Sequences:
    """The shape that goes with a residual stream of (tokens, d_model), tokens = batch x length.

    Attributes:
        batch: sequences in the stream.
        length: tokens per sequence.
        document_starts: (batch, length) bool, True where a document starts and nothing before may be seen;
            None: a sequence is one document that may go on from a state passed in.
        recording: what the pass shall keep; by default nothing.
    """

    batch: int
    length: int
    document_starts: Tensor | None = None
    recording: Recording = field(default_factory=Recording)

    @property
    def tokens(self) -> int:
        """Tokens in the stream."""
        return self.batch * self.length

    def to(self, device: torch.device, non_blocking: bool = False) -> "Sequences":
        """The same with its tensor on another device."""
        if self.document_starts is None:
            return self
        return replace(self, document_starts=self.document_starts.to(device, non_blocking=non_blocking))
