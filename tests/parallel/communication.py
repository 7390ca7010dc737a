"""What travels between ranks, counted by torch's dispatcher and again by gloo."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist

from moe_mamba.rehearsal.collectives import recording


class Collective(NamedTuple):
    """What of a recorded call (``moe_mamba.rehearsal.collectives.Collective``) is compared with what was expected."""

    kind: str
    group: tuple[int, ...]
    bytes: int


@contextlib.contextmanager
def counting() -> Iterator[list[Collective]]:
    """Collect every collective that this rank takes part in, in order; complete when the context ends.

    That none was missed is checked against the number of calls that gloo itself counts in each group.
    """
    before = calls_of_groups()
    found: list[Collective] = []
    with recording() as calls:
        yield found
    found += [Collective(call.kind, call.group, call.bytes) for call in calls]
    assert calls_of_groups() - before == Counter(call.group for call in found), "gloo has counted other calls"


def calls_of_groups() -> Counter[tuple[int, ...]]:
    """Ranks of each group that this rank is in -> calls so far."""
    calls: Counter[tuple[int, ...]] = Counter()
    for group in dist.distributed_c10d._world.pg_map:
        calls[tuple(dist.get_process_group_ranks(group))] += group._get_sequence_number_for_group()
    return calls
