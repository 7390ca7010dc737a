"""What planning says that an engine keeps is what an engine keeps, of each kind, on every layout."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_mamba.config import Config
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.buckets import BUCKET
from moe_mamba.parallel.grouping import optimizer_groups
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology
from moe_mamba.parallel.topology import World as Ranks
from moe_mamba.parallel.zero3 import gathered_shape
from moe_mamba.planning.state import EngineState, state_of
from moe_mamba.train.objective import Objective
from tests.parallel.layouts import Layout, batch_of, build, config_of, legal_layouts, share_of
from tests.parallel.test_parity import PATTERNS
from tests.planning.storages import stored
from tests.world import World


@dataclass
class Held:
    """Bytes of a rank's engine; of gradients the most after any pass. ``groups``: sizes of the optimizer's groups."""

    weights: int
    gradients: int
    optimizer: int
    other: int
    groups: list[tuple[int, ...]]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested lists and dicts; ZeRO's lists of views have the whole beside them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        yield from tensors_in(getattr(value, "flat_partition", None))
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(one)


def bytes_of(tensors: Iterable[Tensor | None], apart_from: dict[int, int] | None = None) -> int:
    """Of their storages, without ZeRO's buckets, which gradients lie in for a while."""
    found = stored(tensors)
    return sum(size for name, size in found.items() if name not in (apart_from or {}) and size < 2 * BUCKET)


def gradients_of(engine: Any) -> Iterator[Tensor | None]:
    for parameter in engine.module.parameters():
        yield parameter.grad
        yield getattr(parameter, "grad_accum", None)
    for name in ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer"):
        yield from tensors_in(getattr(engine.optimizer, name, None))


def masters_of(engine: Any) -> list[Tensor]:
    if engine.zero_optimization_partition_weights():
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups if engine.zero_optimization() else []


def held(config: Config) -> Held:
    """In a worker: two steps of the engine, and what it keeps."""
    built = build(config)
    engine = engines.build_engine(built.model, config, built.groups, config.train.micro_batch)
    parameters = list(built.model.parameters())
    groups = [
        tuple(gathered_shape(p).numel() for p in group["params"])
        for group in engines.parameter_groups(built.model, config)
    ]
    micro_steps = config.train.global_batch // (config.train.micro_batch * built.topology.data)
    gradients = 0
    for step in range(2):
        batch = batch_of(step, config)
        objective = Objective(config.moe, 5, micro_steps, built.topology, built.model.balanced_routers())
        for number in range(micro_steps):
            mine = [share_of(values, built.topology, number, config.train.micro_batch) for values in batch]
            output = engine(mine[0], mine[2], targets=mine[1])
            engine.backward(objective(output.cross_entropy, output.statistics))
            del output
            gradients = max(gradients, bytes_of(gradients_of(engine)))
            if number < micro_steps - 1:
                engine.step()
        engines.step(engine, 1.0)
    masters = masters_of(engine)
    optimizer, kinds = engine.optimizer, ("accumulated_grads_in_cpu", "param_buffer_of_bit16_for_cpu_offload_groups")
    other = [*(master.grad for master in masters), *(tensors_in([getattr(optimizer, kind, None) for kind in kinds]))]
    other += [getattr(optimizer, "temp_grad_buffer_for_cpu_offload", None)]
    states = list(engines.base_optimizer(engine).state.values())
    weights = [*parameters, *built.model.buffers(), *(getattr(p, "ds_tensor", None) for p in parameters)]
    return Held(
        weights=bytes_of(weights),
        gradients=gradients,
        optimizer=bytes_of([*masters, *tensors_in(states)]),
        other=bytes_of(other),
        groups=groups,
    )


def planned(config: Config, ranks: int) -> tuple[EngineState, list[tuple[int, ...]]]:
    plan = RunPlan.of(config, Topology.of(config, Ranks(0, ranks, 0, ranks)))
    return state_of(plan, "cpu"), [group.sizes for group in optimizer_groups(plan)]


