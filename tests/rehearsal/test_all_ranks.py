"""That ranks of one role do the same, checked where all ranks are there: real steps on gloo."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_mamba.config import Config
from moe_mamba.data.batch import Batch
from moe_mamba.errors import RunStopped
from moe_mamba.faults.signals import Stop
from moe_mamba.model.mixers.routing import Routing
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.expert import ExpertDispatcher
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.load import Load
from moe_mamba.rehearsal.agreement import Call, Circle, circle, disagreement, meeting
from moe_mamba.rehearsal.all_ranks import calls_of, check_all, check_some, compare, difference, follow, merged
from moe_mamba.rehearsal.collectives import Collective, recording
from moe_mamba.rehearsal.load import Matrix, Rows
from moe_mamba.rehearsal.roles import Entry
from moe_mamba.rehearsal.roles import Layout as Ranks
from moe_mamba.rehearsal.step import Report, rehearse
from moe_mamba.train.feed import GlobalBatch
from moe_mamba.train.pace import Pace
from moe_mamba.train.steps import Steps
from tests.parallel.layouts import Layout, batch_of, build, config_of
from tests.rehearsal.process import Rehearsals
from tests.world import World as Processes

Routed = dict[str, list[int]]
"""Router -> rows that a rank has for each expert."""


class Noting(Rows):
    """Reads sizes as a run does, and notes which router they are of."""

    def __init__(self) -> None:
        super().__init__(Load(), lambda _: None)
        self.routed: Routed = {}

    def _read(self, routers: Any, dispatcher: Any, routing: Routing, received: torch.Tensor) -> Any:
        self.routed[next(routers)] = routing.counts.tolist()
        return ExpertDispatcher.read_sizes(dispatcher, routing, received)


@dataclass(frozen=True)
class Given(Load):
    """What a real run's routers decided."""

    given: dict[str, Matrix] = field(default_factory=dict)

    def matrix(self, ranks: int, experts: int, rows_per_rank: int, router: str | None = None) -> Matrix:
        assert router is not None
        return self.given[router]


