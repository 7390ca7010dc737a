"""Experts spread over ranks give what one process gives on the same tokens: outputs, statistics and all gradients."""

import copy
from dataclasses import fields
from typing import Any

import deepspeed.moe.layer
import deepspeed.moe.sharded_moe
import pytest
import torch
from deepspeed.moe.utils import has_moe_layers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_mamba.config import Config, ModelConfig, MoEConfig
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.mixers.routing import RouterStatistics
from moe_mamba.model.sequences import Sequences
from moe_mamba.parallel.distributed import start_world
from moe_mamba.parallel.expert import ExpertParallelMoE
from moe_mamba.parallel.groups import start_groups
from moe_mamba.parallel.initialize import initialize_shards
from moe_mamba.parallel.parallelize import shard
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World

D, WIDTH, EXPERTS, BATCH, LENGTH, SEED = 8, 16, 8, 2, 10, 3

CASES: dict[str, dict[str, Any]] = {
    "switch": {},
    "top-2 renormalised": {"router": "top_k", "top_k": 2, "renormalize": True},
    "top-3 sigmoid with bias": {"router": "top_k", "top_k": 3, "scores": "sigmoid", "balance": "bias"},
    "switch with idle ranks": {"balance": "bias"},
    "capacity": {"capacity_factor": 1.0},
    "top-2 capacity": {"router": "top_k", "top_k": 2, "capacity_factor": 0.7},
    "expert choice": {"router": "expert_choice", "capacity_factor": 1.0},
    "shared": {"shared_experts": 2},
}
# Every token chooses among experts 0 and 1: other ranks receive no rows, and most experts are picked by nobody.
IDLE = torch.tensor([0.0, 0.0] + [-10.0] * (EXPERTS - 2))


def _configs(case: str) -> tuple[ModelConfig, MoEConfig]:
    model = ModelConfig(pattern="E", repeat=1, d_model=D, d_ff=WIDTH, vocab_size=16, activation="swiglu")
    return model, MoEConfig(**{"experts": EXPERTS, "capacity_factor": None, **CASES[case]})


def _liven(model: LanguageModel, case: str) -> MoE:
    """Only the layer, with a router that is sure of its choices."""
    layer = model.double().layers[0].mixer
    layer.router.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    if case == "switch with idle ranks":
        layer.router.balance_bias.copy_(IDLE)
    return layer


def _whole(case: str) -> MoE:
    model = LanguageModel(*_configs(case))
    initialize(model, SEED)
    return _liven(model, case)


def _spread(case: str, topology: Topology) -> tuple[LanguageModel, MoE, dict]:
    """A model sharded as in training, and what this rank holds."""
    start_world(topology.world)
    model_config, moe = _configs(case)
    plan = RunPlan.of(Config(model=model_config, moe=moe), topology)
    groups, model = start_groups(plan), copy.deepcopy(plan.model)
    with torch.device("meta"):
        shard(model, groups, plan.shards)
    model.to_empty(device="cpu")
    initialize_shards(model, plan.model, plan.shards, SEED)
    return model, _liven(model, case), plan.shards


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _text(data_rank: int) -> tuple[Tensor, Tensor]:
    """Tokens of a group of tensor-parallel ranks, and the gradient of its output."""
    return tuple(_normal(BATCH * LENGTH, D, seed=2 * data_rank + n) for n in (100, 101))


def _loss(y: Tensor, gradient: Tensor, statistics: RouterStatistics) -> Tensor:
    """Linear in the statistics, so that those of several ranks may be added."""
    return (y * gradient).sum() + (statistics.probability * _normal(EXPERTS, seed=7)).sum() + 0.1 * statistics.z


def _values(statistics: RouterStatistics) -> dict[str, Tensor]:
    return {field.name: getattr(statistics, field.name).detach() for field in fields(statistics)}


def _rank(case: str, tensor: int, expert: int, expert_tensor: bool) -> dict[str, Any]:
    """One rank's pass: its part of the output, of the input's gradient and of every weight's, and where those lie."""
    topology = Topology(World.from_environment(), tensor, expert, expert_tensor)
    model, layer, held = _spread(case, topology)
    x, gradient = (part.chunk(tensor)[topology.tensor_rank].clone() for part in _text(topology.data_rank))
    y, measured, state = layer(x.requires_grad_(), Sequences(BATCH, LENGTH))
    statistics = measured["router"]
    assert state is None
    _loss(y, gradient, statistics).backward()
    parts = []
    for name, parameter in model.named_parameters():
        if "mixer" in name:
            parts += [(name, at, parameter.grad[local]) for at, local in held[name].chunks()]
    return {"y": y.detach(), "x": x.grad, "statistics": _values(statistics), "parts": parts}


