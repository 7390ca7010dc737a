"""Windows of tokens in a fixed order, as batches.

Window i of a corpus has the tokens [i L, i L + L) of its row as inputs and those one further as targets: no two
windows share an input, and the last target of one is the first input of the next.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from moe_mamba.data.batch import UNCOUNTED, Batch
from moe_mamba.data.order import blend, permute
from moe_mamba.data.shards import Shards
from moe_mamba.data.synthetic import SyntheticTask
from moe_mamba.errors import UserError


class Loader:
    """Batches by position: position p of a run is always the same window, whatever was read before."""

    def __init__(
        self,
        corpora: Mapping[str, Shards],
        weights: Mapping[str, float],
        sequence_length: int,
        seed: int,
        reset_at_document: bool,
        end_of_text: int,
    ) -> None:
        """Set the order.

        Args:
            corpora: name -> shards.
            weights: the same names -> share of the windows, in any unit.
            sequence_length: tokens a window.
            seed: another one gives another order.
            reset_at_document: mark the starts of documents, and do not count the target after an end-of-text.
            end_of_text: id of that token.

        Raises:
            UserError: a corpus is shorter than one window.
        """
        self._corpora = list(corpora.values())
        self._weights = [weights[name] for name in corpora]
        self._length = sequence_length
        self._seed = seed
        self._end_of_text = end_of_text
        self._reset = reset_at_document
        self._windows = [(shards.tokens - 1) // sequence_length for shards in self._corpora]
        for name, shards, windows in zip(corpora, self._corpora, self._windows, strict=True):
            if windows < 1:
                raise UserError(
                    f"{name}: {shards.tokens} tokens are fewer than one sequence of {sequence_length} and its last "
                    "target: lower data.sequence_length, or give more text"
                )

    def places(self, first_position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Number of the corpus, in the order given, and window, of positions from ``first_position``: (count,) each."""
        corpus, within = blend(np.arange(first_position, first_position + count), self._weights)
        window = np.empty_like(within)
        for number in np.unique(corpus):
            size, identity = self._windows[number], self._corpora[number].identity
            epoch, index = np.divmod(within, size)
            for turn in np.unique(epoch[corpus == number]):
                chosen = (corpus == number) & (epoch == turn)
                window[chosen] = permute(index[chosen], size, f"{self._seed}/{identity}/{self._length}/{turn}")
        return corpus, window

    def batch(self, first_position: int, count: int) -> Batch:
        """The ``count`` windows from ``first_position`` on."""
        rows = []
        for number, window in zip(*self.places(first_position, count), strict=True):
            start = int(window) * self._length
            rows.append(self._corpora[number].read(start, start + self._length + 1))
        return _make_batch(np.stack(rows), self._end_of_text, self._reset)


def evaluation_batches(
    shards: Shards | SyntheticTask, sequence_length: int, batch: int, end_of_text: int, reset_at_document: bool
) -> Iterator[Batch]:
    """Go over a corpus in order: each token is a target once, but for the first.

    Args:
        shards: the corpus; of a synthetic task, its validation set, whose sequences may have a length of their own.
        sequence_length: tokens a window; the last window is filled with end-of-text and uncounted targets.
        batch: windows a batch; the last batch is filled with windows of uncounted targets.
        end_of_text: id of that token.
        reset_at_document: mark the starts of documents, and do not count the target after an end-of-text.

    Raises:
        UserError: the corpus has no two tokens.
    """
    if isinstance(shards, SyntheticTask):
        yield from shards.evaluation_batches(sequence_length, batch)
        return
    if shards.tokens < 2:
        raise UserError(f"{shards.name}: {shards.tokens} tokens leave nothing to predict: give more text")
    starts = range(0, shards.tokens - 1, sequence_length)
    for first in range(0, len(starts), batch):
        rows = np.full((batch, sequence_length + 1), UNCOUNTED, dtype=np.int64)
        for row, start in zip(rows, starts[first : first + batch], strict=False):
            tokens = shards.read(start, min(start + sequence_length + 1, shards.tokens))
            row[: len(tokens)] = tokens
        yield _make_batch(rows, end_of_text, reset_at_document)


def _make_batch(rows: np.ndarray, end_of_text: int, reset_at_document: bool) -> Batch:
    """Cut (sequences, length + 1) ids into inputs and targets; -100 among them is filling."""
    tokens = torch.from_numpy(rows[:, :-1].copy())  # (sequences, length)
    targets = torch.from_numpy(rows[:, 1:].copy())  # (sequences, length)
    tokens[tokens == UNCOUNTED] = end_of_text
    if not reset_at_document:
        return Batch(tokens, targets, None)
    ends = tokens == end_of_text
    targets[ends] = UNCOUNTED
    starts = torch.ones_like(ends)
    starts[:, 1:] = ends[:, :-1]
    return Batch(tokens, targets, starts)
