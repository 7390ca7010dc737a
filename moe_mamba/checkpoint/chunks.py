"""Arithmetic of chunks: whether they make up a tensor, and which of them a part of it lies in."""

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import product

import numpy as np

Extent = tuple[tuple[int, ...], tuple[int, ...]]  # a chunk's offsets and sizes


def fault_of_cover(shape: Sequence[int], chunks: Collection[Extent]) -> str | None:
    """What keeps `chunks` from holding every element of a tensor of `shape` exactly once; None where they do.

    How many chunks hold an element is a function over the tensor, and its mixed difference along all axes tells it
    whole. That of one chunk is plus or minus one at its corners: so it is enough to add up signed corners, 2^dimensions
    of them a chunk, and no chunk is compared with another.
    """
    signs = [(-1) ** sum(ends) for ends in product((0, 1), repeat=len(shape))]
    totals: dict[tuple[int, ...], int] = defaultdict(int)
    for offsets, sizes in chunks:
        for corner, sign in zip(_corners(offsets, sizes), signs, strict=True):
            totals[corner] += sign
    for corner, sign in zip(_corners((0,) * len(shape), shape), signs, strict=True):
        totals[corner] -= sign
    if not any(totals.values()):
        return None
    volume, whole = sum(math.prod(sizes) for _, sizes in chunks), math.prod(shape)
    return f"hold {volume:,} of {whole:,} elements" if volume != whole else "overlap, and leave holes elsewhere"


def _corners(offsets: Sequence[int], sizes: Sequence[int]) -> "product[tuple[int, ...]]":
    return product(*((offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)))


class Overlaps:
    """Finds the chunks, of many that make up a tensor, that a given chunk has elements in common with."""

    def __init__(self, chunks: Sequence[Extent]) -> None:
        self.number = {chunk: number for number, chunk in enumerate(chunks)}
        extents = np.array(chunks, dtype=np.int64)  # (chunks, 2, dimensions)
        begins, sizes = extents[:, 0], extents[:, 1]
        dimensions = range(begins.shape[1])
        # chunks are looked for among those that begin near, along the axis that tells most of them apart
        self.axis = max(dimensions, key=lambda axis: len(np.unique(begins[:, axis])), default=None)
        if self.axis is not None:
            self.order = np.argsort(begins[:, self.axis], kind="stable")
            self.begins, self.ends = begins[self.order], (begins + sizes)[self.order]
            self.longest = sizes[:, self.axis].max()

    def of(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[tuple[int, Extent]]:
        """(number, the common chunk) of each chunk that overlaps with the one of `sizes` at `offsets`."""
        same = self.number.get((offsets, sizes))
        if same is not None:  # the layout that saved goes on, or the tensor is a scalar
            return [(same, (offsets, sizes))]
        assert self.axis is not None
        begin, end = offsets[self.axis], offsets[self.axis] + sizes[self.axis]
        first, last = np.searchsorted(self.begins[:, self.axis], (begin - self.longest + 1, end))
        begins = np.maximum(self.begins[first:last], offsets)
        lengths = np.minimum(self.ends[first:last], np.add(offsets, sizes)) - begins
        found = (lengths > 0).all(axis=1)
        numbers = self.order[first:last][found].tolist()
        extents = zip(map(tuple, begins[found].tolist()), map(tuple, lengths[found].tolist()), strict=True)
        return list(zip(numbers, extents, strict=True))
