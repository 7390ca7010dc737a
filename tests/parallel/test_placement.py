"""The table of shards, only by arithmetic: every logical element is held, as often as it should be, and in place."""

import functools
import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from moe_mamba.config import Config
from moe_mamba.config_file import parse_config
from moe_mamba.model.language_model import LanguageModel, shard_specs
from moe_mamba.model.sharding import Block, ShardSpec
from moe_mamba.parallel.placement import (
    VOCABULARY_MULTIPLE,
    ParameterShard,
    check_shards,
    local_length,
    parameter_shards,
    segments_of_axis,
)
from moe_mamba.parallel.topology import Topology, World
from tests.parallel.layouts import Layout, config_of

LAYOUTS = [
    Layout(ranks, tensor, expert, expert_tensor=expert_tensor)
    for ranks in (1, 2, 4, 6, 8)
    for tensor in (1, 2, 4)
    for expert in (1, 2, 4)
    for expert_tensor in (False, True)
    if ranks % tensor == 0 and ranks % expert == 0 and not (expert_tensor and (tensor == 1 or ranks // tensor % expert))
]


@functools.cache
def meta(pattern: str, activation: str = "swiglu") -> tuple[Config, LanguageModel]:
    keys = {"model__activation": activation, "model__head_dim": 6, "moe__shared_experts": 2, "moe__balance": "bias"}
    config = config_of(pattern, Layout(1), **keys, model__attention_bias=True, model__mlp_bias=True)
    with torch.device("meta"):
        return config, LanguageModel(config.model, config.moe)


def on_every_rank(config: Config, model: LanguageModel, layout: Layout) -> list[dict[str, ParameterShard]]:
    topologies = [
        Topology(World(rank, layout.ranks, rank, layout.ranks), layout.tensor, layout.expert, layout.expert_tensor)
        for rank in range(layout.ranks)
    ]
    check_shards(config, topologies[0])
    return [parameter_shards(model, topology) for topology in topologies]


def elements(shard: ParameterShard) -> Tensor:
    """What lies where in a rank's memory: the number of the logical element, -1 in padding."""
    logical = torch.arange(torch.Size(shard.shape).numel()).view(shard.shape)
    local = torch.full(shard.local_shape, -1)
    for offsets, region in shard.chunks():
        sizes = local[region].shape
        local[region] = logical[tuple(slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))]
    return local


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("pattern", ["M", "*", "-", "E", "(M-)", "M own", "M shared", "M switch"])
def test_parts_cover_each_tensor_as_often_as_replicas_say(pattern: str, layout: Layout) -> None:
    config, model = meta(pattern)
    ranks = on_every_rank(config, model, layout)
    for name in ranks[0]:
        held = [rank[name] for rank in ranks]
        size = torch.Size(held[0].shape).numel()
        times = torch.zeros(size + 1, dtype=torch.int64)
        for shard in held:
            mine = elements(shard).flatten()
            assert len(mine[mine >= 0].unique()) == (mine >= 0).sum(), f"{name}: twice on a rank"
            assert shard.is_padded == bool((mine < 0).any()), name
            times += torch.bincount(mine + 1, minlength=size + 1)
        expected = layout.data * held[0].replicas
        if held[0].experts == "expert":
            expected = layout.ranks // layout.expert // (layout.tensor if layout.expert_tensor else 1)
        elif held[0].experts == "inner_expert":  # over the ranks with the same channels
            size = layout.expert if layout.expert_tensor else layout.expert // math.gcd(layout.expert, layout.tensor)
            expected = layout.data // size * held[0].replicas
        assert times[1:].unique().tolist() == [expected], name
        assert {shard.replicas for shard in held} == {held[0].replicas}, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_rank_of_each_part_is_its_first_replica(layout: Layout) -> None:
    config, model = meta("M*-E")
    ranks = on_every_rank(config, model, layout)
    for name in ranks[0]:
        if ranks[0][name].experts:  # parts of an expert differ, and DeepSpeed knows the ranks with the same ones
            assert all(rank[name].replicas == 1 and rank[name].is_first_replica for rank in ranks)
            continue
        for first in range(0, layout.ranks, layout.tensor):
            tensor_ranks = [rank[name] for rank in ranks[first : first + layout.tensor]]
            replicas = tensor_ranks[0].replicas
            for same in (tensor_ranks[n : n + replicas] for n in range(0, len(tensor_ranks), replicas)):
                assert len({shard.segments for shard in same}) == 1, name
                assert [shard.is_first_replica for shard in same] == [True] + [False] * (len(same) - 1), name
            assert len({shard.segments for shard in tensor_ranks}) == len(tensor_ranks) // replicas, name


@pytest.mark.parametrize("tensor", [2, 4])
def test_each_block_of_an_axis_is_sharded_by_itself(tensor: int) -> None:
    """[x | z] of a Mamba mixer, [gate | up] of feed-forward, shared experts, and experts sharded by tensor."""
    config, model = meta("M-E")
    layout = Layout(tensor, tensor, expert_tensor=True)
    names = {
        "layers.0.mixer.in_proj.weight": 0,
        "layers.1.mixer.in_proj.weight": 0,
        "layers.2.mixer.shared.in_proj.weight": 0,
        "layers.2.mixer.experts.in_proj": 2,
    }
    for rank, held in enumerate(on_every_rank(config, model, layout)):
        for name, axis in names.items():
            shard = held[name]
            logical = torch.arange(torch.Size(shard.shape).numel()).view(shard.shape)
            halves = logical.chunk(2, dim=axis)
            mine = torch.cat([half.chunk(tensor, dim=axis)[rank] for half in halves], dim=axis)
            assert torch.equal(elements(shard), mine), name


def test_an_activation_without_a_gate_is_one_block() -> None:
    config, model = meta("-E", "relu")
    for rank, held in enumerate(on_every_rank(config, model, Layout(2, 2, expert_tensor=True))):
        for name, axis in (("layers.0.mixer.in_proj.weight", 0), ("layers.1.mixer.experts.in_proj", 2)):
            logical = torch.arange(torch.Size(held[name].shape).numel()).view(held[name].shape)
            assert torch.equal(elements(held[name]), logical.chunk(2, dim=axis)[rank])


def test_mixers_declare_parameters_that_exist() -> None:
    designs = ("M*-E", "(ME)(*-)", "M own", "M shared", "M switch")
    for pattern, activation in itertools.product(designs, ("swiglu", "relu")):
        config, model = meta(pattern, activation)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        declared = shard_specs(config.model, config.moe)
        assert {name for name in declared if not name.endswith(".bias")} <= shapes.keys()
        for name in declared.keys() & shapes.keys():
            for spec in declared[name]:
                assert shapes[name][spec.axis] == sum(block.width for block in spec.blocks), name


def test_blocks_of_unequal_widths_are_sharded_each_by_itself() -> None:
    blocks = (Block(8, units=4), Block(8, units=4), Block(4, units=2), Block(4, units=2), Block(2, units=2))
    spec = ShardSpec(0, "tensor", blocks, "heads")  # [z | x | B | C | dt], as Mamba-2's projection is
    assert spec.fits(2) and not spec.fits(4) and not spec.fits(3)
    assert local_length(spec, 2) == 13
    logical = torch.arange(26)
    parts = [block.chunk(2) for block in logical.split([block.width for block in blocks])]
    for rank in (0, 1):
        segments = segments_of_axis(spec, rank, 2)
        mine = torch.cat([logical[first : first + length] for _, first, length in segments])
        assert torch.equal(mine, torch.cat([part[rank] for part in parts]))
        assert [segment.local for segment in segments] == [0, 4, 8, 10, 12]


def test_fewer_key_heads_than_tensor_ranks_are_copied_to_neighbours() -> None:
    config, model = meta("*")
    ranks = on_every_rank(config, model, Layout(4, 4))
    head_dim = config.model.resolved_head_dim
    for rank, held in enumerate(ranks):
        key, query = held["layers.0.mixer.k_proj.weight"], held["layers.0.mixer.q_proj.weight"]
        assert (key.replicas, key.is_first_replica, key.local_shape) == (2, rank % 2 == 0, (head_dim, 16))
        assert torch.equal(elements(held["layers.0.mixer.k_proj.bias"]), elements(key)[:, 0] // 16)
        assert torch.equal(elements(held["layers.0.mixer.q_proj.bias"]), elements(query)[:, 0] // 16)
        assert held["layers.0.mixer.o_proj.bias"].replicas == 4, "each rank adds it to its own tokens"
        group = config.model.heads // config.model.resolved_kv_heads
        # each of its query heads reads the key head that it holds
        for row in range(0, query.local_shape[0], head_dim):
            head = int(elements(query)[row, 0]) // 16 // head_dim
            assert int(elements(key)[0, 0]) // 16 // head_dim == head // group


def test_one_key_head_is_a_replica_that_shards_no_axis() -> None:
    tree = config_of("*", Layout(4, 4), model__kv_heads=1)
    with torch.device("meta"):
        model = LanguageModel(tree.model, tree.moe)
    for held in on_every_rank(tree, model, Layout(4, 4)):
        key = held["layers.0.mixer.k_proj.weight"]
        assert (key.replicas, key.tensor_axis, key.local_shape) == (4, None, key.shape)


def test_a_vocabulary_is_padded_and_a_rank_may_hold_none_of_it() -> None:
    config, model = meta("*-")
    rows = [held["embedding.weight"] for held in on_every_rank(config, model, Layout(4, 4))]
    assert {shard.local_shape for shard in rows} == {(VOCABULARY_MULTIPLE, 16)}
    assert [shard.segments[0][0].length for shard in rows] == [128, 128, 45, 0]
    assert [shard.is_padded for shard in rows] == [False, False, True, True]
    assert list(rows[3].chunks()) == []
    assert [chunk[0] for shard in rows for chunk in shard.chunks()] == [(0, 0), (128, 0), (256, 0)]


def test_gpt2s_odd_vocabulary() -> None:
    config = parse_config({"model": {"vocab_size": 50257, "repeat": 1}})
    with torch.device("meta"):
        model = LanguageModel(config.model, config.moe)
    for tensor in (1, 2, 4, 8):
        rows = [held["head.weight"] for held in on_every_rank(config, model, Layout(tensor, tensor))]
        assert sum(shard.segments[0][0].length for shard in rows) == 50257
        assert rows[0].local_shape[0] % VOCABULARY_MULTIPLE == 0 or tensor == 1
        assert rows[0].local_shape[0] * tensor == (50257 if tensor == 1 else -(-50257 // (128 * tensor)) * 128 * tensor)


def test_chunks_of_any_part_of_memory_are_slices_of_the_whole() -> None:
    """A random chunk of a rank's memory: its chunks, put together, are that part of the tensor of logical numbers."""
    choose = random.Random(0)
    config, model = meta("M*-E")
    for layout in (Layout(4, 2, 2), Layout(8, 4, 2, expert_tensor=True), Layout(4, 4)):
        for held in on_every_rank(config, model, layout):
            for shard in held.values():
                _check_random_chunks(shard, choose)


def _check_random_chunks(shard: ParameterShard, choose: random.Random) -> None:
    memory = elements(shard)
    logical = torch.arange(torch.Size(shard.shape).numel()).view(shard.shape)
    for _ in range(4):
        offsets = [choose.randrange(length) for length in shard.local_shape]
        sizes = [choose.randint(1, length - o) for o, length in zip(offsets, shard.local_shape, strict=True)]
        mine = memory[tuple(slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))]
        rebuilt = torch.full(sizes, -1)
        for place, region in shard.chunks(offsets, sizes):
            chunk = logical[tuple(slice(o, o + n) for o, n in zip(place, rebuilt[region].shape, strict=True))]
            assert (rebuilt[region] == -1).all()
            rebuilt[region] = chunk
        assert torch.equal(rebuilt, mine), shard.name


def test_a_model_sharded_for_one_rank_is_whole() -> None:
    config, model = meta("M*-E")
    (held,) = on_every_rank(config, model, Layout(1))
    assert held.keys() == dict(itertools.chain(model.named_parameters(), model.named_buffers())).keys()
    assert all(shard.local_shape == shard.shape and not shard.is_padded for shard in held.values())
    assert "layers.3.mixer.router.balance_bias" in held