def _check(world: Any, case: str, ranks: int, tensor: int, expert: int, expert_tensor: bool = False) -> None:
    results = world.run(_rank, case, tensor, expert, expert_tensor, ranks=ranks)
    layer = _whole(case)
    for data_rank in range(ranks // tensor):
        tensor_ranks = results[data_rank * tensor : (data_rank + 1) * tensor]
        # Capacity is of the tokens that are routed together: a rank's own, or all ranks' where experts are sharded.
        routed_apart = 1 if expert_tensor else tensor
        x, gradient = (part.chunk(routed_apart) for part in _text(data_rank))
        y, x_gradient, counted = [], [], []
        for one, its_gradient in zip(x, gradient, strict=True):
            one = one.clone().requires_grad_()
            out, measured, _ = layer(one, Sequences(BATCH // routed_apart, LENGTH))
            statistics = measured["router"]
            _loss(out, its_gradient, statistics).backward()
            y, x_gradient, counted = [*y, out], [*x_gradient, one.grad], [*counted, _values(statistics)]
        _close("y", torch.cat([rank["y"] for rank in tensor_ranks]), torch.cat(y))
        _close("x", torch.cat([rank["x"] for rank in tensor_ranks]), torch.cat(x_gradient))
        for name in counted[0]:
            _close(name, sum(rank["statistics"][name] for rank in tensor_ranks), sum(one[name] for one in counted))
    got = {f"layers.0.mixer.{name}": torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    for name, at, part in (part for result in results for part in result["parts"]):
        got[name][tuple(slice(start, start + size) for start, size in zip(at, part.shape, strict=True))] += part
    for name, parameter in layer.named_parameters():
        _close(name, got[f"layers.0.mixer.{name}"], parameter.grad)


def _close(name: str, one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("ranks, expert", [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow), (4, 4)])
@pytest.mark.parametrize("case", list(CASES))
def test_equals_one_process(world: Any, case: str, ranks: int, expert: int) -> None:
    _check(world, case, ranks, tensor=1, expert=expert)


@pytest.mark.parametrize("ranks, expert", [pytest.param(2, 1, marks=pytest.mark.slow), (2, 2), (4, 4)])
@pytest.mark.parametrize("case", ["top-2 renormalised", "capacity", "expert choice", "shared"])
def test_tensor_ranks_send_their_own_tokens(world: Any, case: str, ranks: int, expert: int) -> None:
    _check(world, case, ranks, tensor=2, expert=expert)


@pytest.mark.parametrize("ranks, expert", [(2, 1), pytest.param(4, 1, marks=pytest.mark.slow), (4, 2)])
@pytest.mark.parametrize("case", ["top-2 renormalised", "capacity", "expert choice", "shared"])
def test_experts_sharded_by_tensor(world: Any, case: str, ranks: int, expert: int) -> None:
    _check(world, case, ranks, tensor=2, expert=expert, expert_tensor=True)


def test_cases_are_uneven() -> None:
    statistics = _whole("switch with idle ranks")(_text(0)[0], Sequences(BATCH, LENGTH))[1]["router"]
    assert statistics.assigned[2:].sum() == 0
    for case in ("capacity", "top-2 capacity", "expert choice"):
        assert _whole(case)(_text(0)[0], Sequences(BATCH, LENGTH))[1]["router"].dropped > 0


def _in_bf16(case: str) -> tuple[Tensor, Tensor]:
    model, layer, _ = _spread(case, Topology(World.from_environment(), expert=2))
    model.bfloat16()
    layer.router.float()
    x = _text(World.from_environment().rank)[0].bfloat16().requires_grad_()
    y, _, _ = layer(x, Sequences(BATCH, LENGTH))
    dispatch = layer.dispatcher.plan(layer.router(x, Sequences(BATCH, LENGTH))[0])
    rows = layer.dispatcher.send(x, dispatch)()
    y.float().sum().backward()
    assert rows.dtype == y.dtype == x.grad.dtype == torch.bfloat16
    return y.detach(), layer.experts.in_proj.grad


@pytest.mark.parametrize("case", ["switch with idle ranks", "top-2 capacity"])
def test_rows_travel_in_bf16(world: Any, case: str) -> None:
    layer = _whole(case).bfloat16()
    layer.router.float()
    for rank, (y, gradient) in enumerate(world.run(_in_bf16, case)):
        expected, _, _ = layer(_text(rank)[0].bfloat16(), Sequences(BATCH, LENGTH))
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        assert (gradient.abs().sum() > 0) == (case == "top-2 capacity" or rank == 0)


def _what_deepspeed_sees() -> None:
    model, layer, _ = _spread("shared", Topology(World.from_environment(), expert=2))
    whole = LanguageModel(*_configs("shared"))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]
    assert isinstance(layer, ExpertParallelMoE) and isinstance(layer, deepspeed.moe.layer.MoE)
    assert has_moe_layers(model) == (True, EXPERTS)
    foreign = (deepspeed.moe.sharded_moe.TopKGate, deepspeed.moe.sharded_moe.MOELayer)
    assert not any(isinstance(module, foreign) for module in model.modules())
    assert (layer.ep_size, layer.num_local_experts, layer.expert_group_name) == (2, EXPERTS // 2, "ep_size_2")
    assert list(model.routers().values()) == [layer.router]
    before = layer(_text(0)[0], Sequences(BATCH, LENGTH))[0]
    layer.set_deepspeed_parallelism()  # as the engine does once more
    assert torch.equal(layer(_text(0)[0], Sequences(BATCH, LENGTH))[0], before)


def test_deepspeed_knows_the_layer(world: Any) -> None:
    world.run(_what_deepspeed_sees)


def _without_values(case: str) -> None:
    _, layer, _ = _spread(case, Topology(World.from_environment(), expert=2))
    layer.bfloat16().router.float()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y, _, _ = layer(torch.randn(BATCH * LENGTH, D, dtype=torch.bfloat16), Sequences(BATCH, LENGTH))
        torch.autograd.grad(y.square().sum(), list(layer.parameters()))


@pytest.mark.parametrize("case", ["top-2 capacity", "expert choice"])
def test_fixed_buffers_look_at_no_value(world: Any, case: str) -> None:
    """So a GPU is never waited for: tensors without values are enough for a pass and its gradients."""
    world.run(_without_values, case)
