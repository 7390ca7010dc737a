"""Arithmetic of ranks, what is refused and which layout is proposed instead, and the process groups of a layout."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_mamba.config import Config
from moe_mamba.config_file import parse_config
from moe_mamba.errors import UserError
from moe_mamba.parallel.distributed import reduce_over_data
from moe_mamba.parallel.placement import check_shards
from moe_mamba.parallel.topology import Topology, World
from tests.parallel.layouts import Layout, build, config_of, legal_layouts
from tests.world import World as Processes


def world_of(ranks: int, rank: int = 0) -> World:
    return World(rank, ranks, rank % 8, min(ranks, 8))


def accept(config: Config, ranks: int) -> Topology:
    topology = Topology.of(config, world_of(ranks))
    check_shards(config, topology)
    return topology


def test_a_world_of_one() -> None:
    topology = Topology(world_of(1))
    assert (topology.data, topology.data_rank, topology.tensor_rank, topology.expert_rank) == (1, 0, 0, 0)
    assert not topology.is_sharded


def test_one_rank_of_a_thousand() -> None:
    topology = Topology(world_of(1024, 17), tensor=8, expert=64)
    assert (topology.data, topology.data_rank, topology.tensor_rank, topology.expert_rank) == (128, 2, 1, 17)
    last = Topology(world_of(1024, 1023), tensor=8, expert=64)
    assert (last.data_rank, last.tensor_rank, last.expert_rank) == (127, 7, 63)
    sharded = Topology(world_of(1024, 17), tensor=8, expert=64, expert_tensor=True)
    assert sharded.expert_rank == sharded.data_rank == 2
    assert Topology(world_of(1024, 1023), 8, 64, expert_tensor=True).expert_rank == 127 % 64


@pytest.mark.parametrize("expert_tensor", [False, True])
@pytest.mark.parametrize(("ranks", "tensor", "expert"), [(8, 2, 4), (8, 4, 2), (16, 4, 4), (6, 2, 3), (4, 4, 1)])
def test_every_part_is_held_by_as_many_ranks(ranks: int, tensor: int, expert: int, expert_tensor: bool) -> None:
    topologies = [Topology(world_of(ranks, rank), tensor, expert, expert_tensor) for rank in range(ranks)]
    pairs = [(t.data_rank, t.tensor_rank) for t in topologies]
    assert pairs == [(data, tensor_rank) for data in range(ranks // tensor) for tensor_rank in range(tensor)]
    held = [(t.expert_rank, t.tensor_rank if expert_tensor else 0) for t in topologies]
    parts = expert * tensor if expert_tensor else expert
    assert {held.count(part) for part in held} == {ranks // parts}
    assert len(set(held)) == parts


@pytest.mark.parametrize("pattern", ["ME", "*-", "MEM-*E"])
def test_every_legal_layout_is_accepted(pattern: str) -> None:
    for layout in legal_layouts(pattern):
        assert accept(config_of(pattern, layout), layout.ranks).data == layout.data


def asked(pattern: str, layout: Layout, **keys: Any) -> Config:
    """As `config_of`, for layouts that cannot be."""
    sizes = {f"parallel__{key}": getattr(layout, key) for key in ("tensor", "expert", "expert_tensor")}
    return config_of(pattern, Layout(1), **{"train__micro_batch": None, **sizes, **keys})


def proposed(config: Config, ranks: int, line: str) -> list[tuple[Config, int]]:
    """Every layout that a refusal proposes, each as it would be typed."""
    found = []
    for section, key, value in re.findall(r"set (\w+)\.(\w+)=(\w+)", line):
        tree = config.model_dump()
        tree[section][key] = value
        found.append((parse_config(tree), ranks))
    found += [(config, int(count)) for count in re.findall(r"start (\d+) process", line)]
    return found


EVERY_REFUSAL: list[tuple[str, Layout, dict[str, Any], list[str]]] = [
    # sizes of the world
    ("*-", Layout(6, 4), {}, ["parallel.tensor=4", "processes, 6", "set parallel.tensor=2", "start 4 processes"]),
    ("*-", Layout(1, 4), {}, ["parallel.tensor=4", "set parallel.tensor=1", "start 4"]),
    ("ME", Layout(6, 2, 4), {}, ["parallel.expert=4", "processes, 6", "set parallel.expert=2", "start 4 processes"]),
    ("ME", Layout(1, 1, 4), {}, ["parallel.expert=4", "set parallel.expert=1", "start 4 processes"]),
    (
        "ME",
        Layout(8, 4, 4, expert_tensor=True),
        {},
        ["parallel.expert=4", "groups of tensor-parallel ranks, 2", "set parallel.expert=2", "start 16 processes"],
    ),
    ("ME", Layout(3, 2, expert_tensor=True), {"train__micro_batch": 1}, ["parallel.tensor=2", "start 2 processes"]),
    # what the model can be sharded into
    ("*-", Layout(4, 4), {"model__heads": 2}, ["parallel.tensor=4", "model.heads=2", "set parallel.tensor=2"]),
    (
        "*-",
        Layout(3, 3),
        {"model__heads": 6, "model__d_model": 24, "model__kv_heads": 2, "data__sequence_length": 9},
        ["parallel.tensor=3", "neither divides nor is a multiple of", "model.kv_heads=2", "set parallel.tensor=1"],
    ),
    (
        "*-",
        Layout(2, 2),
        {"model__heads": 6, "model__d_model": 24, "model__kv_heads": 3},
        ["parallel.tensor=2", "model.kv_heads=3", "set parallel.tensor=1"],
    ),
    ("M", Layout(6, 3), {}, ["parallel.tensor=3", "model.expand x model.d_model=32", "set parallel.tensor=2"]),
    ("M", Layout(2, 2), {"model__d_inner": 341}, ["parallel.tensor=2", "model.d_inner=341", "set parallel.tensor=1"]),
    ("-", Layout(4, 4), {"model__d_ff": 18}, ["parallel.tensor=4", "model.d_ff=18", "set parallel.tensor=2"]),
    ("ME", Layout(8, 1, 8), {}, ["parallel.expert=8", "moe.experts=4", "set parallel.expert=4"]),
    ("ME", Layout(6, 2, 6), {"moe__experts": 8}, ["parallel.expert=6", "moe.experts=8", "set parallel.expert=2"]),
    (
        "ME",
        Layout(4, 4, expert_tensor=True),
        {"moe__d_expert": 6},
        ["parallel.tensor=4", "moe.d_expert=6", "set parallel.tensor=2"],
    ),
    ("ME", Layout(2, 2, expert_tensor=True), {"moe__d_expert": 7}, ["parallel.tensor=2", "change moe.d_expert"]),
    (
        "E",
        Layout(4, 4),
        {"moe__d_expert": 6, "moe__shared_experts": 1},
        ["parallel.tensor=4", "moe.shared_experts x moe.d_expert=6", "set parallel.tensor=2"],
    ),
    # the batch
    ("M", Layout(5), {}, ["train.global_batch=24", "5 processes", "=25", "start 4 process"]),
    (
        "ME",
        Layout(10, 2, 2),
        {"train__micro_batch": 3},
        ["5 groups of 2 tensor-parallel ranks", "set train.global_batch=30", "start 8 processes"],
    ),
    ("M", Layout(2), {"train__micro_batch": 8}, ["train.micro_batch=8", "12 sequences", "set train.micro_batch=4"]),
    (
        "M",
        Layout(4, 4),
        {"data__sequence_length": 6, "train__micro_batch": 3},
        ["train.micro_batch=3", "parallel.tensor=4", "set train.micro_batch=2"],
    ),
    (
        "M",
        Layout(4, 4),
        {"data__sequence_length": 6, "train__global_batch": 3},
        ["train.global_batch=3", "6 tokens", "parallel.tensor=4", "set train.global_batch=4"],
    ),
    (
        "E",
        Layout(2, 2),
        {"moe__router": "expert_choice", "moe__capacity_factor": 1.0, "train__micro_batch": 3},
        ["train.micro_batch=3", "parallel.tensor=2", "set train.micro_batch=2"],
    ),
]


@pytest.mark.parametrize(("pattern", "layout", "keys", "named"), EVERY_REFUSAL)
def test_what_does_not_fit_is_refused_with_a_layout_that_does(
    pattern: str, layout: Layout, keys: dict[str, Any], named: list[str]
) -> None:
    config = asked(pattern, layout, **keys)
    with pytest.raises(UserError) as refusal:
        accept(config, layout.ranks)
    line = str(refusal.value)
    assert "\n" not in line
    for part in named:
        assert part in line
    ways = proposed(config, layout.ranks, line)
    assert ways or "change moe.d_expert" in line
    for other, ranks in ways:
        accept(other, ranks)


def test_every_refusal_of_small_worlds_proposes_what_is_accepted() -> None:
    for ranks in range(1, 9):
        for tensor in range(1, 6):
            for expert in (1, 2, 3, 4, 8):
                for expert_tensor in (False, True)[: 1 + (tensor > 1)]:
                    layout = Layout(ranks, tensor, expert, expert_tensor=expert_tensor)
                    config = asked("ME", layout)
                    try:
                        accept(config, ranks)
                    except UserError as refusal:
                        line = str(refusal)
                        for other, count in proposed(config, ranks, line):
                            check_sizes_alone = f"start {count} process" in line  # which may not fit the model yet
                            Topology.of(other, world_of(count)) if check_sizes_alone else accept_or_refuse(other, count)


def accept_or_refuse(config: Config, ranks: int) -> None:
    """A proposal fits world and batch; where the model cannot be sharded so, the refusal proposes one that can."""
    topology = Topology.of(config, world_of(ranks))
    try:
        check_shards(config, topology)
    except UserError as refusal:
        for other, count in proposed(config, ranks, str(refusal)):
            accept(other, count)


def test_a_micro_batch_is_shared_by_tensor_ranks() -> None:
    config = config_of("ME", Layout(4, 4), data__sequence_length=6)
    assert Topology(world_of(4), 4).micro_batch_multiple(config) == 2
    assert Topology(world_of(4), 4).micro_batch_multiple(config_of("ME", Layout(4, 4))) == 1
    choice = config_of("E", Layout(4, 4), moe__router="expert_choice", moe__capacity_factor=1.0)
    assert Topology(world_of(4), 4).micro_batch_multiple(choice) == 4  # whole sequences to each rank
    assert Topology(world_of(4), 4, expert_tensor=True).micro_batch_multiple(choice) == 1


def members(config: Config) -> dict[str, Any]:
    """In a worker: the ranks of every group that this rank is in."""
    from deepspeed.utils import groups as deepspeed_groups

    built = build(config)
    groups, mpu = built.groups, built.groups.mpu
    name = f"ep_size_{built.topology.expert}"
    found = {
        "tensor": groups.tensor and dist.get_process_group_ranks(groups.tensor),
        "data": groups.data and dist.get_process_group_ranks(groups.data),
        "replicas": {count: dist.get_process_group_ranks(group) for count, group in groups.replicas.items()},
    }
    if built.topology.is_sharded:
        found["expert"] = dist.get_process_group_ranks(deepspeed_groups._get_expert_parallel_group(name))
        found["same experts"] = dist.get_process_group_ranks(deepspeed_groups._get_expert_data_parallel_group(name))
    if mpu is not None:
        for prefix in ("model_parallel", "tensor_model_parallel", "data_parallel"):
            group = dist.get_process_group_ranks(getattr(mpu, f"get_{prefix}_group")())
            size, rank = (getattr(mpu, f"get_{prefix}_{what}")() for what in ("world_size", "rank"))
            assert (size, group[rank]) == (len(group), dist.get_rank()), prefix
            assert group == found["data" if prefix == "data_parallel" else "tensor"]
    return found


@pytest.mark.parametrize(
    "layout",
    [
        Layout(4, 2, 2),
        Layout(4, 2, 2, expert_tensor=True),
        *(
            pytest.param(layout, marks=pytest.mark.slow)
            for layout in (
                Layout(4, 1, 2),
                Layout(4, 4, 4),
                Layout(8, 2, 4),
                Layout(8, 4, 2),
                Layout(8, 2, 2, expert_tensor=True),
                Layout(8, 4, 2, expert_tensor=True),
            )
        ),
    ],
    ids=str,
)
def test_groups_have_the_right_members(world: Processes, layout: Layout) -> None:
    every = range(layout.ranks)
    ranks = world.run(members, config_of("*E", layout), ranks=layout.ranks)
    for rank, found in enumerate(ranks):
        mine = Topology(world_of(layout.ranks, rank), layout.tensor, layout.expert, layout.expert_tensor)
        others = [Topology(world_of(layout.ranks, r), mine.tensor, mine.expert, mine.expert_tensor) for r in every]
        tensor_ranks = [r for r in every if others[r].data_rank == mine.data_rank]
        lane = [r for r in every if others[r].tensor_rank == mine.tensor_rank]
        assert found["tensor"] == (tensor_ranks if layout.tensor > 1 else None)
        assert found["data"] == (lane if layout.tensor > 1 else None)
        pool = lane if layout.expert_tensor else list(every)
        place = pool.index(rank) // layout.expert * layout.expert
        assert found["expert"] == pool[place : place + layout.expert]
        assert found["same experts"] == [r for r in pool if others[r].expert_rank == mine.expert_rank]
        counts = {2, 4} if layout.tensor == 4 else {layout.tensor} - {1}  # the tiny model has 2 key and value heads
        assert set(found["replicas"]) == counts
        for count, group in found["replicas"].items():
            assert group == [r for r in every if r // count == rank // count]


def reduced(tensor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In a worker: values that tensor-parallel ranks have alike, summed over data ranks; and that sum, one by one."""
    topology = Topology(World.from_environment(), tensor)
    each = [torch.tensor([2.0**40 + rank, 0.1 * rank, float(rank == 1)]).double() for rank in range(topology.data)]
    return reduce_over_data(each[topology.data_rank].clone(), topology), torch.stack(each).sum(0)


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (4, 1), (4, 2), (3, 3), (6, 3)])
def test_sums_over_data_count_each_tensor_parallel_group_once(world: Processes, ranks: int, tensor: int) -> None:
    for found, expected in world.run(reduced, tensor, ranks=ranks):
        assert found.dtype == torch.float64 and found[0] == expected[0] and found[2] == expected[2]  # counts are exact
        torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
