"""Which ranks of a layout do the same, and what each does, from what a few of them were seen to do.

Ranks have one role where they hold parts of the same shapes and own gradients of the same kinds of replicas. What ranks
of one role do differs in the groups, whose members follow from the rank; in the rows that they send to experts, which
follow from the load; and in how many elements of replicas they own, which follows from where ZeRO's part of a group of
parameters begins. All this is arithmetic here. That it is what ranks really do is checked in two ways: two ranks of
each role are rehearsed and must come to the same, and tests compare small worlds with real ones.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from moe_mamba.errors import RunStopped
from moe_mamba.parallel.grouping import optimizer_groups
from moe_mamba.parallel.placement import parameter_shards
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, name_ranks
from moe_mamba.planning.load import Travel
from moe_mamba.planning.traffic import members
from moe_mamba.rehearsal.agreement import Call
from moe_mamba.rehearsal.collectives import Collective
from moe_mamba.rehearsal.step import Report

REPLICAS = "moe_mamba/parallel/replicas.py:"
FP32 = 4
Rows = tuple[tuple[int, ...], ...]
"""Rows that each rank of a group sends to each expert."""


class Entry(NamedTuple):
    """A collective without the rank that makes it.

    Attributes:
        kind, dtype, channel, place: as in ``Collective`` and ``Call``.
        group: name of the group, see ``planning.traffic.members``.
        bytes: where they are the same on all ranks; else 0.
        root: place of the root in the group.
        rows: of an exchange of rows, what it may be: the number of a send matrix of the layout, and the bytes of a row;
            negative: they go back. Several, where what the rank sends and receives fits several.
        owned: of a sum over replicas, which of those of this rank it is, in order.
    """

    kind: str
    group: str
    dtype: str
    channel: int
    place: str
    bytes: int = 0
    root: int | None = None
    rows: frozenset[tuple[int, int]] | None = None
    owned: int | None = None

    def merged(self, other: "Entry | None") -> "Entry | None":
        """What both are; None: they are not the same."""
        if other is None or self._replace(rows=None) != other._replace(rows=None):
            return None
        if self.rows is None or other.rows is None:
            return self if self.rows is other.rows else None
        rows = self.rows & other.rows
        return self._replace(rows=rows) if rows else None


class Layout:
    """The ranks of a layout, and what follows from a rank's number.

    Args:
        plan: of the run, on any rank.
    """

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.size = plan.topology.world.size
        counts = {shard.replicas for shard in plan.shards.values()} - {1}
        names = ["world", "data", "tensor", "expert", "expert_data", "inner_expert", "inner_expert_data"]
        # Where two have the same ranks, the first stands for both.
        self._names = [*names, *(f"replicas {count}" for count in sorted(counts))]
        self._matrices: list[Rows] = []
        self._groups: dict[tuple[int, str], tuple[int, ...]] = {}
        self._held: dict[tuple[int, int, int], object] = {}
        self._owned: dict[tuple[int, ...], tuple[tuple[int, int], ...]] = {}
        shared_by = {None: "data", "expert": "expert_data", "inner_expert": "inner_expert_data"}
        self._sharing = [(group, shared_by[group.experts]) for group in optimizer_groups(plan)]

    def topology(self, rank: int) -> Topology:
        """As a rank sees it."""
        topology = self.plan.topology
        world = replace(topology.world, rank=rank, local_rank=rank % topology.world.local_size)
        return replace(topology, world=world)

    def members(self, rank: int, group: str) -> tuple[int, ...]:
        """Ranks of the group of this name that a rank is in."""
        if (rank, group) not in self._groups:
            ranks = members(self.topology(rank), group)
            self._groups |= {(member, group): ranks for member in ranks}
        return self._groups[rank, group]

    def roles(self) -> list[tuple[int, ...]]:
        """The ranks of each role."""
        found: dict[object, list[int]] = defaultdict(list)
        for rank in range(self.size):
            kinds = tuple(count for count, _ in self.owned(rank))
            found[self._holdings(self.topology(rank)), kinds].append(rank)
        return [tuple(ranks) for ranks in found.values()]

    def _holdings(self, topology: Topology) -> object:
        """Shapes of what a rank holds, those of the parts that are not padding as well."""
        place = topology.tensor_rank, topology.expert_rank, topology.inner_expert_rank
        if place not in self._held:
            shards = parameter_shards(self.plan.model, topology)
            self._held[place] = tuple(
                (name, one.local_shape, one.replicas, tuple(sum(part.length for part in axis) for axis in one.segments))
                for name, one in shards.items()
            )
        return self._held[place]

    def owned(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(ranks that hold them alike, elements) of the replicas whose gradients lie on a rank before an update."""
        names = dict.fromkeys(name for _, name in self._sharing)
        place = {name: self.members(rank, name).index(rank) for name in names}
        key = tuple(place.values())
        if key not in self._owned:
            total: dict[int, int] = {}
            for name, elements in self._elements(place):
                count = self.plan.shards[name].replicas
                if count > 1 and elements > 0:
                    total[count] = total.get(count, 0) + elements
            self._owned[key] = tuple(total.items())
        return self._owned[key]

    def _elements(self, place: Mapping[str, int]) -> Iterator[tuple[str, int]]:
        """Of each parameter, in the order of gradients, elements of the part that a rank owns at this stage of ZeRO."""
        zero = self.plan.config.parallel.zero
        if zero == 0:
            yield from (
                (name, prod(self.plan.shards[name].local_shape)) for name, _ in self.plan.model.named_parameters()
            )
            return
        for group, sharing in self._sharing:
            first, end = group.partition * place[sharing], 0
            for name, size in zip(group.names, group.sizes, strict=True):
                begin, end = end, end + size
                part = min(end, first + group.partition) - max(begin, first)
                yield name, -(-size // group.ranks) if zero == 3 else part

    def entries(self, rank: int, report: Report) -> list[Entry]:
        """What a rank was seen to do, start and step, without the rank.

        Raises:
            RunStopped: it does what does not follow from the layout, and would not from another rank's number.
        """
        calls = list(zip(report.start, ["the start"] * len(report.start), strict=True))
        calls += zip(report.collectives, report.places, strict=True)
        for matrix in report.matrices.values():
            if (rows := tuple(map(tuple, matrix))) not in self._matrices:
                self._matrices.append(rows)
        entries: list[Entry] = []
        number = 0
        for one, place in calls:
            if len(one.group) == 1:
                continue
            entry = self._entry(rank, one, place)
            if place.startswith(REPLICAS):
                entry = entry._replace(bytes=0, owned=number)
                number += 1
            if (again := self.call(rank, entry).collective) != one:
                raise RunStopped(f"rank {rank} makes {one}, and by its layout it would be {again}")
            entries.append(entry)
        return entries

    def _entry(self, rank: int, one: Collective, place: str) -> Entry:
        name = next((name for name in self._names if self.members(rank, name) == one.group), None)
        if name is None:
            what = f"{one.kind} among {name_ranks(list(one.group))}"
            raise RunStopped(f"rank {rank}: {what}, a group that the layout does not have ({place})")
        root = None if one.root is None else one.group.index(one.root)
        entry = Entry(one.kind, name, one.dtype, one.channel, place, one.bytes, root)
        # How many rows come is told in whole numbers, as many to each rank; rows themselves are none.
        rows = None if one.sent is None or "int" in one.dtype else self._rows(rank, one)
        return entry if not rows else entry._replace(bytes=0, rows=rows)

    def _rows(self, rank: int, one: Collective) -> frozenset[tuple[int, int]]:
        """Which matrices an exchange of rows may follow, and the bytes of a row; none: it follows none."""
        found = set()
        for number, matrix in enumerate(self._matrices):
            if len(matrix) != len(one.group):
                continue
            travel = Travel.of(matrix, one.group.index(rank))
            there, back = travel.sent_splits, travel.received_splits
            for rows, others, sign in ((there, back, 1), (back, there, -1)):
                width = one.bytes // max(1, sum(rows))
                if one.sent == _times(rows, width) and one.received == _times(others, width):
                    found.add((number, sign * width))
        return frozenset(found)

    def ends(self, rank: int, entry: Entry) -> Collective:
        """Who takes part in an entry that a rank of the role makes, without sizes."""
        group = self.members(rank, entry.group)
        root = None if entry.root is None else group[entry.root]
        return Collective(entry.kind, group, 0, entry.dtype, root, channel=entry.channel)

    def call(self, rank: int, entry: Entry) -> Call:
        """What a rank of the role makes of an entry."""
        group = self.members(rank, entry.group)
        one = Collective(entry.kind, group, entry.bytes, entry.dtype, channel=entry.channel)
        if entry.owned is not None:
            owned = self.owned(rank)
            count, elements = owned[entry.owned] if entry.owned < len(owned) else (0, 0)
            expected = self.members(rank, f"replicas {count}") if count else ()
            one = one._replace(group=expected, bytes=elements * FP32)
        elif entry.rows is not None:
            number, width = min(entry.rows)
            travel = Travel.of(self._matrices[number], group.index(rank))
            sent, received = (_times(rows, abs(width)) for rows in (travel.sent_splits, travel.received_splits))
            sent, received = (sent, received) if width > 0 else (received, sent)
            one = one._replace(bytes=sum(sent), sent=sent, received=received)
        elif entry.kind == "all-to-all":
            even = (entry.bytes // len(group),) * len(group)
            one = one._replace(sent=even, received=even)
        elif entry.root is not None:
            one = one._replace(root=group[entry.root])
        return Call(one, entry.place)


def _times(rows: Sequence[int], width: int) -> tuple[int, ...]:
    return tuple(count * width for count in rows)
