"""Whether ranks agree: in each group all members order the same collectives, one after the other, or they hang.

And, where they do, whether the order between calls of different groups lets all of them come to their end.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple

from moe_mamba.parallel.topology import name_ranks
from moe_mamba.rehearsal.collectives import Collective

SHOWN = 8  # sizes of an all-to-all
NAMED = 2  # ranks of a circle


class Call(NamedTuple):
    """A collective, and the line of our code that orders it."""

    collective: Collective
    place: str = ""


class Disagreement(NamedTuple):
    """The first collective of a group that two of its members do not do alike.

    Attributes:
        group: the ranks that take part.
        position: of the call among the group's, from 1.
        first: a rank, and what it does; None: it has made all its calls.
        second: another.
    """

    group: tuple[int, ...]
    position: int
    first: tuple[int, Call | None]
    second: tuple[int, Call | None]

    def __str__(self) -> str:
        said = "; ".join(f"rank {rank} {_does(call, self.group)}" for rank, call in (self.first, self.second))
        return f"the group of {_named(self.group)} hangs or fails at its collective {self.position:,}: {said}"


class Circle(NamedTuple):
    """Ranks that wait for one another for ever.

    Attributes:
        waits: (rank, the call that it cannot end); each waits for the next rank's, the last for the first's.
    """

    waits: tuple[tuple[int, Call], ...]

    def __str__(self) -> str:
        first, *others = [rank for rank, _ in self.waits]
        said = [
            f"rank {rank} waits for rank {other} in {_kind(call)} of {_named(call.collective.group)}{_at(call)}"
            for (rank, call), other in zip(self.waits[:NAMED], [*others, first], strict=False)
        ]
        rest = f"; and so on, {len(self.waits):,} ranks in a circle" * (len(self.waits) > NAMED)
        return f"no rank of a circle can go on: {'; '.join(said)}{rest}"


def meeting(rank: int, one: Collective) -> Hashable:
    """What a rank waits at: a call of its group, or the other end of a send or receive."""
    if one.kind not in ("send", "receive"):
        return one.group, one.channel
    ends = (rank, one.root) if one.kind == "send" else (one.root, rank)
    return ends, one.group, one.channel


def circle(orders: Mapping[int, Sequence[Hashable]]) -> list[tuple[int, int]]:
    """Go through all calls, each of which ends when all who make it are there; nothing: every rank comes to its end.

    So it is with NCCL on one stream, and what NCCL asks for where there are several communicators. A call that the host
    does not wait for counts alike.

    Args:
        orders: rank -> what it waits at, in order (``meeting``). Who makes a call at all makes it as often as the
            others, which ``disagreement`` has seen.

    Returns:
        (rank, number of its call from 0): each waits for the next rank, and the last for the first.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for rank, order in orders.items():
        for key in set(order):
            members[key].append(rank)
    place = dict.fromkeys(orders, 0)
    there: dict[Hashable, list[int]] = defaultdict(list)
    going = list(orders)
    while going:
        rank = going.pop()
        if place[rank] == len(orders[rank]):
            continue
        key = orders[rank][place[rank]]
        there[key].append(rank)
        if len(there[key]) == len(members[key]):
            for member in there[key]:
                place[member] += 1
            going += there.pop(key)
    at = {rank: order[place[rank]] for rank, order in orders.items() if place[rank] < len(order)}
    if not at:
        return []
    seen: dict[int, None] = {}
    rank = min(at)
    while rank not in seen:
        seen[rank] = None
        missing = [member for member in members[at[rank]] if at[member] != at[rank]]
        # A circle of two is told best.
        rank = next((member for member in missing if rank in members[at[member]]), missing[0])
    ranks = list(seen)
    return [(member, place[member]) for member in ranks[ranks.index(rank) :]]


def disagreement(ranks: Mapping[int, Sequence[Call]]) -> Disagreement | None:
    """Compare what ranks do, group by group; None: those of each group that are given agree.

    Groups of one rank are left out. Sends and receives have two ends, and are compared between these. The order between
    calls of different groups is another question: ``circle``.

    Args:
        ranks: rank -> all its calls in order.
    """
    by_group: dict[tuple[tuple[int, ...], int], dict[int, list[Call]]] = defaultdict(dict)
    for rank, calls in ranks.items():
        for call in calls:
            one = call.collective
            if len(one.group) > 1:
                by_group[one.group, one.channel].setdefault(rank, []).append(call)
    for (group, _), given in by_group.items():
        members = {rank: given.get(rank, []) for rank in group if rank in ranks}
        if found := _in_group(group, members):
            return found
    return None


