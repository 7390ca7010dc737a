"""What a source of windows answers, whatever it is made of: tokenized text (shards.py) or a task (synthetic.py)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.data.verification import ContentCheck


class Windows(NamedTuple):
    """Tokens and the targets that follow them, int64 of one shape; UNCOUNTED marks filling, and what is no target.

    ``ends`` is True at the last token of each document of a text, as its index tells; None: of no text.
    """

    tokens: np.ndarray
    targets: np.ndarray
    ends: np.ndarray | None = None


def stack(rows: Sequence[Windows]) -> Windows:
    """Windows of one source's kind, (length,) each, as one of (windows, length)."""
    ends = [row.ends for row in rows if row.ends is not None]
    tokens, targets = np.stack([row.tokens for row in rows]), np.stack([row.targets for row in rows])
    return Windows(tokens, targets, np.stack(ends) if ends else None)


class Source(Protocol):
    """A corpus to train on or to validate on."""

    @property
    def name(self) -> str:
        """As the user writes it, to read it again."""

    @property
    def identity(self) -> str:
        """Hash of what decides its windows: the order of training follows from it, and a resumed run wants the same."""

    @property
    def is_text(self) -> bool:
        """Whether it is documents, each with an end-of-text, which a prompt may continue; else sequences of symbols."""

    @property
    def extent(self) -> tuple[int, str]:
        """How much a validation reads, and of what: (32780, "tokens")."""

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text by tokens, end-of-text included; bits per byte = loss / ln 2 / this. None: not known."""

    @property
    def rejects(self) -> int:
        """Damaged lines or files that were left out."""

    @property
    def rejects_file(self) -> Path | None:
        """Where they are kept, with their places and bytes; None where there are none."""

    @property
    def notes(self) -> list[str]:
        """What a user should know of it before it is trained on, a line each."""

    def content_checks(self, tokenizer: Tokenizer | None = None) -> list[ContentCheck]:
        """What is found out by reading all its files whole; nothing where there are none."""

    def unigram_entropy(self) -> float | None:
        """Entropy of the tokens' frequencies in nats: the loss of a model that knows no context. None: of no text."""

    def windows(self, sequence_length: int) -> int | None:
        """How many windows an epoch of training has; None: they never end, and are read in order.

        Raises:
            UserError: it cannot be trained on at this length.
        """

    def window(self, number: int, sequence_length: int, seed: int) -> Windows:
        """A window to train on, (sequence_length,) each; ``seed`` is the run's, for what is drawn by chance."""

    def check_validation(self, sequence_length: int) -> None:
        """Raise a UserError where it cannot be validated on with windows of this length."""

    def check_targets(self, end_of_text: int, tokens: int | None = None) -> None:
        """Raise a UserError where document resets leave no target to count in its first ``tokens``; None: in all."""

    def validation_windows(self, sequence_length: int, batch: int) -> Iterator[Windows]:
        """Go over it in order: batches of (sequences, length), all of one shape, the last one filled."""
