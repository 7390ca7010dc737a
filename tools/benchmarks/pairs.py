"""Pairs of measurements, taken in turns: what every row of the benchmark is made of."""

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
    """The rows in Markdown, with a column for the floor where there are any."""
    has_floor = any(row.floor is not None for row in rows)
    names = ["what", "against", "ours", "theirs", "ratio", "goal"] + ["floor"] * has_floor
    lines = [names, ["---"] * len(names)]
    for row in rows:
        theirs = f"skipped: {row.skipped}" if row.theirs is None else f"{row.theirs:,.1f} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells = [row.what, row.against, f"{row.ours:,.1f} {row.unit}", theirs, ratio, f"{row.goal:g}"]
        if has_floor:
            cells.append("" if row.floor is None else f"{row.floor:,.2f} {row.unit} ({row.floor_of})")
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
    other: Run | None = None
    try:
        other = theirs()
        figures = compare(ours, other, repeats, clock)
    except Absent as reason:
        skipped = str(reason)
    except torch.OutOfMemoryError:
        skipped = "does not fit into the GPU's memory"
    if skipped:
        other = None
        figures = compare(ours, None, repeats, clock)
    least, of = floor or (None, "")
    return Row(what, against, "ms", *figures, goal=goal, skipped=skipped, floor=least, floor_of=of)


def compare(
    ours: Run, theirs: Run | None, repeats: int, clock: Clock = wall_clock
) -> tuple[float, float | None, float | None]:
    """Run both in turns; median milliseconds of ours and of theirs, and the median of theirs / ours of the pairs."""
    ours()  # the first pass of ours and of the allocator; theirs only gains by it
    pairs = []
    for number in range(repeats):
        print(f"\r{number + 1}/{repeats}", end="", file=sys.stderr, flush=True)
        pairs.append((clock(ours), clock(theirs) if theirs else None))
    print("\r\033[K", end="", file=sys.stderr)
    both = [(one, other) for one, other in pairs if other is not None]
    return (
        statistics.median(one for one, _ in pairs),
        statistics.median(other for _, other in both) if both else None,
        statistics.median(other / one for one, other in both) if both else None,
    )
