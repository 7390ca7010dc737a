"""What is recorded of collectives, under gloo and under fake process groups alike."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_mamba.rehearsal.collectives import Collective, recording
from tests.parallel.communication import calls_of_groups
from tests.world import World

EVERY = (0, 1, 2, 3)


def every_kind(rank: int) -> list[Collective]:
    """One call of each kind on a rank of four, as libraries make them; ranks 1 and 3 form a group while it records."""
    x, wide = torch.ones(4), torch.ones(16, dtype=torch.bfloat16)
    rows = [[0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 0, 1], [0, 0, 3, 0]]  # from rank to rank
    sent, received = rows[rank], [row[rank] for row in rows]
    with recording() as found:
        odd = dist.new_group([1, 3])
        again = dist.new_group([1, 3])
        dist.all_reduce(x)
        dist.all_gather_single(torch.empty(16), x)
        dist.reduce_scatter_single(torch.empty(4, dtype=torch.bfloat16), wide)
        dist.all_gather([torch.empty(4) for _ in range(4)], x)
        dist.broadcast(x, 2)
        dist.reduce(x, 3)
        dist.gather(x, [torch.empty(4) for _ in range(4)] if rank == 1 else None, 1)
        dist.scatter(x, [torch.ones(4) for _ in range(4)] if rank == 1 else None, 1)
        dist.all_to_all_single(torch.empty(sum(received), 5), torch.ones(sum(sent), 5), received, sent)
        dist.all_to_all_single(torch.empty(4), x)
        if rank in (1, 3):
            dist.all_reduce(x, group=odd)
            dist.broadcast(x, 3, group=again)
        if rank < 2:
            dist.send(x, 1, tag=7) if rank == 0 else dist.recv(x, 0, tag=7)
        functional.all_gather_single(x, 0, dist.group.WORLD).wait()
        functional.all_to_all_single_autograd(x.requires_grad_(), None, None, dist.group.WORLD).sum().backward()
        everyone: list[object] = [None] * 4
        dist.all_gather_object(everyone, "word")
        dist.barrier()
    return found


def wanted(rank: int) -> list[Collective]:
    sent = ((0, 1, 2, 0), (1, 1, 1, 1), (2, 0, 0, 1), (0, 0, 3, 0))[rank]
    received = ((0, 1, 2, 0), (1, 1, 0, 0), (2, 1, 0, 3), (0, 1, 1, 0))[rank]
    to, back = (tuple(20 * rows for rows in split) for split in (sent, received))
    even = Collective("all-to-all", EVERY, 16, sent=(4,) * 4, received=(4,) * 4)
    found = [
        Collective("all-reduce", EVERY, 16),
        Collective("all-gather", EVERY, 64),
        Collective("reduce-scatter", EVERY, 32, "bfloat16"),
        Collective("all-gather", EVERY, 64),
        Collective("broadcast", EVERY, 16, root=2),
        Collective("reduce", EVERY, 16, root=3),
        Collective("gather", EVERY, 64, root=1),
        Collective("scatter", EVERY, 64, root=1),
        Collective("all-to-all", EVERY, sum(to), sent=to, received=back),
        even,
    ]
    if rank in (1, 3):
        found += [Collective("all-reduce", (1, 3), 16), Collective("broadcast", (1, 3), 16, root=3, channel=1)]
    if rank < 2:
        found += [Collective(("send", "receive")[rank], EVERY, 16, root=1 - rank)]
    return [*found, Collective("all-gather", EVERY, 64), even, even]


def on_gloo() -> tuple[list[Collective], int]:
    """In a worker: what is recorded, and the calls that gloo counts."""
    before = calls_of_groups()
    found = every_kind(dist.get_rank())
    return found, (calls_of_groups() - before).total()


def in_a_fake_world(rank: int) -> list[Collective]:
    """In a worker of a world of one: the same as a rank of four that are not there."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    return every_kind(rank)


def test_gloo_and_fake_groups_record_the_same(world: World) -> None:
    for rank, (found, calls) in enumerate(world.run(on_gloo, ranks=4)):
        *most, barrier = found
        objects = most[len(wanted(rank)) :]
        assert most[: len(wanted(rank))] == wanted(rank)
        assert [(call.kind, call.dtype) for call in objects] == [("all-gather", "int64"), ("all-gather", "uint8")]
        assert barrier.kind == "barrier"
        assert world.run(in_a_fake_world, rank, ranks=1)[0] == found
        assert calls == len(found)
