"""Windows of tokens in a fixed order, as batches.

Windows of a source come in an order of each epoch's own, or one after the other where they never end; each of several
sources gets its share by weight (order.py).
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from moe_mamba.data.batch import UNCOUNTED, Batch
from moe_mamba.data.order import blend, permute
from moe_mamba.data.source import Source, Windows, stack
from moe_mamba.errors import UserError


class Loader:
    """Batches by position: position p of a run is always the same window, whatever was read before."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        sequence_length: int,
        seed: int,
        reset_at_document: bool,
        end_of_text: int,
    ) -> None:
        """Set the order.

        Args:
            sources: by name; one whose windows never end stands alone.
            weights: the same names -> share of the windows, in any unit.
            sequence_length: tokens per window.
            seed: another one gives another order.
            reset_at_document: mark the starts of documents, and do not count the target behind a document's end.
            end_of_text: id of that token.

        Raises:
            UserError: a source is shorter than one window, or cannot be trained on beside others.
        """
        self._sources = list(sources.values())
        self._weights = [weights[name] for name in sources]
        self._length = sequence_length
        self._seed = seed
        self._end_of_text = end_of_text
        self._reset = reset_at_document and all(source.is_text for source in self._sources)
        self._windows: list[int | None] = []
        for name, source in sources.items():
            windows = source.windows(sequence_length)
            self._windows.append(windows)
            if windows is None and len(sources) > 1:
                raise UserError(f"data.train: {name} must be the only source: leave the others out")
            if windows == 0:
                size, unit = source.extent
                raise UserError(
                    f"{name}: {size} {unit} are fewer than one sequence of {sequence_length} and its last "
                    "target: lower data.sequence_length, or give more text"
                )
            if self._reset and windows is not None:
                source.check_targets(end_of_text, windows * sequence_length)

    @property
    def is_finite(self) -> bool:
        """Whether the windows come again after an epoch."""
        return None not in self._windows

    def places(self, first_position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Number of the corpus, in the order given, and window, of positions from ``first_position``: (count,) each."""
        corpus, within = blend(np.arange(first_position, first_position + count), self._weights)
        window = within.copy()
        for number in np.unique(corpus):
            size, identity = self._windows[number], self._sources[number].identity
            if size is None:
                continue
            epoch, index = np.divmod(within, size)
            for turn in np.unique(epoch[corpus == number]):
                chosen = (corpus == number) & (epoch == turn)
                window[chosen] = permute(index[chosen], size, f"{self._seed}/{identity}/{self._length}/{turn}")
        return corpus, window

    def batch(self, first_position: int, count: int) -> Batch:
        """The ``count`` windows from ``first_position`` on."""
        rows = [
            self._sources[number].window(int(window), self._length, self._seed)
            for number, window in zip(*self.places(first_position, count), strict=True)
        ]
        return _make_batch(stack(rows), self._end_of_text, self._reset)


def evaluation_batches(
    source: Source, sequence_length: int, batch: int, end_of_text: int, reset_at_document: bool
) -> Iterator[Batch]:
    """Go over a source in order: each token of a text is a target once, but for the first.

    Args:
        source: the corpus; of a synthetic task, its validation set, whose sequences may have a length of their own.
        sequence_length: tokens per window; the last window is filled with end-of-text and uncounted targets.
        batch: windows a batch; the last batch is filled with windows of uncounted targets.
        end_of_text: id of that token.
        reset_at_document: mark the starts of documents, and do not count the target behind a document's end.

    Raises:
        UserError: the source has fewer than two tokens, or no target, or its sequences are too short for it.
    """
    source.check_validation(sequence_length)
    if reset_at_document:
        source.check_targets(end_of_text)
    for windows in source.validation_windows(sequence_length, batch):
        yield _make_batch(windows, end_of_text, reset_at_document)


def _make_batch(windows: Windows, end_of_text: int, reset_at_document: bool) -> Batch:
    """Windows (sequences, length), which are taken over, as tensors; filling becomes end-of-text.

    A text's document begins behind each end that its index tells, and behind each end-of-text.
    """
    tokens, targets = map(torch.from_numpy, windows[:2])
    tokens[tokens == UNCOUNTED] = end_of_text
    if not reset_at_document or windows.ends is None:
        return Batch(tokens, targets, None)
    ends = torch.from_numpy(windows.ends) | (tokens == end_of_text)
    targets[ends] = UNCOUNTED
    document_starts = torch.ones_like(ends)
    document_starts[:, 1:] = ends[:, :-1]
    return Batch(tokens, targets, document_starts)
