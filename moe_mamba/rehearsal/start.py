"""What one rank does at the start of a run as a function of the number of ranks, by counting, without the machines.

The rank is real: the meeting's code, the plan, the process groups, the sharded model and DeepSpeed's engine. The others
are what it hears of them: at the store each has said what this rank has said, and groups send nothing.
"""

import contextlib
import gc
import math
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from moe_mamba.config import Config
from moe_mamba.errors import UserError
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.groups import Groups, start_groups
from moe_mamba.parallel.meeting import Meeting
from moe_mamba.parallel.parallelize import fill_model, shard_copy
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.memory import size
from moe_mamba.rehearsal import device
from moe_mamba.rehearsal.collectives import Collective, Recording
from moe_mamba.rehearsal.recording import Stage
from moe_mamba.rehearsal.world import fake_world


@dataclass
class Part:
    """What one part of the start took.

    Attributes:
        name: of the part.
        seconds: of one core of this machine.
        kept: bytes of Python's objects that are left after it; 0 where they are not measured.
        objects: how many blocks of memory they are.
        listed: ranks in the lists of groups that were handed to torch.
        groups: made, in which this rank is.
        members: of these groups, all together.
        store: operation at the store -> keys that it was asked for or wrote.
        store_bytes: written and read there.
        collectives: (kind, ranks of the group) -> calls.
        collective_bytes: (kind, ranks of the group) -> bytes of the larger side.
    """

    name: str
    seconds: float = 0.0
    kept: int = 0
    objects: int = 0
    listed: int = 0
    groups: int = 0
    members: int = 0
    store: Counter[str] = field(default_factory=Counter)
    store_bytes: int = 0
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    collective_bytes: Counter[tuple[str, int]] = field(default_factory=Counter)

    def note(self, calls: Sequence[Collective]) -> None:
        """Take collectives in."""
        for call in calls:
            self.collectives[call.kind, len(call.group)] += 1
            self.collective_bytes[call.kind, len(call.group)] += call.bytes


class CountingStore(dist.Store):
    """The store of a world of which one rank is there: others have said what it has said, and keys are counted.

    Args:
        world: whose ranks they are.
        part: where it is counted.
    """

    def __init__(self, world: World, part: Part) -> None:
        super().__init__()
        self._world, self._part = world, part
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        """Write a key."""
        value = value.encode() if isinstance(value, str) else value
        self._count("set", 1, len(value))
        self._values[key] = value

    def get(self, key: str) -> bytes:
        """Read a key."""
        value = self._said(key)
        self._count("get", 1, len(value))
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read several keys."""
        values = [self._said(key) for key in keys]
        self._count("get", len(keys), sum(map(len, values)))
        return values

    def add(self, key: str, number: int) -> int:
        """Add to a number."""
        self._count("add", 1, 8)
        total = int(self._values.get(key, b"0")) + number
        self._values[key] = str(total).encode()
        return total

    def check(self, keys: list[str]) -> bool:
        """Whether keys are there."""
        self._count("check", len(keys), 0)
        return True

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until keys are there: they are."""
        self._count("wait", len(keys), 0)

    def _count(self, operation: str, keys: int, size: int) -> None:
        self._part.store[operation] += keys
        self._part.store_bytes += size

    def _said(self, key: str) -> bytes:
        """What this rank, or in its place another, has written."""
        if key in self._values:
            return self._values[key]
        name, _, last = key.rpartition("/")
        mine = self._values.get(f"{name}/{self._world.rank}") if last.isdigit() else None
        if key.endswith("start"):
            return b'{"code":0}'
        assert mine is not None, f"nobody has said {key}"
        return mine


