"""Experts inside Mamba against a loop over tokens and experts in float64: values, gradients and statistics."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.kernels import selective_scan
from moe_mamba.model.initialize import initialize
from moe_mamba.model.mixers import choose_mixer
from moe_mamba.model.mixers.mamba import Mamba
from moe_mamba.model.mixers.routed_mamba import RoutedMamba
from moe_mamba.model.mixers.routing import Router, RouterStatistics
from moe_mamba.model.sequences import Sequences

D, BATCH, LENGTH, EXPERTS = 8, 2, 9, 4
TOKENS, SEQUENCES = BATCH * LENGTH, Sequences(BATCH, LENGTH)
ALL = ["conv", "gate", "out"]
CASES: dict[str, dict[str, Any]] = {
    "conv and gate": {"projections": ["conv", "gate"]},
    "gate": {"projections": ["gate"]},
    "conv": {"projections": ["conv"], "top_k": 2},
    "all own": {"projections": ALL},
    "out own top-2": {"projections": ["out"], "top_k": 2},
    "out own capacity": {"projections": ["out"], "capacity_factor": 0.5},
    "all own capacity": {"projections": ALL, "top_k": 2, "capacity_factor": 0.8},
    "shared": {"projections": ALL, "router": "shared"},
    "shared top-2": {"projections": ALL, "router": "shared", "top_k": 2},
    "shared gate and out capacity": {"projections": ["gate", "out"], "router": "shared", "capacity_factor": 0.5},
    "shared out": {"projections": ["out"], "router": "shared", "top_k": 2},
    "switch own": {"projections": ALL, "expert": "switch", "d_expert": 6},
    "switch shared": {"projections": ["conv", "out"], "router": "shared", "expert": "switch", "top_k": 2},
}


def build(case: dict[str, Any], activation: str = "swiglu", **moe: Any) -> RoutedMamba:
    config = ModelConfig(pattern="M", repeat=1, d_model=D, d_inner=11, d_state=3, d_ff=10, activation=activation)
    moe = {"experts": EXPERTS, "capacity_factor": 0.1, "router": "expert_choice", "balance": "none"} | moe
    mixer = choose_mixer("M", MoEConfig(**moe, inner=case), 1).build(config, MoEConfig(**moe, inner=case), "auto")
    assert isinstance(mixer, RoutedMamba)
    initialize(mixer.double(), 3)
    generator = torch.Generator().manual_seed(1)
    for module in mixer.modules():
        if isinstance(module, Router):
            module.weight.data.normal_(generator=generator)
    return mixer


def decide(mixer: RoutedMamba, router: Router, x: Tensor) -> tuple[list[list[tuple[int, Tensor]]], Tensor, int]:
    """(expert, weight) of each token's choices that found room, the shares of all experts, and how many found none."""
    shares = functional.softmax(x @ router.weight.T, dim=-1)
    chosen = [row.argsort(descending=True)[: mixer.routing.top_k].tolist() for row in shares]
    factor, kept = mixer.routing.capacity_factor, [[] for _ in chosen]
    room = [10**9] * EXPERTS
    if factor is not None:
        room = [max(int(factor * mixer.routing.top_k * len(x) / EXPERTS), 1)] * EXPERTS
    dropped = 0
    for choice in range(mixer.routing.top_k):  # all first choices before second ones
        for token, experts in enumerate(chosen):
            expert = experts[choice]
            if room[expert] == 0:
                dropped += 1
                continue
            room[expert] -= 1
            kept[token].append((expert, shares[token, expert]))
    return kept, shares, dropped


def expert_output(mixer: RoutedMamba, name: str, expert: int, x: Tensor) -> Tensor:
    experts = mixer.get_submodule(f"{name}_experts")
    if mixer.inner.expert == "linear":
        return x @ experts.weight[expert]
    hidden = x @ experts.in_proj[expert]
    width = experts.out_proj.shape[1]
    if mixer.config.activation == "swiglu":
        hidden = functional.silu(hidden[:width]) * hidden[width:]
    else:
        hidden = {"relu": functional.relu, "gelu": functional.gelu}[mixer.config.activation](hidden)
    return hidden @ experts.out_proj[expert]


def reference(mixer: RoutedMamba, u: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, int]]]:
    """The mixer's output, and for each router the shares and the number of dropped choices."""
    inner, config = mixer.inner, mixer.config
    measured: dict[str, tuple[Tensor, int]] = {}
    shared = None
    if inner.router == "shared":
        shared, shares, dropped = decide(mixer, mixer.router, u)
        measured["router"] = shares, dropped

    def routed(name: str, x: Tensor, width: int) -> Tensor:
        kept = shared
        if kept is None:
            kept, shares, dropped = decide(mixer, mixer.get_submodule(f"{name}_router"), x)
            measured[f"{name}_router"] = shares, dropped
        rows = []
        for token, choices in enumerate(kept):
            row = torch.zeros(width, dtype=x.dtype)
            for expert, weight in choices:
                is_weighted = shared is None or name == "out"
                row = row + expert_output(mixer, name, expert, x[token]) * (weight if is_weighted else 1.0)
            rows.append(row)
        return torch.stack(rows)

    halves = {}
    plain = [name for name in ("conv", "gate") if name not in inner.projections]
    if plain:
        halves |= zip(plain, (u @ mixer.in_proj.weight.T).chunk(len(plain), -1), strict=True)
    for name in ("conv", "gate"):
        if name in inner.projections:
            halves[name] = routed(name, u, config.resolved_d_inner)
    x, z = (halves[name].view(BATCH, LENGTH, -1) for name in ("conv", "gate"))
    weight = mixer.conv1d.weight[:, None]
    padded = functional.pad(x.transpose(1, 2), (config.d_conv - 1, 0))
    x = functional.silu(functional.conv1d(padded, weight, mixer.conv1d.bias, groups=config.resolved_d_inner)).transpose(
        1, 2
    )
    sizes = (config.resolved_dt_rank, config.d_state, config.d_state)
    dt, b, c = (x @ mixer.x_proj.weight.T).split(sizes, dim=-1)
    y, _ = selective_scan(
        x, dt @ mixer.dt_proj.weight.T, -mixer.A_log.exp(), b, c, mixer.D, z, mixer.dt_proj.bias, backend="reference"
    )
    y = y.reshape(TOKENS, -1)
    return routed("out", y, D) if "out" in inner.projections else y @ mixer.out_proj.weight.T, measured


