"""Each router and its experts against a plain loop in float64: values, gradients and statistics."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.initialize import initialize
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.mixers.routing import RouterStatistics, balance_loss, update_balance_bias, z_loss
from moe_mamba.model.sequences import Sequences

D, WIDTH, EXPERTS, BATCH, LENGTH = 8, 6, 5, 2, 11
SEQUENCES = Sequences(BATCH, LENGTH)

CASES: dict[str, dict[str, Any]] = {
    "switch": {},
    "switch capacity 1": {"capacity_factor": 1.0},
    "switch capacity 0.1": {"capacity_factor": 0.1},
    "switch capacity 100": {"capacity_factor": 100.0},
    "switch sigmoid": {"scores": "sigmoid", "capacity_factor": 1.25},
    "top-2": {"router": "top_k", "top_k": 2},
    "top-2 capacity": {"router": "top_k", "top_k": 2, "capacity_factor": 1.0},
    "top-2 renormalised": {"router": "top_k", "top_k": 2, "renormalize": True},
    "top-3 renormalised sigmoid capacity": {
        "router": "top_k", "top_k": 3, "renormalize": True, "scores": "sigmoid", "capacity_factor": 0.8,
    },
    "top-2 bias sigmoid": {"router": "top_k", "top_k": 2, "balance": "bias", "scores": "sigmoid"},
    "switch bias capacity": {"balance": "bias", "capacity_factor": 1.0},
    "all experts": {"router": "top_k", "top_k": EXPERTS},
    "shared": {"shared_experts": 2},
    "expert choice": {"router": "expert_choice", "capacity_factor": 1.0},
    "expert choice sigmoid": {"router": "expert_choice", "top_k": 2, "capacity_factor": 1.3, "scores": "sigmoid"},
    "expert choice scarce": {"router": "expert_choice", "capacity_factor": 0.01},
}  # fmt: skip


def _layer(case: dict[str, Any], activation: str = "relu") -> MoE:
    config = ModelConfig(d_model=D, d_ff=WIDTH, activation=activation)
    layer = MoE(config, MoEConfig(**{"experts": EXPERTS, "capacity_factor": None, **case})).double()
    initialize(layer, 3)
    layer.router.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    if layer.router.config.balance == "bias":
        layer.router.balance_bias.copy_(torch.tensor([0.5, -0.5, 0.0, 0.3, -0.1]))
    return layer


def _x() -> Tensor:
    x = torch.randn(BATCH * LENGTH, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return x.requires_grad_()


def _expert(layer: MoE, x: Tensor, expert: int) -> Tensor:
    hidden = x @ layer.experts.in_proj[expert]
    if layer.experts.config.activation == "swiglu":
        hidden = torch.nn.functional.silu(hidden[:WIDTH]) * hidden[WIDTH:]
    else:
        hidden = hidden.clamp(min=0)
    return hidden @ layer.experts.out_proj[expert]


def _pairs(layer: MoE, scores: Tensor) -> tuple[list[tuple[int, int]], list[int], int]:
    """Plain loops: (token, expert) pairs that are kept, assignments an expert before dropping, dropped ones."""
    moe = layer.router.config
    if moe.router == "expert_choice":
        capacity = min(max(1, math.floor(moe.capacity_factor * moe.top_k * LENGTH / EXPERTS)), LENGTH)
        pairs = []
        for batch in range(BATCH):
            for expert in range(EXPERTS):
                here = range(batch * LENGTH, (batch + 1) * LENGTH)
                best = sorted(here, key=lambda token: -scores[token, expert].item())[:capacity]
                pairs += [(token, expert) for token in best]
        return pairs, [BATCH * capacity] * EXPERTS, len(scores) - len({token for token, _ in pairs})
    ranking = scores + layer.router.balance_bias if moe.balance == "bias" else scores
    chosen = [sorted(range(EXPERTS), key=lambda e: -row[e].item())[: moe.top_k] for row in ranking]
    capacity = math.inf
    if moe.capacity_factor is not None:
        capacity = max(1, math.floor(moe.capacity_factor * moe.top_k * len(scores) / EXPERTS))
    pairs, assigned, dropped = [], [0] * EXPERTS, 0
    for choice in range(moe.top_k):
        for token in range(len(scores)):
            expert = chosen[token][choice]
            if assigned[expert] < capacity:
                pairs.append((token, expert))
            else:
                dropped += 1
            assigned[expert] += 1
    return pairs, assigned, dropped


def _loop(layer: MoE, x: Tensor) -> tuple[Tensor, RouterStatistics]:
    """The whole layer by plain loops; assignments are in order of choice, then of position."""
    moe = layer.router.config
    logits = x @ layer.router.weight.T
    scores = logits.softmax(-1) if moe.scores == "softmax" else logits.sigmoid()
    pairs, assigned, dropped = _pairs(layer, scores)
    rows = [torch.zeros(D, dtype=torch.float64) for _ in x]
    for token, expert in pairs:
        weight = scores[token, expert]
        if moe.renormalize:
            weight = weight / scores[token].topk(moe.top_k).values.sum()
        rows[token] = rows[token] + weight * _expert(layer, x[token], expert)
    y = torch.stack(rows)
    if moe.shared_experts:
        y = y + (x @ layer.shared.in_proj.weight.T).clamp(min=0) @ layer.shared.out_proj.weight.T
    share = scores / scores.sum(-1, keepdim=True)
    statistics = RouterStatistics(
        probability=share.sum(0),
        assigned=torch.tensor(assigned, dtype=torch.float64),
        dropped=torch.tensor(dropped, dtype=torch.float64),
        z=(logits.exp().sum(-1).log() ** 2).sum(),
        entropy=-(share * share.log()).sum(),
        tokens=torch.tensor(len(x), dtype=torch.float64),
    )
    return y, statistics


def _losses(y: Tensor, statistics: RouterStatistics) -> Tensor:
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    return (y * weights).sum() + balance_loss(statistics) + 0.1 * z_loss(statistics)


def _check(layer: MoE) -> None:
    x, other = _x(), _x()
    y, measured, state = layer(x, SEQUENCES)
    statistics = measured["router"]
    assert state is None
    expected, counted = _loop(layer, other)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for name, value in vars(counted).items():
        torch.testing.assert_close(getattr(statistics, name), value, rtol=1e-10, atol=1e-10, msg=name)
    parameters = dict(layer.named_parameters())
    got = torch.autograd.grad(_losses(y, statistics), [x, *parameters.values()])
    wanted = torch.autograd.grad(_losses(expected, counted), [other, *parameters.values()])
    for name, one, two in zip(["x", *parameters], got, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", list(CASES))
def test_equals_a_plain_loop(case: str) -> None:
    _check(_layer(CASES[case]))


@pytest.mark.parametrize("case", ["switch capacity 1", "top-2 renormalised", "expert choice"])
def test_gated_experts_equal_a_plain_loop(case: str) -> None:
    _check(_layer(CASES[case], "swiglu"))


@pytest.mark.parametrize(
    "case, dtype",
    [
        ("switch capacity 1", torch.bfloat16),
        ("switch capacity 1", torch.float32),
        ("top-2 capacity", torch.float16),
        ("top-2 renormalised", torch.bfloat16),
        ("top-2 bias sigmoid", torch.bfloat16),
        ("expert choice", torch.float32),
        ("expert choice", torch.bfloat16),
    ],
)
def test_no_value_is_looked_at(case: str, dtype: torch.dtype) -> None:
    """So a GPU is never waited for: tensors without values are enough for a pass and its gradients.

    Without a capacity, torch's grouped product is so only in bf16.
    """
    layer = MoE(ModelConfig(d_model=D, d_ff=8), MoEConfig(**{"experts": 8, "capacity_factor": None, **CASES[case]}))
    layer.to(dtype).router.float()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y, measured, _ = layer(torch.randn(BATCH * LENGTH, D, dtype=dtype), SEQUENCES)
        statistics = measured["router"]
        torch.autograd.grad(y.square().sum() + balance_loss(statistics), list(layer.parameters()))
    assert y.shape == (BATCH * LENGTH, D)


def test_cases_drop_something() -> None:
    for case in ("switch capacity 1", "switch capacity 0.1", "top-2 capacity", "expert choice"):
        assert _layer(CASES[case])(_x(), SEQUENCES)[1]["router"].dropped > 0


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_router_learns_only_from_the_output_at_top_1(scores: str) -> None:
    layer = _layer({"scores": scores})
    y, _, _ = layer(_x(), SEQUENCES)
    (gradient,) = torch.autograd.grad(y.square().sum(), [layer.router.weight])
    assert gradient.abs().sum() > 1e-3


def test_evaluation_drops_nothing_unless_told() -> None:
    dropless, tight = _layer({}), _layer({"capacity_factor": 0.5})
    tight.eval()
    y, measured, _ = tight(_x(), SEQUENCES)
    statistics = measured["router"]
    assert statistics.dropped == 0
    torch.testing.assert_close(y, dropless(_x(), SEQUENCES)[0])
    told = _layer({"capacity_factor": None, "evaluation_capacity": 0.5}).eval()
    torch.testing.assert_close(told(_x(), SEQUENCES)[0], tight.train()(_x(), SEQUENCES)[0])


def test_expert_choice_keeps_its_capacity_in_evaluation() -> None:
    layer = _layer(CASES["expert choice"])
    torch.testing.assert_close(layer(_x(), SEQUENCES)[0], layer.eval()(_x(), SEQUENCES)[0])


def test_expert_choice_looks_at_one_sequence_at_a_time() -> None:
    layer = _layer(CASES["expert choice"])
    x = _x()
    alone = layer(x[:LENGTH], Sequences(1, LENGTH))[0]
    torch.testing.assert_close(layer(x, SEQUENCES)[0][:LENGTH], alone)


def test_dropped_tokens_get_no_update() -> None:
    layer = _layer({"capacity_factor": 0.1})
    y, measured, _ = layer(_x(), SEQUENCES)
    statistics = measured["router"]
    assert int((y == 0).all(-1).sum()) == int(statistics.dropped) > 0


def test_even_load_has_a_balance_loss_of_one() -> None:
    even = torch.full((4,), 6.0)
    statistics = RouterStatistics(even, even, *torch.tensor([0.0, 48.0, 0.0, 24.0]))
    assert balance_loss(statistics) == 1
    assert z_loss(statistics) == 2


def test_balance_bias_moves_against_the_load_and_is_saved_but_not_trained() -> None:
    layer = _layer({"balance": "bias"})
    before = layer.router.balance_bias.clone()
    update_balance_bias(layer.router, torch.tensor([9.0, 1.0, 5.0, 5.0, 5.0]), 0.25)
    moved = layer.router.balance_bias - before
    torch.testing.assert_close(moved, torch.tensor([-0.25, 0.25, 0, 0, 0], dtype=moved.dtype))
    assert "router.balance_bias" in layer.state_dict()
    assert "router.balance_bias" not in dict(layer.named_parameters())


def test_balance_bias_evens_the_load() -> None:
    layer = _layer({"balance": "bias", "scores": "sigmoid"})
    layer.router.balance_bias.zero_()
    x = _x().detach()
    first = layer(x, SEQUENCES)[1]["router"].assigned
    for _ in range(200):
        update_balance_bias(layer.router, layer(x, SEQUENCES)[1]["router"].assigned, 0.01)
    last = layer(x, SEQUENCES)[1]["router"].assigned
    assert last.max() < first.max()
    assert last.max() - last.min() <= 3


def test_router_is_fp32_in_a_bf16_layer() -> None:
    layer = _layer({"capacity_factor": 1.0}).bfloat16()
    layer.router.float()
    x = _x().detach().bfloat16()
    y, measured, _ = layer(x, SEQUENCES)
    statistics = measured["router"]
    assert y.dtype == torch.bfloat16
    assert {value.dtype for value in vars(statistics).values()} == {torch.float32}
    logits = x.float() @ layer.router.weight.T
    torch.testing.assert_close(statistics.probability, logits.softmax(-1).sum(0))