class _CountedMeeting(Meeting):
    """The meeting of a world of which one rank is there."""

    def __init__(self, world: World, part: Part) -> None:
        super().__init__(world, lambda _: None, environment={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
        self._counted = CountingStore(world, part)

    def _open(self) -> None:
        self._address = "127.0.0.1"
        self._store = dist.PrefixStore("meeting", self._counted)


def fitted(config: Config, gpus: int) -> Config:
    """The configuration in a world of another size: what does not divide it is reduced, the batch grows with it.

    Raises:
        UserError: the sizes do not fit at all.
    """
    parallel, train = config.parallel, config.train
    tensor = math.gcd(parallel.tensor, gpus)
    expert_tensor = parallel.expert_tensor and tensor > 1
    expert = math.gcd(parallel.expert, gpus // tensor if expert_tensor else gpus)
    changed = parallel.model_copy(update={"tensor": tensor, "expert": expert, "expert_tensor": expert_tensor})
    micro_batch = train.micro_batch or tensor
    batch = train.model_copy(update={"micro_batch": micro_batch, "global_batch": gpus // tensor * micro_batch})
    return config.model_copy(update={"parallel": changed, "train": batch})


def start_costs(
    config: Config, gpus: int, rank: int, *, machine: int = 8, gpu: str = "h100", measured: bool = False
) -> list[Part]:
    """Start one rank of a world, and count.

    Args:
        config: of the run, with the size of the vocabulary; see ``fitted``.
        gpus: processes of the world.
        rank: the one that starts.
        machine: processes of a machine.
        gpu: whose kernels are chosen.
        measured: measure Python's memory, which makes all several times as slow, and end after the groups.

    Raises:
        UserError: the sizes do not fit.
    """
    if not config.has_vocabulary:
        raise UserError("model.vocab_size is open until a run chooses it: give --model.vocab_size=N")
    device.stand_for(gpu)
    config = fitted(config, gpus)
    local = min(machine, gpus)
    world = device.RehearsedWorld(rank, gpus, rank % local, local)
    parts: list[Part] = []

    @contextlib.contextmanager
    def part(name: str) -> Iterator[Part]:
        parts.append(Part(name))
        with _measured(parts[-1], measured):
            yield parts[-1]

    with part("meeting") as one, _CountedMeeting(world, one) as meeting:
        meeting.start()
    with part("plan"):
        plan = RunPlan.of(config, Topology.of(config, world))
    with fake_world(world):
        with part("groups") as one, Recording() as calls:
            groups = start_groups(plan)
        one.note(calls.found)
        if not measured:
            _build(plan, groups, part)
    return parts


def _build(plan: RunPlan, groups: Groups, part: Callable[[str], AbstractContextManager[Part]]) -> None:
    config = plan.config
    model = shard_copy(plan, groups)
    stage = Stage()
    with device.WithoutNumbers(allow_non_fake_inputs=True), stage:
        with part("model") as one:
            fill_model(model, plan, groups)
        one.note(stage.found)
        before = len(stage.found)
        model.to = lambda *_, **__: model  # type: ignore[method-assign, assignment]
        assert config.train.micro_batch is not None
        with part("engine") as one:
            engine = engines.build_engine(model, config, groups, config.train.micro_batch)
        one.note(stage.found[before:])
        with contextlib.suppress(AssertionError):  # it wants a world of its own making
            engine.destroy()


@contextlib.contextmanager
def _measured(part: Part, memory: bool) -> Iterator[None]:
    """Count groups, and take the time, or what memory Python's objects are left with."""
    make = distributed_c10d.new_group

    def counted(ranks: Any = None, *arguments: Any, **options: Any) -> Any:
        part.listed += dist.get_world_size() if ranks is None else len(ranks)
        group = make(ranks, *arguments, **options)
        if isinstance(group, dist.ProcessGroup):
            part.groups += 1
            part.members += group.size()
        return group

    gc.collect()
    with device.replaced(dist, "new_group", counted):
        if memory:
            tracemalloc.start()
        before, begin = sys.getallocatedblocks(), time.process_time()
        try:
            yield
        finally:
            part.seconds = time.process_time() - begin
            gc.collect()
            part.objects = sys.getallocatedblocks() - before
            if memory:
                part.kept = tracemalloc.get_traced_memory()[0]
                tracemalloc.stop()


def start_table(config: Config, worlds: Sequence[int], *, machine: int = 8, gpu: str = "h100") -> str:
    """What the start takes of rank 0 and of the last rank, one line a figure, one column a world.

    Args:
        config: of the run, with the size of the vocabulary.
        worlds: numbers of processes.
        machine: processes of a machine.
        gpu: whose kernels are chosen.

    Raises:
        UserError: the sizes do not fit.
    """
    start = partial(start_costs, config, machine=machine, gpu=gpu)
    start(worlds[0], 0)  # libraries are loaded, and torch's caches filled
    columns: list[dict[tuple[str, ...], str]] = []
    for gpus in worlds:
        layout = fitted(config, gpus).parallel
        experts = f"EP {layout.expert}{' by tensor' * layout.expert_tensor}"
        columns.append({("layout",): f"TP {layout.tensor}, {experts}, ZeRO {layout.zero}"})
        for rank, name in ((0, "rank 0"), (gpus - 1, "last rank"))[:gpus]:
            parts = start(gpus, rank)
            kept = {part.name: part.kept for part in start(gpus, rank, measured=True)}
            for part in parts:
                part.kept = kept.get(part.name, 0)
                columns[-1] |= {(part.name, name, what): text for what, text in _figures(part)}
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [("", *(f"{gpus:,} ranks" for gpus in worlds))]
    rows += [(", ".join(key), *(column.get(key, "-") for column in columns)) for key in keys]
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    lines = ("  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _figures(part: Part) -> Iterator[tuple[str, str]]:
    yield "seconds", f"{part.seconds:.2f}"
    if part.kept > 0:
        yield "Python's memory", size(part.kept)
    yield "objects", f"{max(part.objects, 0):,}"
    if part.groups:
        yield "groups made, their members, ranks listed", f"{part.groups:,}, {part.members:,}, {part.listed:,}"
    if part.store:
        yield "keys at the store", f"{part.store.total():,}, {size(part.store_bytes)}"
    for kind in dict.fromkeys(kind for kind, _ in part.collectives):
        calls = sum(count for key, count in part.collectives.items() if key[0] == kind)
        ranks = max(ranks for found, ranks in part.collectives if found == kind)
        sent = sum(count for key, count in part.collective_bytes.items() if key[0] == kind)
        yield f"{kind}: calls, bytes, most ranks", f"{calls:,}, {size(sent)}, {ranks:,}"