def _in_group(group: tuple[int, ...], members: Mapping[int, list[Call]]) -> Disagreement | None:
    common = {rank: [call for call in calls if not _has_two_ends(call)] for rank, calls in members.items()}
    (first, *others) = members
    for position, calls in enumerate(zip_longest(*common.values()), 1):
        done = dict(zip(members, calls, strict=True))
        for other in others:
            if not _match(done[first], done[other]):
                return Disagreement(group, position, (first, done[first]), (other, done[other]))
        exchanged = {rank: call.collective for rank, call in done.items() if call is not None}
        if exchanged[first].sent is not None and (pair := _exchange(group, exchanged)):
            return Disagreement(group, position, (pair[0], done[pair[0]]), (pair[1], done[pair[1]]))
    return _two_ends(group, members)


def _match(one: Call | None, other: Call | None) -> bool:
    """Whether two members do the same; how many bytes go where in an all-to-all is another question."""
    if one is None or other is None:
        return one is other
    left, right = one.collective, other.collective
    if (left.kind, left.dtype, left.root) != (right.kind, right.dtype, right.root):
        return False
    return left.kind == "all-to-all" or left.bytes == right.bytes


def _exchange(group: tuple[int, ...], done: Mapping[int, Collective]) -> tuple[int, int] | None:
    """The first two members of which one does not receive in an all-to-all what the other sends to it."""
    place = {rank: number for number, rank in enumerate(group)}
    for sender, sending in done.items():
        for receiver, receiving in done.items():
            assert sending.sent is not None
            assert receiving.received is not None
            if sending.sent[place[receiver]] != receiving.received[place[sender]]:
                return sender, receiver
    return None


def _has_two_ends(call: Call) -> bool:
    return call.collective.kind in ("send", "receive")


def _two_ends(group: tuple[int, ...], members: Mapping[int, list[Call]]) -> Disagreement | None:
    """Between two ranks, what one sends is what the other receives, in order."""
    for sender in members:
        for receiver in members:
            sent = [call for call in members[sender] if _is_end(call, "send", receiver)]
            received = [call for call in members[receiver] if _is_end(call, "receive", sender)]
            for position, (one, other) in enumerate(zip_longest(sent, received), 1):
                sizes = {(call.collective.bytes, call.collective.dtype) for call in (one, other) if call is not None}
                if one is None or other is None or len(sizes) > 1:
                    return Disagreement(group, position, (sender, one), (receiver, other))
    return None


def _is_end(call: Call, kind: str, other: int) -> bool:
    return call.collective.kind == kind and call.collective.root == other


def _named(group: tuple[int, ...]) -> str:
    """The ranks of a group, in few words."""
    steps = {after - before for before, after in pairwise(group)}
    if len(group) > 2 and len(steps) == 1 and steps != {1}:
        return f"ranks {group[0]}, {group[1]} ... {group[-1]}"
    return name_ranks(list(group))


def _does(call: Call | None, group: tuple[int, ...]) -> str:
    if call is None:
        return "makes no further call"
    one = call.collective
    root = "" if one.root is None else f" with rank {one.root}"
    sent = "" if one.sent is None else f", to each {_sizes(one.sent)}, from each {_sizes(one.received or ())}"
    return f"makes {_kind(call)} of {one.bytes:,} bytes of {one.dtype}{root}{sent}{_at(call)}"


def _kind(call: Call) -> str:
    kind = call.collective.kind
    return f"{'an' if kind.startswith('a') else 'a'} {kind}"


def _at(call: Call) -> str:
    return f" ({call.place})" if call.place else ""


def _sizes(sizes: Sequence[int]) -> str:
    shown = [f"{size:,}" for size in sizes[:SHOWN]] + ["..."] * (len(sizes) > SHOWN)
    return f"{sizes[0]:,}" if len(set(sizes)) == 1 else " ".join(shown)
