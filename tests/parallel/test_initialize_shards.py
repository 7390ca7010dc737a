"""Every layout starts from the same bits, and no rank ever holds much more than its own part."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_mamba.config import Config
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.distributed import start_world
from moe_mamba.parallel.groups import start_groups
from moe_mamba.parallel.parallelize import build_model
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from tests.parallel.layouts import DECISIVE, Chunks, Layout, assemble, build, chunks_of, config_of
from tests.world import World as Processes

SLACK = 4096  # bytes: generators and the like

QUICK = [Layout(4, 2, 2, expert_tensor=True), Layout(4, 4, 1, expert_tensor=True)]
OTHERS = [
    Layout(1),
    Layout(2, 2),
    Layout(4, 4),
    Layout(2, 1, 2),
    Layout(4, 1, 4),
    Layout(4, 2, 4),
    Layout(4, 4, 2),
    Layout(8, 2, 4),
]
MODELS: dict[str, dict[str, Any]] = {
    "everything": {"moe__shared_experts": 1, "moe__balance": "bias"},
    "tied": {"model__tied_head": True, "model__activation": "relu", "model__norm": "layernorm"},
    "authors": {"model__initialization": "authors", "model__mamba_norms": False, "model__kv_heads": 1},
    "bf16": {"train__precision": "bf16"},
}


def parts(config: Config) -> Chunks:
    """In a worker: this rank's parts of parameters and buffers."""
    built = build(config)
    for router in built.model.routers().values():
        router.weight.data /= DECISIVE  # a power of two, so exactly what the seed gave
    tensors = dict(built.model.named_parameters()) | dict(built.model.named_buffers())
    for name, tensor in tensors.items():
        if built.held[name].is_padded:  # rows that stand for nothing are zero
            real = sum(tensor[local].numel() for _, local in built.held[name].chunks())
            assert tensor.count_nonzero() <= real
    return chunks_of(tensors, built.held)


def single(config: Config) -> dict[str, Tensor]:
    """The whole model as one process without any layout makes it."""
    model = LanguageModel(config.model, config.moe)
    initialize(model, config.run.seed)
    keep = model.fp32_parameter_names()
    is_half = config.train.precision == "bf16"
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: t.detach().bfloat16() if is_half and name not in keep else t.detach() for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("everything", QUICK),
        *(pytest.param(kind, QUICK, marks=pytest.mark.slow) for kind in MODELS if kind != "everything"),
        pytest.param("everything", OTHERS, marks=pytest.mark.slow, id="everything, the other layouts"),
    ],
)
def test_every_layout_starts_from_the_same_bits(world: Processes, kind: str, layouts: list[Layout]) -> None:
    for layout in layouts:
        config = config_of("M*-E", layout, **MODELS[kind])
        expected = single(config)
        ranks = world.run(parts, config, ranks=layout.ranks)
        assert assemble(ranks).keys() == expected.keys()
        for rank, chunks in enumerate(ranks):
            for name, shape, offsets, values in chunks:
                region = tuple(slice(o, o + size) for o, size in zip(offsets, values.shape, strict=True))
                assert values.dtype == expected[name].dtype, f"{layout}, rank {rank}: {name}"
                assert torch.equal(values, expected[name][region]), f"{layout}, rank {rank}: {name}"
                assert shape == expected[name].shape


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages outside the meta device that operators have made and that still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or storage.nbytes() == 0:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_the_peak_is_measured() -> None:
    with PeakMemory() as memory:
        one = torch.zeros(1000)
        two = one + 1
        two.view(10, 100).add_(1)
        del one
        three = torch.ones(500)
        del two, three
    assert (memory.peak, memory.now) == (8000, 0)


def peak_of(config: Config, layout: Layout, rank: int) -> tuple[int, int, int, int, int]:
    """In a worker: make one rank's model of a world of any size, in which nobody answers and nobody needs to.

    Returns:
        Bytes at the peak, at the end, of the rank's own parameters and buffers at the end and as first made, and of the
        largest logical tensor.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=layout.ranks, store=FakeStore())
    world = World(rank, layout.ranks, 0, 1)
    start_world(world)
    topology = Topology.of(config, world)
    plan = RunPlan.of(config, topology)
    groups = start_groups(plan)
    gc.collect()
    with PeakMemory() as memory:
        model = build_model(plan, groups)
    gc.collect()
    kept = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    own = sum(torch.Size(shard.local_shape).numel() for shard in plan.shards.values()) * 4  # fp32, until it is cast
    logical = max(torch.Size(shard.shape[shard.experts is not None :]).numel() * 4 for shard in plan.shards.values())
    return memory.peak, memory.now, kept, own, logical


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("pattern", "layout", "rank"),
    [
        ("MEM-*E", Layout(64, 4, 16), 37),
        ("MEM-*E", Layout(64, 1, 16), 5),
        ("ME", Layout(16, 4, 4, expert_tensor=True), 9),
        ("M-", Layout(8, 4), 3),
    ],
)
def test_a_rank_holds_at_most_its_part_and_one_logical_tensor(
    world: Processes, pattern: str, layout: Layout, rank: int, precision: str
) -> None:
    """Of stacked experts, one expert's. A rank of a large world, on a model whose tensors differ much in size."""
    sizes = {"model__d_model": 64, "model__heads": 8, "model__d_ff": 512, "model__vocab_size": 1000}
    experts = {"moe__experts": 32, "moe__d_expert": 64, "train__global_batch": 64, "train__micro_batch": None}
    config = config_of(pattern, layout, train__precision=precision, **sizes, **experts)
    ((peak, now, kept, own, logical),) = world.run(peak_of, config, layout, rank, ranks=1)
    assert now == pytest.approx(kept, abs=SLACK)
    assert own <= peak <= own + logical + SLACK
    with torch.device("meta"):
        assert peak < sum(tensor.numel() for tensor in LanguageModel(config.model, config.moe).parameters()) * 3
