"""Gradients of what tensor-parallel ranks hold alike: where they lie, and how they are summed."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_mamba.config import Config
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel import replicas, zero3
from moe_mamba.parallel.gradients import held_gradients
from moe_mamba.parallel.replicas import group_of_replicas, sum_over_replicas
from moe_mamba.train.objective import Objective
from tests.parallel.layouts import Layout, batch_of, build, config_of, share_of
from tests.world import World

Part = tuple[str, tuple[int, ...], int, int]
"""Name of a parameter, the ranks that hold the same part of it, and first and number of the elements of a gradient."""


def after_backward(config: Config) -> tuple[Any, Any]:
    """In a worker: an engine after the backward passes of a step."""
    built = build(config)
    topology, micro_batch = built.topology, config.train.micro_batch
    engine = engines.build_engine(built.model, config, built.groups, micro_batch)
    micro_steps = engine.gradient_accumulation_steps()
    objective = Objective(config.moe, 100, micro_steps, topology, built.model.balanced_routers())
    for number in range(micro_steps):
        values = (share_of(value, topology, number, micro_batch) for value in batch_of(0, config))
        tokens, targets, document_starts = values
        output = engine(tokens, document_starts, targets=targets)
        engine.backward(objective(output.cross_entropy, output.statistics))
        if number < micro_steps - 1:
            engine.step()
    return built, engine


def parts(config: Config) -> tuple[list[Part], list[Part], set[torch.dtype]]:
    """In a worker: of replicas, where gradients lie, and which parts of the masters this rank steps; their dtypes."""
    built, engine = after_backward(config)
    names = {id(parameter): name for name, parameter in built.model.named_parameters()}
    found, dtypes, owned = [], set(), []
    for parameter, gradient in held_gradients(engine):
        if (group := group_of_replicas(parameter)) is not None:
            ranks = tuple(dist.get_process_group_ranks(group))
            found.append((names[id(parameter)], ranks, first_element(engine, parameter), gradient.numel()))
            dtypes.add(gradient.dtype)
    for parameter in built.model.parameters():
        if (group := group_of_replicas(parameter)) is not None:
            ranks = tuple(dist.get_process_group_ranks(group))
            for kind, start, flat in engines._owned_ranges(engine, parameter):
                if kind == "weights" and flat.numel():
                    owned.append((names[id(parameter)], ranks, start, flat.numel()))
    return found, owned, dtypes


def first_element(engine: Any, parameter: Any) -> int:
    if not engine.zero_optimization():
        return 0
    if engine.zero_optimization_partition_weights():
        return zero3.owned_range(engine, parameter)[3]
    return parameter._hp_mapping.lp_fragment_address.start


OFFLOAD = {"parallel__offload_optimizer": True}


@pytest.mark.parametrize(
    ("pattern", "layout", "keys"),
    [
        # three data ranks: their parts end inside parameters
        ("MEM-*E", Layout(6, 2, 2, zero=1), {"train__precision": "bf16"}),
        ("ME", Layout(4, 2, 2, zero=2, expert_tensor=True), {"moe__shared_experts": 1, "train__precision": "bf16"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("MEM-*E", Layout(4, 2, 2, zero=0), {}),
                ("*-", Layout(8, 4, zero=1), {"model__attention_bias": True, "model__mlp_bias": True}),
                ("M own", Layout(4, 2, 4, zero=2), {}),  # experts inside Mamba, over two ranks of each tensor rank
                ("(M*)-", Layout(8, 4, zero=3), {"train__precision": "bf16"}),
                ("MEM-*E", Layout(6, 2, 2, zero=1), {"train__precision": "bf16"} | OFFLOAD),
                ("ME", Layout(4, 2, 2, zero=2), OFFLOAD),
                ("(M*)-", Layout(8, 4, zero=3), OFFLOAD),
            )
        ),
    ],
    ids=str,
)
def test_ranks_with_the_same_part_have_the_same_part_of_its_gradient(
    world: World, pattern: str, layout: Layout, keys: dict[str, Any]
) -> None:
    found = world.run(parts, config_of(pattern, layout, 2, **keys), ranks=layout.ranks)
    for gradients, owned, dtypes in found:
        assert dtypes <= {torch.float32}, "accumulators of bf16 parameters too"
        counts = {(name, first): count for name, _, first, count in gradients if count}
        if layout.zero == 3:  # gradients are padded as parts of parameters are
            assert all(counts[name, first] >= count for name, _, first, count in owned)
        else:
            assert counts == {(name, first): count for name, _, first, count in owned}
        for name, ranks, first, count in gradients:
            for other in ranks:
                assert (name, ranks, first, count) in found[other][0]
    for gradients, *_ in found:
        for _, ranks, *_ in gradients:
            of_group = [[part for part in found[other][0] if part[1] == ranks] for other in ranks]
            assert all(parts == of_group[0] for parts in of_group), "in one order"


def order_of_calls(config: Config) -> list[str]:
    """In a worker: when the sums of a step begin and are waited for."""
    _, engine = after_backward(config)
    order: list[str] = []
    start = dist.all_reduce

    def noting(tensor: torch.Tensor, group: Any, async_op: bool) -> Any:
        order.append("start")
        work = start(tensor, group=group, async_op=async_op)
        return mock.Mock(wait=lambda: (order.append("wait"), work.wait()))

    with mock.patch.object(replicas.dist, "all_reduce", noting):
        replicas.reduce_replicas(engine)
    return order


def test_all_sums_are_started_before_the_first_is_waited_for(world: World) -> None:
    for order in world.run(order_of_calls, config_of("*", Layout(4, 4)), ranks=4):
        assert order == ["start", "start", "wait", "wait"]


def sums() -> list[torch.Tensor]:
    """In a worker: sums of gradients of several shapes, dtypes and strides, over all ranks and over pairs."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    given = [
        (torch.full((2, 3), float(rank + 1)), dist.group.WORLD),
        (torch.full((5,), 10.0 * (rank + 1), dtype=torch.bfloat16), dist.group.WORLD),
        ((torch.arange(6.0).view(2, 3) * (rank + 1)).t(), pairs[rank // 2]),
        (torch.tensor(float(rank)), dist.group.WORLD),
    ]
    sum_over_replicas(given, torch.device("cpu"))
    return [gradient for gradient, _ in given]


def test_sums_of_any_shape_stay_where_they_are(world: World) -> None:
    for rank, (matrix, half, transposed, scalar) in enumerate(world.run(sums, ranks=4)):
        assert torch.equal(matrix, torch.full((2, 3), 10.0))
        assert torch.equal(half, torch.full((5,), 100.0, dtype=torch.bfloat16))
        assert torch.equal(transposed, torch.arange(6.0).view(2, 3).t() * (3.0 if rank < 2 else 7.0))
        assert scalar == 6.0