@pytest.mark.parametrize(
    ("case", "activation"), [*((case, "swiglu") for case in CASES), ("switch own", "relu"), ("switch shared", "gelu")]
)
def test_equals_a_loop(case: str, activation: str) -> None:
    mixer = build(CASES[case], activation)
    u = torch.randn(TOKENS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y, statistics, _ = mixer.train()(u, SEQUENCES)
    expected, measured = reference(mixer, u)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert statistics.keys() == measured.keys()
    for name, (shares, dropped) in measured.items():
        found: RouterStatistics = statistics[name]
        torch.testing.assert_close(found.probability, shares.sum(0))
        assert int(found.dropped) == dropped
        assert int(found.tokens) == TOKENS
        assert int(found.assigned.sum()) == TOKENS * mixer.routing.top_k
    weights = dict(mixer.named_parameters())
    ours = torch.autograd.grad(
        y.square().sum() + sum(one.probability.square().sum() for one in statistics.values()), [u, *weights.values()]
    )
    balanced = sum(shares.sum(0).square().sum() for shares, _ in measured.values())
    theirs = torch.autograd.grad(expected.square().sum() + balanced, [u, *weights.values()])
    for name, one, two in zip(["u", *weights], ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
        assert one.any(), f"{name} has no gradient"
    if CASES[case].get("capacity_factor"):
        assert sum(dropped for _, dropped in measured.values()) > 0, "nothing is dropped: take another seed"


def test_a_token_without_an_expert_gets_zero_and_is_counted() -> None:
    mixer = build({"projections": ["conv", "gate"], "capacity_factor": 0.01})
    u = torch.randn(TOKENS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    projected = mixer.train().project(u, SEQUENCES)
    for half, name in ((projected.x, "conv_router"), (projected.z, "gate_router")):
        used = int((projected.statistics[name].assigned > 0).sum())  # an expert has one place
        assert int(half.any(1).sum()) == used < TOKENS
        assert int(projected.statistics[name].dropped) == TOKENS - used


def test_in_evaluation_no_token_is_dropped() -> None:
    mixer = build({"projections": ALL, "capacity_factor": 0.01}).eval()
    _, statistics, _ = mixer(torch.randn(TOKENS, D, dtype=torch.float64), SEQUENCES)
    assert [int(one.dropped) for one in statistics.values()] == [0, 0, 0]


def test_what_is_not_set_is_inherited_and_the_router_of_layers_e_is_not() -> None:
    moe = MoEConfig(experts=6, d_expert=5, top_k=1, balance="bias", bias_rate=0.5, capacity_factor=2.0)
    routing = moe.inner_routing
    assert (routing.experts, routing.d_expert, routing.top_k, routing.balance) == (6, 5, 1, "bias")
    assert (routing.bias_rate, routing.capacity_factor, routing.router) == (0.5, None, "switch")
    inner = {"experts": 3, "d_expert": 7, "top_k": 2, "balance": "none", "capacity_factor": 1.5}
    inner |= {"projections": ["gate"], "expert": "switch"}
    routing = MoEConfig(experts=6, router="expert_choice", inner=inner, evaluation_capacity=0.1).inner_routing
    assert routing.evaluation_capacity is None
    assert (routing.experts, routing.d_expert, routing.top_k, routing.balance) == (3, 7, 2, "none")
    assert (routing.capacity_factor, routing.router) == (1.5, "top_k")


def test_every_second_mamba_layer() -> None:
    moe = MoEConfig(inner={"projections": ["gate"], "every": 2})
    assert [choose_mixer("M", moe, number) for number in (1, 2, 3, 4)] == [Mamba, RoutedMamba] * 2
    assert choose_mixer("E", moe, 2) is choose_mixer("E", MoEConfig(), 2)


@pytest.mark.parametrize("router", ["own", "shared"])
def test_one_sort_for_a_router_and_one_journey_in(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = build({"projections": ALL, "router": router})
    calls = {"plan": 0, "send": 0, "combine": 0, "combine_unweighted": 0}
    for name in calls:
        method = getattr(mixer.dispatcher, name)

        def counted(*arguments: Any, name: str = name, method: Any = method, **options: Any) -> Any:
            calls[name] += 1
            return method(*arguments, **options)

        monkeypatch.setattr(mixer.dispatcher, name, counted)
    mixer(torch.randn(TOKENS, D, dtype=torch.float64), SEQUENCES)
    own, shared = dict.fromkeys(calls, 3) | {"combine_unweighted": 0}, dict.fromkeys(calls, 1) | {"send": 2}
    assert calls == (shared if router == "shared" else own)