HALF: dict[str, Any] = {"train__precision": "bf16"}
OFFLOADED: dict[str, Any] = {"parallel__offload_optimizer": True}
ALL, PARALLEL = "M*-E", "(ME)M shared"


@pytest.mark.parametrize(
    ("pattern", "layout", "keys"),
    [
        (PARALLEL, Layout(2, 2, 2, 1), HALF | {"moe__balance": "bias"}),
        (ALL, Layout(2, 1, 2, 2), {}),
        (ALL, Layout(2, 1, 2, 2), HALF | OFFLOADED),
        ("M*-", Layout(2, zero=3), {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (PARALLEL, Layout(4, 2, 4, 1), HALF | {"moe__balance": "bias"}),
                (ALL, Layout(4, 1, 2, 2), {}),
                (ALL, Layout(1, zero=0), {}),
                (ALL, Layout(1, zero=2), HALF),
                (ALL, Layout(4, 2, 2, 0), {}),
                (ALL, Layout(4, 2, 2, 1), HALF),
                (ALL, Layout(4, 4, 1, 1), {"model__tied_head": True, "moe__shared_experts": 1}),
                (ALL, Layout(4, 2, 2, 1, expert_tensor=True), {}),
                (ALL, Layout(4, 4, 4, 2), HALF),
                (ALL, Layout(8, 2, 2, 2), {}),
                (PARALLEL, Layout(8, 2, 2, 2), {}),
                (PARALLEL, Layout(4, 2, 2, 2, expert_tensor=True), HALF),
                (ALL, Layout(2, 1, 2, 1), OFFLOADED),
                (ALL, Layout(2, 1, 1, 1), OFFLOADED | HALF),
                (ALL, Layout(2, 1, 1, 2), OFFLOADED),
                ("M*-", Layout(4, 2, zero=3), HALF),
                ("M*-", Layout(2, zero=3), OFFLOADED),
                ("M*-", Layout(2, 2, zero=3), HALF),
                ("M*-", Layout(1, zero=3), OFFLOADED),
            )
        ),
    ],
)
def test_the_engine_keeps_what_is_planned(world: World, pattern: str, layout: Layout, keys: dict[str, Any]) -> None:
    check(world, pattern, layout, keys)


@pytest.mark.long
@pytest.mark.parametrize("pattern", PATTERNS)
def test_in_the_whole_matrix(world: World, pattern: str) -> None:
    for layout in legal_layouts(pattern):
        check(world, pattern, layout, HALF if layout.zero else {})


def check(world: World, pattern: str, layout: Layout, keys: dict[str, Any]) -> None:
    config = config_of(pattern, layout, 2, model__d_model=64, moe__d_expert=64, **keys)
    state, groups = planned(config, layout.ranks)
    ranks = world.run(held, config, ranks=layout.ranks)
    offloads = config.parallel.offload_optimizer
    for rank in ranks:
        assert rank.groups == groups
        assert rank.weights == pytest.approx(state.weights, rel=0.02)
        if not offloads:
            assert rank.optimizer == pytest.approx(state.optimizer, rel=0.02)
    if not offloads:
        assert max(rank.gradients for rank in ranks) == pytest.approx(state.gradients, rel=0.02)
        return
    # On a CPU the two memories are one.
    assert state.optimizer == 0
    found = max(rank.gradients + rank.optimizer + rank.other for rank in ranks)
    assert found == pytest.approx(state.gradients + state.host, rel=0.02)


def test_counting_makes_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(ALL, Layout(4, 2, 2, 2))
    plan = RunPlan.of(config, Topology.of(config, Ranks(0, 4, 0, 4)))
    with torch.utils._python_dispatch.TorchDispatchMode() as mode:
        monkeypatch.setattr(type(mode), "__torch_dispatch__", lambda *_: pytest.fail("a tensor is made"))
        assert state_of(plan, "cuda").weights
