"""Pairs of measurements, taken in turns: what every row of the benchmark is made of."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table; ``ratio`` says how many times better ours is, and ``goal`` what it should reach."""

    what: str
    against: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    goal: float


def compare(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Run both in turns; median milliseconds of ours and of theirs, and the median of theirs / ours of the pairs."""
    ours()  # the first pass of ours and of the allocator; theirs only gains by it
    pairs = []
    for number in range(repeats):
        print(f"\r{number + 1}/{repeats}", end="", file=sys.stderr, flush=True)
        pairs.append((_milliseconds(ours), _milliseconds(theirs)))
    print("\r\033[K", end="", file=sys.stderr)
    return (
        statistics.median(one for one, _ in pairs),
        statistics.median(other for _, other in pairs),
        statistics.median(other / one for one, other in pairs),
    )


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
