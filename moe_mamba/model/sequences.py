"""How the flat residual stream is cut into sequences, and where documents start in them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """The shape that goes with a residual stream of (tokens, d_model), tokens = batch x length.

    Attributes:
        batch: sequences in the stream.
        length: tokens a sequence.
        starts: (batch, length) bool, True where a document starts and nothing before may be seen;
            None: a sequence is one document that may go on from a state passed in.
    """

    batch: int
    length: int
    starts: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens in the stream."""
        return self.batch * self.length
