"""What one part of a run's start takes: counters around the real code, as the system and the interpreter see it."""

import contextlib
import functools
import gc
import os
import socket
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moe_mamba.rehearsal.collectives import Collective
from moe_mamba.rehearsal.device import replaced

# What the interpreter tells of (PEP 578) -> what it is called here.
EVENTS = {
    "open": "opened",
    "os.listdir": "folders read",
    "os.scandir": "folders read",
    "os.remove": "removed",
    "subprocess.Popen": "processes",
}


@dataclass
class Part:
    """What one part of the start took.

    Attributes:
        name: of the part.
        seconds: of one core of this machine, all threads of the process together.
        kept: bytes of Python's objects that are left after it; 0 where they are not measured.
        peak: bytes of Python's objects at most; 0 where they are not measured.
        objects: how many blocks of memory are left after it.
        shards: chunks of the state that this rank saves and loads.
        listed: ranks in the lists of groups that were handed to torch.
        groups: made, in which this rank is.
        members: of these groups, all together.
        store: operation at the store -> keys that it was asked for or wrote.
        store_bytes: written and read there.
        collectives: (kind, ranks of the group) -> calls.
        collective_bytes: (kind, ranks of the group) -> bytes of the larger side.
        files: what was done at the file system, as ``EVENTS`` calls it, and ``stats`` -> times.
        read: bytes read from files; 0 where the system does not tell.
        mapped: bytes of files in the address space.
        connections: made or taken.
        sent: bytes written to sockets and read from them.
        descriptors: left open.
        threads: of Python's, left running.
        share: of the world that was there, where this machine has no descriptors for all; what grows with the world is
            of so many.
    """

    name: str
    seconds: float = 0.0
    kept: int = 0
    peak: int = 0
    objects: int = 0
    shards: int = 0
    listed: int = 0
    groups: int = 0
    members: int = 0
    store: Counter[str] = field(default_factory=Counter)
    store_bytes: int = 0
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    collective_bytes: Counter[tuple[str, int]] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    read: int = 0
    mapped: int = 0
    connections: int = 0
    sent: int = 0
    descriptors: int = 0
    threads: int = 0
    share: float = 1.0

    def note(self, calls: Sequence[Collective]) -> None:
        """Take collectives in."""
        for call in calls:
            self.add(call.kind, len(call.group), call.bytes)

    def add(self, kind: str, ranks: int, size: int) -> None:
        """Take a collective in."""
        self.collectives[kind, ranks] += 1
        self.collective_bytes[kind, ranks] += size


class Parts:
    """The parts of one rank's start, in order; what happens while one lasts is counted as its own.

    Args:
        measured: measure Python's memory, which makes all several times as slow.
    """

    def __init__(self, measured: bool) -> None:
        self.measured = measured
        self.found: list[Part] = []

    @property
    def current(self) -> Part:
        """The last that was begun."""
        return self.found[-1]

    @contextlib.contextmanager
    def part(self, name: str, besides: threading.Thread | None = None) -> Iterator[Part]:
        """Count what happens while the block lasts.

        Args:
            name: of the part.
            besides: a thread that plays another rank, whose sockets are not counted.
        """
        part = Part(name)
        self.found.append(part)
        gc.collect()
        process = psutil.Process()
        descriptors, threads, read = process.num_fds(), set(threading.enumerate()), _read(process)
        with _listening(part), _counted_groups(part), _counted_sockets(part, besides):
            if self.measured:
                tracemalloc.start()
            blocks, begin = sys.getallocatedblocks(), time.process_time()
            try:
                yield part
            finally:
                part.seconds = time.process_time() - begin
                gc.collect()
                part.objects = sys.getallocatedblocks() - blocks
                if self.measured:
                    part.kept, part.peak = tracemalloc.get_traced_memory()
                    tracemalloc.stop()
        # To ask is to read a file as well: as much as before, when only the second question saw the first one.
        part.read = max(0, _read(process) - read - _cost_of_asking(process))
        part.descriptors = process.num_fds() - descriptors
        part.threads = len(set(threading.enumerate()) - threads)


def _read(process: psutil.Process) -> int:
    return int(process.io_counters().read_chars) if hasattr(process, "io_counters") else 0


def _cost_of_asking(process: psutil.Process) -> int:
    return -(_read(process) - _read(process))


_listeners: list[Part] = []


@contextlib.contextmanager
def _listening(part: Part) -> Iterator[None]:
    """Count what the interpreter tells of, and looks at files, which it does not tell of."""
    _install()
    look = os.stat

    def stat(*arguments: Any, **options: Any) -> os.stat_result:
        part.files["stats"] += 1
        return look(*arguments, **options)

    _listeners.append(part)
    try:
        with replaced(os, "stat", stat):
            yield
    finally:
        _listeners.remove(part)


@functools.cache
def _install() -> None:
    """Begin to listen: a hook stays as long as the process."""
    sys.addaudithook(_hear)


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _listeners:
        return
    part = _listeners[-1]
    if event == "mmap.__new__":
        part.mapped += arguments[1] or os.fstat(arguments[0]).st_size
    elif event == "open" and isinstance(arguments[0], int):
        return  # a descriptor that is open
    elif event in EVENTS:
        part.files[EVENTS[event]] += 1


@contextlib.contextmanager
def _counted_groups(part: Part) -> Iterator[None]:
    make = distributed_c10d.new_group

    def counted(ranks: Any = None, *arguments: Any, **options: Any) -> Any:
        part.listed += dist.get_world_size() if ranks is None else len(ranks)
        group = make(ranks, *arguments, **options)
        if isinstance(group, dist.ProcessGroup):
            part.groups += 1
            part.members += group.size()
        return group

    with replaced(dist, "new_group", counted):
        yield


@contextlib.contextmanager
def _counted_sockets(part: Part, besides: threading.Thread | None) -> Iterator[None]:
    """Count what Python's sockets do; those of C++ are gloo's and the store's, which are not there."""

    def counting(name: str, count: Callable[[tuple[Any, ...], Any], None]) -> AbstractContextManager[None]:
        real = getattr(socket.socket, name)

        def counted(*arguments: Any) -> Any:
            result = real(*arguments)
            if threading.current_thread() is not besides:
                count(arguments, result)
            return result

        return replaced(socket.socket, name, counted)

    def connected(arguments: tuple[Any, ...], result: Any) -> None:
        part.connections += 1

    def sent(arguments: tuple[Any, ...], result: Any) -> None:
        part.sent += len(arguments[1])

    def received(arguments: tuple[Any, ...], result: bytes) -> None:
        part.sent += len(result)

    counts = {"connect": connected, "accept": connected, "sendall": sent, "recv": received}
    with contextlib.ExitStack() as stack:
        for name, count in counts.items():
            stack.enter_context(counting(name, count))
        yield
