"""Chunks that make up a tensor, and parts of them, against counting element by element."""

import random
import time

import numpy as np
import pytest

from moe_mamba.checkpoint.chunks import Extent, Overlaps, fault_of_cover


def split(generator: random.Random, offsets: list[int], sizes: list[int], depth: int) -> list[Extent]:
    """Split a chunk at random places along random axes."""
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    if not depth or not axes:
        return [(tuple(offsets), tuple(sizes))]
    axis = generator.choice(axes)
    first = generator.randrange(1, sizes[axis])
    left, right, begin = list(sizes), list(sizes), list(offsets)
    left[axis], right[axis] = first, sizes[axis] - first
    begin[axis] += first
    return split(generator, offsets, left, depth - 1) + split(generator, begin, right, depth - 1)


def slices(chunk: Extent) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(*chunk, strict=True))


@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (3, 4, 5), (2, 3, 2, 3), (0, 3)])
def test_only_chunks_that_hold_each_element_once_cover(shape: tuple[int, ...]) -> None:
    generator = random.Random(0)
    for _ in range(200):
        chunks = split(generator, [0] * len(shape), list(shape), 3)
        assert fault_of_cover(shape, chunks) is None
        change, chunk = generator.randrange(3), generator.choice(chunks)
        if change == 0:
            chunks.remove(chunk)
        elif change == 1:
            chunks.append(chunk)
        elif shape:  # moved by one, whether it fits there or not
            chunks[chunks.index(chunk)] = ((chunk[0][0] + 1, *chunk[0][1:]), chunk[1])
        held = np.zeros([size + 1 for size in shape], dtype=int)
        for chunk in chunks:
            held[slices(chunk)] += 1
        once = np.zeros_like(held)
        once[slices(((0,) * len(shape), shape))] = 1
        assert (fault_of_cover(shape, chunks) is None) == np.array_equal(held, once)


@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (3, 4, 5), (2, 3, 2, 3)])
def test_overlaps_are_found_all_and_exactly(shape: tuple[int, ...]) -> None:
    generator = random.Random(0)
    for _ in range(50):
        numbers = np.full(shape, -1)
        chunks = split(generator, [0] * len(shape), list(shape), 4)
        for number, chunk in enumerate(chunks):
            numbers[slices(chunk)] = number
        overlaps = Overlaps(chunks)
        for wanted in split(generator, [0] * len(shape), list(shape), 3):
            found = overlaps.of(*wanted)
            assert {number for number, _ in found} == set(np.unique(numbers[slices(wanted)]).tolist())
            assert len(found) == len({number for number, _ in found})
            common = [(number, numbers[slices(part)]) for number, part in found]
            assert all((part == number).all() for number, part in common)
            assert sum(part.size for _, part in common) == numbers[slices(wanted)].size


@pytest.mark.parametrize("shape", [(10_000, 64), (64, 10_000), (100, 100, 8)])
def test_ten_thousand_chunks_take_no_quadratic_time(shape: tuple[int, ...]) -> None:
    chunks: list[Extent] = [
        (position, (1, 1, 8) if len(shape) == 3 else tuple(1 if size == 10_000 else size for size in shape))
        for position in np.ndindex(tuple(1 if size < 100 else size for size in shape))
    ]
    assert len(chunks) == 10_000
    begin = time.perf_counter()
    assert fault_of_cover(shape, chunks) is None
    overlaps = Overlaps(chunks)
    assert len(overlaps.of((0,) * len(shape), shape)) == 10_000
    for offsets, sizes in chunks[:3000]:
        ((number, _),) = overlaps.of(offsets, (*sizes[:-1], sizes[-1]))
        assert chunks[number][0] == offsets
    assert time.perf_counter() - begin < 5, "0.3 s on an idle core"
