"""Pairs of measurements, taken in turns: what every row of the benchmark is made of."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch

Run = Callable[[], object]
Clock = Callable[[Run], float]  # milliseconds of one run
Pair = tuple[float, float | None]  # milliseconds of ours and of theirs


@dataclass(frozen=True)
class Row:
    """One line of the table; ``ratio`` says how many times better ours is, and ``goal`` what it should reach.

    Attributes:
        what: was measured.
        against: the peer.
        unit: of ours, theirs and floor.
        ours: median.
        theirs: median; None where the peer could not be measured.
        ratio: median of the pairs' ratios.
        goal: what the ratio should reach.
        skipped: why there is no figure of the peer.
        floor: the least that this machine could take; None where it was not worked out.
        floor_of: what sets the floor, ``bytes`` or ``operations``.
        interval: 95 % confidence interval of the ratio; None where there are too few pairs.
    """

    what: str
    against: str
    unit: str
    ours: float
    theirs: float | None
    ratio: float | None
    goal: float
    skipped: str = field(default="", kw_only=True)
    floor: float | None = field(default=None, kw_only=True)
    floor_of: str = field(default="", kw_only=True)
    interval: tuple[float, float] | None = field(default=None, kw_only=True)


class Absent(Exception):
    """A peer that this machine does not have: why, and how to get it."""


def peer(module: str, name: str, package: str, extra: str | None = None) -> Any:
    """What ``package`` calls ``name`` in ``module``; our optional dependencies ``extra`` bring it (None: all do).

    Raises:
        Absent: the package is not installed, or does not load.
    """
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == module.split(".")[0]:
            command = f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
            raise Absent(f"{package} is not installed: {command}") from error
        raise Absent(f"{package} does not load: {error}") from error
    except (ImportError, AttributeError) as error:
        raise Absent(f"{package} does not load: {error}") from error


class Elsewhere:
    """A run in a process of its own, whose allocator is as a user of it finds it, whatever we set for ours.

    Args:
        make: importable; makes the run there, on as many threads as here. May raise ``Absent``.
    """

    def __init__(self, make: Callable[[], Run]) -> None:
        self._process = ProcessPoolExecutor(1, get_context("spawn"))
        self._process.submit(_prepare, make, torch.get_num_threads()).result()

    def __call__(self) -> None:
        """Run, and wait for the end."""
        self._process.submit(_run_prepared).result()


_prepared: list[Run] = []  # in the other process


def _prepare(make: Callable[[], Run], threads: int) -> None:
    torch.set_num_threads(threads)
    _prepared.append(make())


def _run_prepared() -> None:
    _prepared[0]()


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, with columns for the floor and for the ratio's interval where there are any."""
    has_floor = any(row.floor is not None for row in rows)
    has_interval = any(row.interval is not None for row in rows)
    names = ["what", "against", "ours", "theirs", "ratio", "goal"] + ["floor"] * has_floor + ["95 %"] * has_interval
    lines = [names, ["---"] * len(names)]
    for row in rows:
        theirs = f"skipped: {row.skipped}" if row.theirs is None else f"{row.theirs:,.1f} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells = [row.what, row.against, f"{row.ours:,.1f} {row.unit}", theirs, ratio, f"{row.goal:g}"]
        if has_floor:
            cells.append("" if row.floor is None else f"{row.floor:,.2f} {row.unit} ({row.floor_of})")
        if has_interval:
            cells.append("" if row.interval is None else "{:.3f} to {:.3f}".format(*row.interval))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def wall_clock(run: Run) -> float:
    """Milliseconds on the clock of a run that is over when it returns."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def pair_row(
    what: str,
    against: str,
    ours: Run,
    theirs: Callable[[], Run],
    repeats: int,
    goal: float,
    *,
    clock: Clock = wall_clock,
    floor: tuple[float, str] | None = None,
) -> Row:
    """Measure a row of milliseconds; a peer that is absent, or that does not fit into memory, leaves a gap in it.

    Args:
        what: see ``Row``, as for ``against`` and ``goal``.
        against: see ``Row``.
        ours: a run of ours.
        theirs: makes a run of theirs; may raise ``Absent``.
        repeats: pairs.
        goal: see ``Row``.
        clock: measures a run.
        floor: milliseconds, and what sets them.
    """
    skipped = ""
    pairs: list[Pair] = []
    try:
        pairs = measure(ours, theirs(), repeats, clock)
    except Absent as reason:
        skipped = str(reason)
    except torch.OutOfMemoryError:
        skipped = "does not fit into the GPU's memory"
    if skipped:
        pairs = measure(ours, None, repeats, clock)
    least, of = floor or (None, "")
    return Row(
        what,
        against,
        "ms",
        *medians(pairs),
        goal=goal,
        skipped=skipped,
        floor=least,
        floor_of=of,
        interval=median_interval(ratios(pairs)),
    )


def compare(
    ours: Run, theirs: Run | None, repeats: int, clock: Clock = wall_clock
) -> tuple[float, float | None, float | None]:
    """Run both in turns; median milliseconds of ours and of theirs, and the median of theirs / ours of the pairs."""
    return medians(measure(ours, theirs, repeats, clock))


def measure(ours: Run, theirs: Run | None, repeats: int, clock: Clock = wall_clock) -> list[Pair]:
    """Run both in turns."""
    ours()  # the first pass of ours and of the allocator; theirs only gains by it
    pairs = []
    for number in range(repeats):
        print(f"\r{number + 1}/{repeats}", end="", file=sys.stderr, flush=True)
        pairs.append((clock(ours), clock(theirs) if theirs else None))
    print("\r\033[K", end="", file=sys.stderr)
    return pairs


def ratios(pairs: Sequence[Pair]) -> list[float]:
    """Theirs / ours of the pairs that have both."""
    return [other / one for one, other in pairs if other is not None]


def medians(pairs: Sequence[Pair]) -> tuple[float, float | None, float | None]:
    """Of ours, of theirs, and of the pairs' ratios."""
    theirs = [other for _, other in pairs if other is not None]
    return (
        statistics.median(one for one, _ in pairs),
        statistics.median(theirs) if theirs else None,
        statistics.median(ratios(pairs)) if theirs else None,
    )


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Between which two of the values the median of what they are drawn from lies, whatever its distribution.

    How many of n independent values lie below that median is binomial with probability 1/2 (the sign test); no value
    that a neighbour's work spoilt counts more than any other. None: so few values cannot be as confident.
    """
    count = len(values)
    outside, left = 0.0, -1  # values left out on either side
    while left + 1 < count / 2 and 2 * (outside + math.comb(count, left + 1) / 2**count) <= 1 - confidence:
        left += 1
        outside += math.comb(count, left) / 2**count
    if left < 0:
        return None
    ordered = sorted(values)
    return ordered[left], ordered[count - 1 - left]
