"""Which rank holds the others up, and whether the data comes in time: seen from times that ranks take anyway."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, median_low

from moe_mamba.parallel.topology import Topology
from moe_mamba.parallel.waiting import Waiting
from moe_mamba.run.console import Screen
from moe_mamba.run.events import Events
from moe_mamba.train.reading import Moment

MEASUREMENTS = 10  # that must agree before anything is said
SLOWER = 1.25  # a rank is slow where it computes so many times as long as the usual one
SLOWER_STILL = 1.1  # and remains so until it is below this: what varies around one limit would be said again and again
STALLED = 0.2  # the data is slow where a step spends this share of its time waiting for it
DELAY = 2  # steps: figures of a step travel so many steps later


@dataclass(frozen=True)
class _Measured:
    """A step of this rank."""

    after: Moment | None
    begin: Moment
    end: Moment
    waiting: Waiting
    data_seconds: float

    def figures(self) -> list[float]:
        """Seconds of computing, seconds in which the device waited for the step's data, seconds of the whole step."""
        seconds, data = self.end.seconds_since(self.begin), self.data_seconds
        if self.after is not None:  # while the host waited, a GPU may have been at the step before
            data = min(data, self.begin.seconds_since(self.after))
        return [max(seconds - self.waiting.seconds(), 0.0), data, seconds + data]


class Pace:
    """Measures steps on this rank, and judges those of all ranks.

    The measure of a rank is its own seconds of a step: from where all ranks begin it together to the end of the
    optimizer's step, less its seconds in collectives (parallel/waiting.py). The slowest rank has the most of them, and
    waits the least. A rank's figures travel with the collective of the step after the next one, when the device is done
    with what is measured: nothing waits for them. What lasts is said once, and again when it comes back.

    Args:
        topology: the ranks.
        every: steps between measurements, each of a step two before one that is logged.
        hosts: rank -> name of its machine.
        screen: where a line is said.
        events: where it is noted.

    Attributes:
        slowest: of two steps before this one, for the metrics; None where it was not measured, or there is one rank.
    """

    FIGURES = 3  # as `_Measured.figures` gives them

    def __init__(self, topology: Topology, every: int, hosts: Sequence[str], screen: Screen, events: Events) -> None:
        self.every, self.hosts, self.screen, self.events = every, hosts, screen, events
        self._topology = topology
        self._measured: dict[int, _Measured] = {}
        self._data_seconds = 0.0
        self._ratios: list[deque[float]] = [deque(maxlen=MEASUREMENTS) for _ in hosts]
        self._stalls: deque[tuple[float, int]] = deque(maxlen=MEASUREMENTS)
        self._slow: set[int] = set()
        self._is_stalled = False
        self.slowest: dict[str, float] | None = None

    def waited_for_data(self, seconds: float) -> None:
        """Note how long the host waited for batches before the coming step."""
        self._data_seconds = seconds

    @contextmanager
    def measured(self, step: int, after: Moment | None) -> Iterator[None]:
        """Measure step number `step` while the block lasts, if it is one of those that are.

        `after` is the end of the step before; None where it follows on none.
        """
        if (step + DELAY) % self.every:
            yield
            return
        device = self._topology.world.device
        waiting, begin = Waiting(device), Moment(device)
        with waiting.measured():
            yield
        self._measured[step] = _Measured(after, begin, Moment(device), waiting, self._data_seconds)

    def row(self, step: int) -> list[float]:
        """What this rank has to tell with step number `step`, for a sum over ranks; nothing if nothing was measured.

        Zeros stand for the other ranks' figures. Its own are of one rank alone: taken so many times as the sum over
        tensor-parallel ranks will be divided by.
        """
        measured = self._measured.pop(step - DELAY, None)
        if measured is None:
            return []
        own, world = [figure * self._topology.tensor for figure in measured.figures()], self._topology.world
        return [0.0] * len(own) * world.rank + own + [0.0] * len(own) * (world.size - world.rank - 1)

    def forget(self) -> None:
        """Leave out what was measured and not told yet."""
        self._measured.clear()

    def judge(self, step: int, figures: Sequence[float]) -> None:
        """Take in the figures of all ranks, one rank's after the other's, and find the slowest.

        Args:
            step: steps made.
            figures: `FIGURES` for each rank, the same on all; none: nothing was measured.
        """
        self.slowest = None
        if not figures:
            return
        compute, data, whole = (list(figures[number :: self.FIGURES]) for number in range(self.FIGURES))
        self._judge_ranks(step, compute)
        self._judge_data(step, [waited / seconds for waited, seconds in zip(data, whole, strict=True)])
        if len(compute) > 1:
            rank = max(range(len(compute)), key=compute.__getitem__)
            self.slowest = {
                "slowest_rank": rank,
                "slowest_seconds": compute[rank],
                "median_seconds": median(compute),
            }

    def _judge_ranks(self, step: int, compute: list[float]) -> None:
        usual = median_low(compute)
        for rank, (ratios, seconds) in enumerate(zip(self._ratios, compute, strict=True)):
            ratios.append(seconds / usual if usual else 1.0)
            limit = SLOWER_STILL if rank in self._slow else SLOWER
            is_slow = len(ratios) == MEASUREMENTS and median_low(ratios) >= limit
            if is_slow and rank not in self._slow:
                ratio, host = median_low(ratios), self.hosts[rank]
                self.events.write("slow_rank", step, rank=rank, host=host, times=round(ratio, 2))
                self.screen.say(f"slow      rank {rank} on {host} computes {ratio:.2f} times as long as the usual rank")
            elif rank in self._slow and not is_slow:
                self.events.write("slow_rank_over", step, rank=rank, host=self.hosts[rank])
            self._slow = self._slow | {rank} if is_slow else self._slow - {rank}

    def _judge_data(self, step: int, shares: list[float]) -> None:
        worst = max(range(len(shares)), key=shares.__getitem__)
        self._stalls.append((shares[worst], worst))
        share = median_low(share for share, _ in self._stalls)
        is_stalled = len(self._stalls) == MEASUREMENTS and share > STALLED
        if is_stalled and not self._is_stalled:
            host = self.hosts[worst]
            self.events.write("data_stall", step, share=round(share, 3), rank=worst, host=host)
            self.screen.say(
                f"data      steps wait {100 * share:.0f}% of their time for data, longest on {host} (rank {worst}): "
                "put data.cache and the shards on a local disk, or leave a CPU core per process free for reading"
            )
        elif self._is_stalled and not is_stalled:
            self.events.write("data_stall_over", step)
        self._is_stalled = is_stalled
