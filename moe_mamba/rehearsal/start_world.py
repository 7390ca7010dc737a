"""What all ranks tell each other in a run's start: objects, to which absent ranks answer, and what the hub hears."""

import contextlib
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_mamba.config import Config
from moe_mamba.faults import watchdog
from moe_mamba.faults.coordinator import Hub
from moe_mamba.parallel.distributed import from_all, from_first
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.rehearsal.device import replaced
from moe_mamba.rehearsal.stand_ins import most_connections, stand_ins
from moe_mamba.rehearsal.start_parts import Parts
from moe_mamba.run.console import Screen
from moe_mamba.run.events import Events
from moe_mamba.train.pace import Pace
from moe_mamba.train.setup import StartState


class Others:
    """The ranks that are not there, in collectives of objects: they say what this rank says.

    Args:
        parts: where it is counted.
        first: what rank 0 says where it speaks alone, one after the other; used on another rank.
        hear: is told what this rank says alone, on rank 0.
    """

    def __init__(self, parts: Parts, first: list[Any], hear: Callable[[Any], None] = lambda _: None) -> None:
        self._parts, self._first, self._hear = parts, first, hear
        self._said = b""

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Take the place of torch's collectives of objects while the block lasts."""
        mine = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list")
        with contextlib.ExitStack() as stack:
            for name in mine:
                stack.enter_context(replaced(dist, name, getattr(self, name)))
            yield

    def broadcast_object_list(self, object_list: list[Any], src: int = 0, group: Any = None, **_: Any) -> None:
        """Rank 0's word."""
        if dist.get_rank(group) != src:
            object_list[:] = [self._first.pop(0)]
        self._count("broadcast", object_list[0], 1, group)
        if dist.get_rank(group) == src:
            self._hear(object_list[0])

    def all_gather_object(self, object_list: list[Any], obj: Any, group: Any = None) -> None:
        """The word of each."""
        self._count("all-gather", obj, len(object_list), group)
        object_list[:] = [pickle.loads(self._said) for _ in object_list]

    def gather_object(self, obj: Any, object_gather_list: list[Any] | None = None, **options: Any) -> None:
        """The word of each, on rank 0."""
        self._count("gather", obj, len(object_gather_list or [None]), options.get("group"))
        if object_gather_list is not None:
            object_gather_list[:] = [pickle.loads(self._said) for _ in object_gather_list]

    def scatter_object_list(
        self, scatter_object_output_list: list[Any], scatter_object_input_list: list[Any] | None = None, **options: Any
    ) -> None:
        """Rank 0's word for each: to another rank what it has said before, as where a plan is let stand."""
        sent = scatter_object_input_list
        own = pickle.loads(self._said) if sent is None else sent[0]
        self._count("scatter", own, len(sent or [None]), options.get("group"))
        scatter_object_output_list[:] = [own]

    def _count(self, kind: str, value: Any, times: int, group: Any) -> None:
        self._said = pickle.dumps(value)
        self._parts.current.add(f"{kind} of objects", dist.get_world_size(group), times * len(self._said))


def join_watches(config: Config, world: World, parts: Parts) -> None:
    """Join the ranks' watches: rank 0 opens the hub, to which all others connect.

    On rank 0 another process holds the connections of the others, of as many as descriptors allow. On another rank a
    hub runs here that waits for all, and is not counted.

    Args:
        config: of the run.
        world: its processes; a process group is joined.
        parts: gain one.
    """
    there = min(world.size, most_connections() + 1) if world.is_first else world.size
    with contextlib.ExitStack() as stack:
        hub, others = None, Others(parts, [])
        if not world.is_first:
            hub = Hub(lambda: 0, world.size)
            hub.start()
            stack.callback(hub.close)
            others = Others(parts, [(hub.port, hub.token, socket.gethostname(), os.getpid())])
        elif world.size > 1:
            process = stack.enter_context(stand_ins())
            others = Others(parts, [], lambda told: process.join(told[0], told[1], there - 1))
        stack.enter_context(others.answering())
        stack.enter_context(replaced(watchdog, "finish_world", lambda: None))
        with parts.part("watch", besides=hub) as part:
            watch = watchdog.Watch(config, Screen(Path(os.devnull)), replace(world, size=there))
            stack.enter_context(watch).join()
        part.descriptors -= hub is not None  # its end of the connection
        part.share = there / world.size


def agree(state: StartState, topology: Topology, parts: Parts) -> None:
    """Hear the start state and all machines' names, as ``train/run.py`` and its trainer do.

    Args:
        state: rank 0's.
        topology: the layout; a process group is joined.
        parts: gain one.
    """
    with Others(parts, [state]).answering(), parts.part("start state"):
        told = from_first(state)
        events = Events(Path(told.config.run.folder), False)
        Pace(topology, told.config.logging.every, from_all(socket.gethostname()), Screen(Path(os.devnull)), events)
