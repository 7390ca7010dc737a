"""What a rank says and hears before there are process groups, at a store where the others have said their part."""

import contextlib
import secrets
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from moe_mamba.config import Config
from moe_mamba.parallel.meeting import Meeting
from moe_mamba.parallel.topology import World
from moe_mamba.preflight.exchange import Exchange
from moe_mamba.preflight.folders import PREFIX
from moe_mamba.preflight.short_form import compare
from moe_mamba.rehearsal.device import replaced
from moe_mamba.rehearsal.start_parts import Parts

NONCE = "0" * 16


class CountingStore(dist.Store):
    """The store of a world of which one rank is there, where keys are counted.

    What rank 0 says is what it has said when it started. All others have said what this rank has said, from machines of
    their own.

    Args:
        world: whose ranks they are.
        parts: where it is counted.
        first: what rank 0 has said, key by key.
    """

    def __init__(self, world: World, parts: Parts, first: dict[str, bytes]) -> None:
        super().__init__()
        self._world, self._parts, self._first = world, parts, first
        self._host = socket.gethostname()
        self.said: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        """Write a key."""
        value = value.encode() if isinstance(value, str) else value
        self._count("set", 1, len(value))
        self.said[key] = value

    def get(self, key: str) -> bytes:
        """Read a key."""
        value = self._heard(key)
        self._count("get", 1, len(value))
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read several keys."""
        values = [self._heard(key) for key in keys]
        self._count("get", len(keys), sum(map(len, values)))
        return values

    def add(self, key: str, number: int) -> int:
        """Add to a number."""
        self._count("add", 1, 8)
        total = int(self.said.get(key, b"0")) + number
        self.said[key] = str(total).encode()
        return total

    def check(self, keys: list[str]) -> bool:
        """Whether keys are there."""
        self._count("check", len(keys), 0)
        return True

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until keys are there: they are."""
        self._count("wait", len(keys), 0)

    def _count(self, operation: str, keys: int, size: int) -> None:
        self._parts.current.store[operation] += keys
        self._parts.current.store_bytes += size

    def _heard(self, key: str) -> bytes:
        """What this rank, rank 0 or in its place another has written."""
        if (value := self.said.get(key, self._first.get(key))) is not None:
            return value
        name, _, last = key.rpartition("/")
        if last == "ask":  # for the time
            return b""
        mine = self.said.get(f"{name}/{self._world.rank}") if last.isdigit() else None
        assert mine is not None, f"nobody has said {key}"
        return self._as_of(mine, int(last))

    def _as_of(self, value: bytes, rank: int) -> bytes:
        """What this rank has said, in another one's words: its number, and its machine's name."""
        here, there = (one // self._world.local_size for one in (self._world.rank, rank))
        if here != there:
            value = value.replace(f'"{self._host}"'.encode(), f'"{self._host}-{there:05d}"'.encode())
        numbers = '"rank":{},"local_rank":{}'
        mine = numbers.format(self._world.rank, self._world.local_rank)
        return value.replace(mine.encode(), numbers.format(rank, rank % self._world.local_size).encode())


class CountedMeeting(Meeting):
    """The meeting of a world of which one rank is there."""

    def __init__(self, world: World, store: CountingStore) -> None:
        super().__init__(world, lambda _: None, environment={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
        self._counted = store

    def _open(self) -> None:
        self._address = "127.0.0.1"
        self._store = dist.PrefixStore("meeting", self._counted)


def meet(config: Config, world: World, parts: Parts, first: dict[str, bytes]) -> dict[str, bytes]:
    """Let a rank come to the meeting and, of several machines, compare what it knows.

    Args:
        config: of the run.
        world: its processes, and which this one is.
        parts: gain two.
        first: what rank 0 has said; empty where this is rank 0.

    Returns:
        What it has said.
    """
    store = CountingStore(world, parts, first)
    meeting = CountedMeeting(world, store)
    with parts.part("meeting"), meeting:
        meeting.start()
    if world.local_size < world.size:
        with _files_of_others(Path(config.run.folder), world), parts.part("machines"):
            compare(Exchange(world, meeting.store, config.parallel.timeout), config, thorough=False)
    return store.said


@contextlib.contextmanager
def _files_of_others(folder: Path, world: World) -> Iterator[None]:
    """Have the other ranks write their files where all look for them."""
    place = folder / f"{PREFIX}{NONCE}"
    place.mkdir()
    for rank in range(world.size):
        if rank != world.rank:
            (place / str(rank)).write_text(NONCE)
    with replaced(secrets, "token_hex", lambda size: NONCE[: 2 * size]):
        yield
    for path in (*place.iterdir(), place) if place.is_dir() else ():
        path.unlink() if path != place else path.rmdir()
