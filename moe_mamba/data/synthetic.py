"""Synthetic tasks of Mamba's authors (Gu and Dao, arXiv 2312.00752, section 4.1): sequences made on the fly.

A sequence is a pure function of (seed, position), so batches depend neither on the layout nor on where a run was
resumed, and a longer run begins like a shorter one. Only answers are counted as targets. Of ``vocab_size`` ids the last
is the end-of-text of ``data.tokenizer=symbols``, which comes in no task; the others are the task's symbols.

induction_heads: symbols drawn evenly from all but the last, which is special and stands in two places: once anywhere,
followed by a symbol that is the answer, and again at the sequence's end, where the answer is the target (Olsson et al.,
arXiv 2209.11895; Fu et al., arXiv 2212.14052, section 3.1). With ``queries=N``, for training, half of the sequences ask
1 to N times: the special symbol also stands at random places between the two, and each time the answer, which is the
target there, follows: nearer answers show the way to the far one.

selective_copying: ``memorize`` symbols drawn evenly from all but the first, which is noise, and the last, which is a
marker, stand in order at random places among noise; then come ``memorize`` markers, at which those symbols are the
targets (the denoising task of Jing et al., arXiv 1706.02761).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from moe_mamba.data.batch import UNCOUNTED
from moe_mamba.data.source import Windows, stack
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.data.verification import ContentCheck
from moe_mamba.errors import UserError

PREFIX = "synthetic:"
NOISE = 0
OPTIONS = {
    "induction_heads": ("queries", "length", "sequences"),
    "selective_copying": ("memorize", "length", "sequences"),
}
FEWEST_SYMBOLS = {"induction_heads": 3, "selective_copying": 4}  # with fewer the answer is always the same

Split = Literal["train", "validation"]
Sequence = tuple[np.ndarray, np.ndarray]


def is_synthetic(source: str) -> bool:
    """Whether a source is a task and no text."""
    return source.startswith(PREFIX)


@dataclass(frozen=True)
class SyntheticTask:
    """A task, as ``synthetic:NAME[:option=number]...`` describes it.

    Attributes:
        name: the source as it was given.
        task: ``induction_heads`` or ``selective_copying``.
        vocab_size: ids of the tokenizer, its end-of-text included.
        queries: induction_heads: how often the answer is asked for at most.
        memorize: selective_copying: symbols to copy.
        length: tokens per sequence, for validation; None: those of the run or the command.
        sequences: how many a validation reads.
    """

    name: str
    task: str
    vocab_size: int
    queries: int = 1
    memorize: int = 16
    length: int | None = None
    sequences: int = 512

    @classmethod
    def parse(cls, source: str, vocab_size: int) -> "SyntheticTask":
        """Read a source.

        Raises:
            UserError: no such task or option, or too few ids for it.
        """
        task, *options = source.removeprefix(PREFIX).split(":")
        if task not in OPTIONS:
            raise UserError(f"{source}: no such task: choose among {', '.join(PREFIX + name for name in OPTIONS)}")
        numbers = {}
        for option in options:
            key, _, number = option.partition("=")
            if key not in OPTIONS[task] or not number.isdecimal() or int(number) < 1:
                known = ", ".join(f"{name}=N" for name in OPTIONS[task])
                raise UserError(
                    f"{source}: {option!r} is not an option of {task}: choose among {known}, with N of at least 1"
                )
            numbers[key] = int(number)
        if vocab_size - 1 < FEWEST_SYMBOLS[task]:
            least = FEWEST_SYMBOLS[task] + 1
            raise UserError(
                f"{source}: {vocab_size} ids are too few for this task: set model.vocab_size={least} or more"
            )
        return cls(source, task, vocab_size, **numbers)

    @property
    def identity(self) -> str:
        """Hash of what decides the sequences, beside their length and the seed."""
        described = {key: value for key, value in asdict(self).items() if key not in ("name", "length", "sequences")}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @property
    def is_text(self) -> bool:
        """See Source."""
        return False

    @property
    def extent(self) -> tuple[int, str]:
        """See Source."""
        return self.sequences, "sequences"

    @property
    def bytes_per_token(self) -> None:
        """See Source: symbols stand for no bytes."""

    @property
    def rejects(self) -> int:
        """See Source."""
        return 0

    @property
    def rejects_file(self) -> None:
        """See Source."""

    @property
    def notes(self) -> list[str]:
        """See Source."""
        return []

    def content_checks(self, tokenizer: Tokenizer | None = None) -> list[ContentCheck]:
        """See Source: there are no files."""
        return []

    def unigram_entropy(self) -> None:
        """See Source: only answers are targets."""

    def windows(self, sequence_length: int) -> None:
        """There is no end of them.

        Raises:
            UserError: sequences too short for the task, or another length in the source.
        """
        if self.length:
            raise UserError(f"data.train: {self.name}: training uses data.sequence_length: leave out length=")
        self.check_length(sequence_length)

    def window(self, number: int, sequence_length: int, seed: int) -> Windows:
        """The sequence of this position, from 0 on without end."""
        return self._draw("train", seed, number, sequence_length)

    def check_validation(self, sequence_length: int) -> None:
        """See Source."""
        self.check_length(self.length or sequence_length)

    def check_targets(self, end_of_text: int, tokens: int | None = None) -> None:
        """See Source: each sequence has an answer."""

    def validation_windows(self, sequence_length: int, batch: int) -> Iterator[Windows]:
        """Go over the validation set, which is the same for every seed of a run.

        Args:
            sequence_length: tokens per sequence, where the source names no length.
            batch: sequences of that length at once, fewer of longer ones; the last batch is filled with sequences
                whose targets are not counted.
        """
        length = self.length or sequence_length
        batch = max(1, batch * sequence_length // length) if length > sequence_length else batch
        for first in range(0, self.sequences, batch):
            drawn = [self._draw("validation", 0, position, length) for position in range(first, first + batch)]
            windows = stack(drawn)
            windows.targets[self.sequences - first :] = UNCOUNTED
            yield windows

    def check_length(self, length: int) -> None:
        """Refuse sequences that the task does not fit into.

        Raises:
            UserError: names the shortest that would do.
        """
        shortest = 3 if self.task == "induction_heads" else 2 * self.memorize
        if length < shortest:
            raise UserError(f"{self.name}: sequences of {length} tokens cannot hold the task: give {shortest} or more")

    def _draw(self, split: Split, seed: int, position: int, length: int) -> Windows:
        """One sequence: (length,) each."""
        draw = self._induction_heads if self.task == "induction_heads" else self._selective_copying
        return Windows(*draw(np.random.default_rng([split == "validation", seed, position]), length))

    def _induction_heads(self, generator: np.random.Generator, length: int) -> Sequence:
        special = self.vocab_size - 2
        tokens = _below(special, generator, length)
        targets = np.full(length, UNCOUNTED)
        place = int(_below(length - 2, generator, 1)[0])
        answer = tokens[place + 1]
        more = max(0, int(_below(2 * self.queries, generator, 1)[0]) - self.queries)
        free = np.arange(place + 2, length - 2, 2)
        asked = [*free[generator.random(len(free)).argsort()[:more]], length - 1]
        tokens[[place, *asked]] = special
        tokens[[query + 1 for query in asked[:-1]]] = answer
        targets[asked] = answer
        return tokens, targets

    def _selective_copying(self, generator: np.random.Generator, length: int) -> Sequence:
        marker, body = self.vocab_size - 2, length - self.memorize
        tokens, targets = np.full(length, NOISE), np.full(length, UNCOUNTED)
        places = np.sort(generator.random(body).argsort()[: self.memorize])
        tokens[places] = targets[body:] = 1 + _below(marker - 1, generator, self.memorize)
        tokens[body:] = marker
        return tokens, targets


def _below(limit: int, generator: np.random.Generator, count: int) -> np.ndarray:
    """Whole numbers from 0 to ``limit`` - 1, (count,) int64; from doubles, whose stream no NumPy release changes."""
    return (generator.random(count) * limit).astype(np.int64)
