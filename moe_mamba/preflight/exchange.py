"""What ranks tell each other before there is a process group: through torch's store at MASTER_ADDR:MASTER_PORT.

A process group cannot be asked whether it can be made: where a host name leads nowhere, gloo ends in a traceback on
some ranks and the others wait for hours. The store needs one port on rank 0's machine, and tells who did not come.
"""

import time
from types import NoneType
from typing import Any

import torch.distributed as dist

from moe_mamba.errors import UserError
from moe_mamba.parallel.messages import Text
from moe_mamba.parallel.store import adapter, checked, wait_for_keys
from moe_mamba.parallel.topology import World

SAMPLES = 8  # round trips of which the quickest is taken
SAID = 8  # ranks that a line names


class Exchange:
    """Every rank makes the same calls in the same order, and each call waits for who has to say something.

    Args:
        world: whose ranks they are.
        store: that all of them reach, as ``parallel.meeting.Meeting`` has one.
        timeout: seconds that a rank waits for the others in each call.
    """

    def __init__(self, world: World, store: dist.Store, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self._store = store
        self._calls = 0

    def to_first(self, value: Any = None, kind: Any = NoneType) -> list[Any] | None:
        """Every rank's value, as JSON, in the order of ranks, on rank 0; None on the others.

        Args:
            value: this rank's.
            kind: its type, that pydantic knows.

        Raises:
            UserError: ranks do not come in time; rank 0 names them, and the others hear it at the next `from_first`.
        """
        name = self._next()
        self._store.set(f"{name}/{self.world.rank}", adapter(kind).dump_json(value).decode())
        if not self.world.is_first:
            return None
        keys = [f"{name}/{rank}" for rank in range(self.world.size)]
        if not self._wait(keys, self.timeout):
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            named = ", ".join(map(str, missing[:SAID])) + ", ..." * (len(missing) > SAID)
            line = (
                f"{len(missing)} of {self.world.size} ranks did not come within {self.timeout:.0f} s: {named}: "
                "see why on their machines, or start as many processes as there are"
            )
            self._publish(self._calls + 1, (line, None), None)
            raise UserError(line)
        return [checked(value, kind) for value in self._store.multi_get(keys)]

    def from_first(self, value: Any = None, kind: Any = NoneType) -> Any:
        """What rank 0 has, as JSON, on every rank.

        Args:
            value: rank 0's.
            kind: its type, that pydantic knows.

        Raises:
            UserError: rank 0 refuses, or says nothing in time.
        """
        name = self._next()
        if not self.world.is_first:
            return self._hear(name, kind)
        self._publish(self._calls, (None, value), kind)
        return value

    def each_from_first(self, values: list[Any] | None, kind: Any) -> Any:
        """What rank 0 has for this rank alone: a list that all had to read would be as many lists as ranks.

        Args:
            values: of all ranks in their order, on rank 0; None on the others.
            kind: the type of one, that pydantic knows.

        Raises:
            UserError: as `from_first`.
        """
        key = f"{self._calls + 1}/own"
        if not self.world.is_first:
            self.from_first()
            return checked(self._get(f"{key}/{self.world.rank}", self.timeout), kind)
        assert values is not None
        for rank, value in enumerate(values[1:], 1):
            self._store.set(f"{key}/{rank}", adapter(kind).dump_json(value).decode())
        self.from_first()
        return values[0]

    def clock_offset(self, ranks: list[int], is_asked: bool) -> tuple[float, float] | None:
        """Seconds that this rank's wall clock is ahead of rank 0's, and the delay of the sample, on each that is asked.

        Args:
            ranks: that are asked; needed on rank 0 alone.
            is_asked: whether this rank is.

        As NTP measures (RFC 5905, section 8): of several round trips the one with the smallest delay, in the middle of
        which rank 0 looked at its clock.
        """
        name = self._next()
        if self.world.is_first:
            for rank in ranks:
                for sample in range(SAMPLES):
                    self._get(f"{name}/{rank}/{sample}/ask", self.timeout)
                    self._store.set(f"{name}/{rank}/{sample}/answer", repr(time.time()))
        if not is_asked:
            return None
        trips = []
        for sample in range(SAMPLES):
            begin = time.time()
            self._store.set(f"{name}/{self.world.rank}/{sample}/ask", "")
            there = checked(self._get(f"{name}/{self.world.rank}/{sample}/answer", 2 * self.timeout), float)
            end = time.time()
            trips.append((end - begin, (begin + end) / 2 - there))
        delay, offset = min(trips)
        return offset, delay

    def _next(self) -> str:
        self._calls += 1
        return str(self._calls)

    def _publish(self, call: int, message: tuple[str | None, Any], kind: Any) -> None:
        """Say why rank 0 refuses, or its value: for the call that the others are in, or come to next."""
        self._store.set(f"{call}/first", adapter(tuple[Text | None, kind]).dump_json(message).decode())

    def _hear(self, name: str, kind: Any) -> Any:
        message = self._get(f"{name}/first", 2 * self.timeout)  # rank 0 may wait for another meanwhile
        refused, value = checked(message, tuple[Text | None, kind | None])
        if refused is not None:
            raise UserError(refused)
        return value

    def _get(self, key: str, timeout: float) -> bytes:
        if not self._wait([key], timeout):
            raise UserError(f"a rank did not answer within {timeout:.0f} s: see why on the other machines")
        return self._store.get(key)

    def _wait(self, keys: list[str], timeout: float) -> bool:
        """Whether all of `keys` came in time."""
        try:
            return wait_for_keys(self._store, keys, timeout)
        except dist.DistError:
            raise UserError("rank 0 has ended, and said why where it runs: see there") from None