def real(config: Config) -> tuple[list[Collective], Routed]:
    """In a worker: what a rank does from its groups to the end of a step, and how its tokens were routed.

    All data ranks read the same text, in all micro-steps.
    """
    rows = Noting()
    with recording() as found:
        built = build(config)
        rows.give(built.model, is_compiled=False)
        micro_batch = config.train.micro_batch
        engine = engines.build_engine(built.model, config, built.groups, micro_batch)
        share = built.topology.sequences_per_data_rank(config.train.global_batch, micro_batch)
        tokens, targets, starts = (values[:micro_batch] for values in batch_of(0, config))
        parts = [Batch(tokens, targets, starts if config.data.reset_at_document else None)] * (share // micro_batch)
        batch = GlobalBatch(1, parts, share * tokens.shape[1])
        pace = Pace(built.topology, 100, [""] * built.topology.world.size, cast(Any, None), cast(Any, None))
        steps = Steps(engine, RunPlan.of(config, built.topology), len(parts), Stop(), pace)
        steps._targets = torch.ones((), dtype=torch.float64)
        for number in range(1, 4 if config.parallel.zero == 3 else 2):  # as many as a rehearsal makes
            steps.make(number, batch, batch, 1e-3)
    return list(found), rows.routed


def given(config: Config, rank: int, routed: list[Routed]) -> Load:
    """The load of the expert group of a rank."""
    ranks = layout_of(config, len(routed))
    matrices = {}
    for name in routed[0]:
        kinds = [kind for kind in ("expert", "inner_expert") if len(ranks.members(rank, kind)) > 1]
        kind = kinds[-1] if "_proj" in name or "inner" in name else kinds[0]
        matrices[name] = [routed[member][name] for member in ranks.members(rank, kind)]
    return Given(given=matrices)


def layout_of(config: Config, size: int) -> Ranks:
    return Ranks(RunPlan.of(config, Topology.of(config, World(0, size, 0, size))))


def rehearsed(config: Config, size: int, loads: list[Load]) -> list[Report]:
    """In the process: every rank, with gradients reduced as on a CPU: not beside the backward pass."""
    with mock.patch.object(engines, "_reduces_beside_backward", lambda *_: False):
        return [rehearse(config, size, rank, load) for rank, load in enumerate(loads)]


def among_others(calls: list[Call]) -> list[Collective]:
    return [call.collective for call in calls if len(call.collective.group) > 1]


def check_layout(world: Processes, rehearsals: Rehearsals, config: Config, size: int) -> None:
    """Every rank really does what it does when it is rehearsed, and what follows from others of its role."""
    ran = world.run(real, config, ranks=size)
    routed = [rank[1] for rank in ran]
    reports = rehearsals.run(rehearsed, config, size, [given(config, rank, routed) for rank in range(size)])
    ranks = layout_of(config, size)
    entries = [ranks.entries(rank, report) for rank, report in enumerate(reports)]
    for rank, (found, _) in enumerate(ran):
        assert [one for one in found if len(one.group) > 1] == among_others(calls_of(reports[rank])), f"rank {rank}"
    roles = ranks.roles()
    for role in roles:
        for rank in role:
            assert not difference(ranks, role[0], entries[role[0]], rank, entries[rank])
            follows = [ranks.call(rank, one) for one in map(settled(entries, role), range(len(entries[role[0]])))]
            assert among_others(follows) == [one for one in ran[rank][0] if len(one.group) > 1]
    assert disagreement({rank: [Call(one) for one in found] for rank, (found, _) in enumerate(ran)}) is None
    assert not circle({rank: [meeting(rank, one) for one in found] for rank, (found, _) in enumerate(ran)})
    of_roles = [entries[role[0]] for role in roles]
    assert compare(ranks, roles, of_roles)
    assert f"through {sum(len(among_others(calls_of(one))) for one in reports):,} calls" in follow(
        ranks, roles, of_roles
    )


def settled(entries: list[Any], role: tuple[int, ...]) -> Callable[[int], Any]:
    """An entry of a role, as its first and its last rank together tell it."""
    return lambda number: entries[role[0]][number].merged(entries[role[-1]][number])


BF16 = {"train__precision": "bf16"}
DEFAULT = [
    pytest.param("ME-*", Layout(4, 2, 2, 1), BF16, id="TP EP ZeRO 1"),
]
SLOW = [
    ("ME", Layout(4, 1, 4, 0), {}),
    ("ME", Layout(4, 2, 4, 2), BF16),
    ("ME*", Layout(4, 4, 2, 1), BF16),
    ("ME", Layout(4, 2, 2, 1, expert_tensor=True), BF16),
    ("M-*", Layout(4, 2, 1, 3), BF16),
    ("ME", Layout(4, 2, 2, 2), BF16 | {"moe__capacity_factor": 1.25}),
]


@pytest.mark.parametrize(
    ("pattern", "layout", "keys"),
    [*DEFAULT, *(pytest.param(*one, id=f"{one[0]} {one[1]}", marks=pytest.mark.slow) for one in SLOW)],
)
def test_what_follows_from_roles_is_what_every_rank_really_does(
    world: Processes, rehearsals: Rehearsals, pattern: str, layout: Layout, keys: dict[str, Any]
) -> None:
    check_layout(world, rehearsals, config_of(pattern, layout, 2, **keys), layout.ranks)


def checked(check: Callable[..., None], config: Config, *arguments: Any) -> list[str]:
    """In the process: the lines of a check."""
    lines: list[str] = []
    check(config, *arguments, lines.append)
    return lines


def with_half_a_group(check: Callable[..., None], config: Config, *arguments: Any) -> list[str]:
    """In the process: where the first half of the data ranks sums once more than the others."""
    squared = engines.squared_norm

    def faulty(engine: Any) -> torch.Tensor:
        norm = squared(engine)
        group = engine.mpu.get_data_parallel_group()
        if group.rank() < group.size() // 2:
            dist.all_reduce(norm, group=group)
        return norm

    with mock.patch.object(engines, "squared_norm", faulty):
        return checked(check, config, *arguments)


@pytest.mark.parametrize("check", [partial(check_all), partial(check_some)], ids=["all", "some"])
def test_a_collective_of_half_of_a_group_is_named(rehearsals: Rehearsals, check: Callable[..., None]) -> None:
    config = config_of("M-", Layout(8, 2), 2, **BF16)
    arguments = (8, Load()) if check.func is check_all else (8, [0, 6], Load())
    with pytest.raises(
        RunStopped, match=r"the group of ranks 0, 2 \.\.\. 6 hangs or fails at its collective \d+: "
    ) as stop:
        rehearsals.run(with_half_a_group, check.func, config, *arguments)
    assert "makes an all-reduce of 8 bytes of float64" in str(stop.value)
    assert "makes an all-gather" in str(stop.value) or "makes no further call" in str(stop.value)


@pytest.mark.slow
def test_all_ranks_of_a_large_world_agree(rehearsals: Rehearsals) -> None:
    config = config_of(
        "ME", Layout(1024, 4, 16), moe__experts=32, train__global_batch=1024, train__micro_batch=2, **BF16
    )
    first, *lines = rehearsals.run(checked, check_all, config, 1024, Load.parse("skewed:2"))
    assert first == "roles       3 of 1,024 ranks"  # the last tensor rank has less of the vocabulary
    assert sum(int(line.split(" ranks,")[0].replace(",", "")) for line in lines if "rehearsed" in line) == 1024
    agree = [line for line in lines if line.startswith("agree")]
    assert any("expert: 64 groups of 16 ranks" in line for line in agree)
    assert any("world: 1 groups of 1,024 ranks" in line for line in agree)


A, B = Collective("all-reduce", (0, 1), 8), Collective("all-gather", (0, 1), 8)
TO, FROM = (
    Collective("all-to-all", (0, 1), 3, sent=(1, 2), received=(1, 4)),
    Collective("all-to-all", (0, 1), 5, sent=(4, 1), received=(2, 1)),
)
SEND = Collective("send", (0, 1), 8, root=1)


@pytest.mark.parametrize(
    ("first", "second", "position"),
    [
        ([A, B], [A, B], None),
        ([A, B], [B, A], 1),
        ([A, B], [A], 2),
        ([A], [A._replace(bytes=4)], 1),
        ([A], [A._replace(dtype="bfloat16")], 1),
        ([A._replace(root=0)], [A._replace(root=1)], 1),
        ([A, A._replace(channel=1)], [A._replace(channel=1), A], None),
        ([TO], [FROM], None),
        ([TO], [FROM._replace(received=(3, 1))], 1),
        ([SEND, A], [A, SEND._replace(kind="receive", root=0)], None),
        ([SEND], [A], 1),
        ([SEND], [SEND._replace(kind="receive", root=0, bytes=4)], 1),
    ],
)
def test_the_first_call_that_differs_is_named(
    first: list[Collective], second: list[Collective], position: int | None
) -> None:
    found = disagreement({0: list(map(Call, first)), 1: list(map(Call, second)), 2: [Call(A._replace(group=(2,)))]})
    assert (found and found.position) == position


PAIR, THREE = Collective("all-reduce", (0, 1), 8), Collective("all-gather", (0, 1, 2), 8)
GO, COME = ({rank: Collective(kind, (0, 1), 8, root=1 - rank) for rank in (0, 1)} for kind in ("send", "receive"))


@pytest.mark.parametrize(
    ("ranks", "waits"),
    [
        ([[PAIR, THREE], [PAIR, THREE], [THREE]], []),
        ([[PAIR, THREE], [THREE, PAIR], [THREE]], [(0, 0), (1, 0)]),
        ([[PAIR, THREE, PAIR], [PAIR, PAIR, THREE], [THREE]], [(0, 1), (1, 1)]),
        ([[PAIR, PAIR._replace(channel=1)], [PAIR._replace(channel=1), PAIR]], [(0, 0), (1, 0)]),
        ([[GO[0], COME[0]], [COME[1], GO[1]]], []),
        ([[GO[0], COME[0]], [GO[1], COME[1]]], [(0, 0), (1, 0)]),
    ],
)
def test_an_order_of_groups_that_hangs_is_found(ranks: list[list[Collective]], waits: list[tuple[int, int]]) -> None:
    """In each group all do the same, and of several groups one rank makes another's call first."""
    assert disagreement({rank: list(map(Call, calls)) for rank, calls in enumerate(ranks)}) is None
    assert circle({rank: [meeting(rank, one) for one in calls] for rank, calls in enumerate(ranks)}) == waits


def test_ranks_in_a_circle_are_named_though_no_two_share_two_groups() -> None:
    """Of two roles, on a square of tensor and data ranks."""
    ranks = layout_of(config_of("M", Layout(4, 2)), 4)
    tensor, data = (Entry("all-reduce", name, "float32", 0, f"{name}.py:1 reduce", 8) for name in ("tensor", "data"))
    orders = [[data, tensor, data], [data, data, tensor]]
    assert compare(ranks, [(0, 3), (1, 2)], orders)
    with pytest.raises(RunStopped) as stop:
        follow(ranks, [(0, 3), (1, 2)], orders)
    assert str(stop.value) == (
        "no rank of a circle can go on: rank 0 waits for rank 1 in an all-reduce of ranks 0-1 (tensor.py:1 reduce); "
        "rank 1 waits for rank 3 in an all-reduce of ranks 1, 3 (data.py:1 reduce); and so on, 4 ranks in a circle"
    )
    assert follow(ranks, [(0, 1), (2, 3)], orders).endswith("through 12 calls of all ranks")
    assert merged(0, orders[0], 3, orders[0]) == orders[0]
    with pytest.raises(RunStopped, match=r"ranks 0 and 1 hold the same .* call 2 is of the group tensor on one"):
        merged(0, orders[0], 1, orders[1])
    two = str(Circle(((0, Call(PAIR)), (1, Call(THREE)))))
    assert two.endswith(
        "rank 0 waits for rank 1 in an all-reduce of ranks 0-1; rank 1 waits for rank 0 in an all-gather of ranks 0-2"
    )
