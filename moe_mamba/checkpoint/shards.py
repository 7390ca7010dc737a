"""Shards of logical tensors: what a rank owns of the whole, said without its layout."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Size, Tensor


@dataclass(frozen=True)
class Shard:
    """A chunk of the logical tensor `name` of global `shape`, at `offsets`; `tensor` is this rank's memory of it.

    What is saved need not be in memory: `read` then gives it when its turn to be written comes, and `tensor`, on the
    meta device, has only its shape and dtype.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor
    read: Callable[[], Tensor] | None = None


def chunks_of_flat_range(shape: Sequence[int], start: int, stop: int) -> list[tuple[Size, Size, int]]:
    """Split elements `start` to `stop` of a row-major tensor into chunks: ZeRO owns flat ranges.

    Returns:
        (offsets, sizes, flat index of the first element) of each chunk, in order: at most 2 x dimensions - 1 of them,
        each of consecutive elements.
    """
    if start >= stop:
        return []
    if not shape:
        return [(Size(()), Size(()), start)]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        return _chunks_in_row(shape, last, start, stop)
    chunks = _chunks_in_row(shape, first - 1, start, first * row)
    if first < last:
        whole_rows = Size((first,) + (0,) * (len(shape) - 1)), Size((last - first, *shape[1:])), first * row
        chunks.append(whole_rows)
    return chunks + _chunks_in_row(shape, last, last * row, stop)


def _chunks_in_row(shape: Sequence[int], index: int, start: int, stop: int) -> list[tuple[Size, Size, int]]:
    """Chunks of a flat range that lies inside row `index` of the first dimension."""
    begin = index * math.prod(shape[1:])
    return [
        (Size((index, *offsets)), Size((1, *sizes)), begin + flat)
        for offsets, sizes, flat in chunks_of_flat_range(shape[1:], start - begin, stop - begin)
    ]
