"""What mixers declare that a pass keeps and takes is what a tracker of all tensors sees of it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_mamba.config import Config
from moe_mamba.config_file import load_config
from moe_mamba.kernels import products
from moe_mamba.kernels.backends import BACKENDS
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.routing import Router
from moe_mamba.parallel.parallelize import cast_to_bf16
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology
from moe_mamba.parallel.topology import World as Ranks
from moe_mamba.planning.activations import activations_of
from moe_mamba.planning.load import Load
from moe_mamba.planning.memory import memory_of
from moe_mamba.train.objective import Objective
from tests.parallel.layouts import Layout, batch_of, build, config_of, share_of
from tests.planning.storages import Tracker
from tests.world import World

BATCH = 4
CLOSE = 0.1
Counts = tuple[int, int]
"""Bytes kept from the forward to the backward pass, and at most."""


def config_with(**keys: Any) -> Config:
    """Two layers with a small vocabulary, so that layers are what counts."""
    plain: dict[str, Any] = {
        "model__d_model": 256,
        "model__vocab_size": 64,
        "model__repeat": 2,
        "data__sequence_length": 512,
        "data__reset_at_document": False,
        "moe__experts": 8,
        "moe__capacity_factor": None,
        "train__global_batch": BATCH,
    }
    return load_config(None, {name.replace("__", "."): value for name, value in (plain | keys).items()})


def tracked(model: LanguageModel, config: Config, topology: Topology, batch: list[Tensor]) -> Counts:
    """One micro-step: what it makes counts. Gradients of weights are there from the one before."""
    tokens, targets, starts = batch
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Tracker() as tracker:
        tracker.ignore([*batch, *model.parameters(), *(parameter.grad for parameter in model.parameters())])
        output = model(tokens, starts if config.data.reset_at_document else None, targets=targets)
        objective = Objective(config.moe, 5, 1, topology, model.balanced_routers())
        loss = objective(output.cross_entropy, output.statistics)
        del output
        kept = tracker.live
        loss.backward()
    return kept, tracker.peak


def faked(config: Config) -> Counts:
    """A micro-step of a whole model, of fake tensors."""
    with FakeTensorMode():
        model = LanguageModel(config.model, config.moe, config.run.kernels)
        if config.train.precision == "bf16":
            cast_to_bf16(model)
        model.recompute = config.train.recompute
        tokens = torch.zeros(BATCH, config.data.sequence_length, dtype=torch.int64)
        batch = [tokens, torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)]
        return tracked(model, config, Topology(Ranks(0, 1, 0, 1)), batch)


def planned(config: Config, micro_batch: int, ranks: int = 1, device: str = "cpu") -> Counts:
    plan = RunPlan.of(config, Topology.of(config, Ranks(0, ranks, 0, ranks)))
    found = activations_of(plan, micro_batch, Load(), device, hidden=False)
    return found.kept, found.peak


INNER = {"moe__inner__projections": "conv,gate,out", "moe__inner__experts": 4}
TOP_2 = {"moe__router": "top_k", "moe__top_k": 2, "model__activation": "swiglu"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("M", {}),
    "Mamba with Jamba's norms": ("M", {"model__mamba_norms": True}),
    "Mamba without selection": ("M", {"model__selective": False, "model__d_inner": 341}),
    "attention": ("*", {}),
    "attention over a window, grouped heads": ("*", {"model__kv_heads": 2, "model__sliding_window": 128}),
    "attention without positions": ("*", {"model__positions": "none"}),
    "attention over documents": ("*", {"data__reset_at_document": True}),
    "relu": ("-", {"model__activation": "relu"}),
    "squared relu": ("-", {"model__activation": "squared_relu"}),
    "gelu": ("-", {"model__activation": "gelu"}),
    "swiglu": ("-", {"model__activation": "swiglu"}),
    "experts": ("E", {}),
    "experts, top-2, shared": ("E", TOP_2 | {"moe__shared_experts": 1}),
    "experts with a capacity": ("E", {"moe__capacity_factor": 1.25}),
    "experts that choose": ("E", {"moe__router": "expert_choice", "moe__capacity_factor": 1.0, "moe__balance": "none"}),
    "one router, linear experts": ("M", INNER | {"moe__inner__router": "shared", "moe__inner__expert": "linear"}),
    "one router, switch experts": ("M", INNER | {"moe__inner__router": "shared", "moe__inner__expert": "switch"}),
    "own routers, linear experts": ("M", INNER | {"moe__inner__router": "own", "moe__inner__expert": "linear"}),
    "own routers, switch experts": (
        "M",
        INNER | {"moe__inner__router": "own", "moe__inner__expert": "switch", "model__d_inner": 340},
    ),
    "two layers": ("ME", {}),
    "parallel layers": ("(ME)", {}),
    "all layers, layer norm, words": (
        "M*-E",
        {"model__norm": "layernorm", "model__repeat": 1, "model__vocab_size": 8192},
    ),
}


@pytest.fixture(autouse=True)
def torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices that multiply bf16: our C++ product reads addresses, and fake tensors have none."""
    monkeypatch.setattr(products, "read_processor", lambda: True)


COMBINATIONS = [("bf16", True), ("fp32", False)]
OTHERS = [("bf16", False), ("fp32", True)]


@pytest.mark.parametrize(("place", "name"), list(enumerate(MODELS)))
def test_what_is_kept_and_taken_is_declared(place: int, name: str) -> None:
    """One of the precisions each, with recomputation or without; the slow test has the other ways."""
    pattern, keys = MODELS[name]
    precision, recompute = COMBINATIONS[place % 2]
    check(config_with(model__pattern=pattern, train__precision=precision, train__recompute=recompute, **keys))


def check(config: Config, device: str = "cpu") -> None:
    assert planned(config, BATCH, device=device) == pytest.approx(faked(config), rel=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_with_recomputation_and_without_in_both_precisions(name: str) -> None:
    pattern, keys = MODELS[name]
    for precision, recompute in OTHERS:
        check(config_with(model__pattern=pattern, train__precision=precision, train__recompute=recompute, **keys))


@pytest.mark.parametrize("name", ["Mamba", "swiglu"])
def test_what_gpus_kernels_keep(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for backends in BACKENDS.values():
        if "triton" in backends:
            backends["triton"].load()  # before Triton would take them for its interpreter
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pattern, keys = MODELS[name]
    more = {"train__precision": "bf16", "run__kernels": "triton"}
    check(config_with(model__pattern=pattern, **keys, **more), "cuda")


def choose_evenly(router: Router, scores: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of ``Router._choose``: every expert gets as many tokens, as planning's even load has it."""
    tokens, experts = scores.shape
    chosen = (torch.arange(tokens)[:, None] * router.config.top_k + torch.arange(router.config.top_k)) % experts
    weight = scores.gather(1, chosen)
    return chosen, weight / weight.sum(-1, keepdim=True) if router.config.renormalize else weight


def in_a_layout(config: Config) -> Counts:
    """In a worker: a micro-step of this rank's part of a model."""
    built = build(config)
    usual, Router._choose = Router._choose, choose_evenly  # type: ignore[method-assign]
    try:
        batch = [share_of(one, built.topology, 0, config.train.micro_batch) for one in batch_of(0, config)]
        return tracked(built.model, config, built.topology, batch)
    finally:
        Router._choose = usual  # type: ignore[method-assign]


AGAIN: dict[str, Any] = {"train__recompute": True}
SHARED: dict[str, Any] = {"moe__shared_experts": 1}


@pytest.mark.parametrize(
    ("pattern", "layout", "keys"),
    [
        ("M*-E", Layout(2, 2, 2), SHARED),
        ("(ME)", Layout(4, 2, 2, expert_tensor=True), AGAIN),
        ("M switch", Layout(2, 2, 2), {"train__precision": "bf16"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("M", Layout(2, 2), {}),
                ("*-", Layout(2, 2), AGAIN | {"train__precision": "bf16"}),
                ("E", Layout(2, 1, 2), {"moe__capacity_factor": 1.0}),
                ("E", Layout(2, 2, 1), AGAIN),
                ("E", Layout(4, 2, 2, expert_tensor=True), SHARED),
                ("(ME)", Layout(4, 2, 2), {}),
                ("(ME)", Layout(4, 2, 2), AGAIN),
                ("(M*E)-", Layout(2, 2, 2), {"train__precision": "bf16"}),
                ("M own", Layout(2, 1, 2), {}),
                ("M shared", Layout(2, 1, 2), AGAIN),
                ("M shared top-2", Layout(2, 2, 1), {}),
                ("M switch", Layout(4, 2, 4), AGAIN),
            )
        ),
    ],
)
def test_in_layouts(world: World, pattern: str, layout: Layout, keys: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {
        "model__d_model": 128,
        "model__d_state": 16,
        "model__d_ff": 512,
        "model__repeat": 2,
        "model__vocab_size": 128,
        "moe__d_expert": 256,
        "data__sequence_length": 256,
        "data__reset_at_document": False,
        "train__global_batch": BATCH * layout.data,
        "train__micro_batch": BATCH,
    }
    config = config_of(pattern, layout, **sizes, **keys)
    expected = planned(config, BATCH, layout.ranks)
    for rank in world.run(in_a_layout, config, ranks=layout.ranks):
        assert expected == pytest.approx(rank, rel=CLOSE)


def test_a_skewed_load_takes_more() -> None:
    config = config_with(model__pattern="E", parallel__expert=4, train__global_batch=BATCH * 4)
    plan = RunPlan.of(config, Topology.of(config, Ranks(0, 4, 0, 4)))
    even, skewed = (memory_of(plan, BATCH, Load.parse(text)) for text in ("even", "skewed:1.5"))
    assert even.activations * 1.05 < skewed.activations < even.activations * 1.5
    assert (even.weights, even.optimizer) == (skewed.weights, skewed.optimizer)


def test_kernels_take_memory_that_no_tracker_sees() -> None:
    config = config_with(model__pattern="M", model__repeat=1)
    plan = RunPlan.of(config, Topology.of(config, Ranks(0, 1, 0, 1)))
    seen, all_of_it = (activations_of(plan, BATCH, Load(), "cuda", hidden).peak for hidden in (False, True))
    partial = BATCH * 512 * 2 * config.model.d_state * 4 * config.model.resolved_d_inner // 32  # gradients of B and C
    assert 0 < all_of_it - seen <= partial


def test_of_recorded_loads_each_layer_has_its_own() -> None:
    """Where another rank is full in each layer, none keeps what one that is full in both does."""
    config = config_of("EE", Layout(2, 1, 2), 2, data__sequence_length=512)
    experts = config.moe.experts
    full, empty = ((share,) * (experts // 2) for share in (1.8 / experts, 0.2 / experts))
    plan = RunPlan.of(config, Topology.of(config, Ranks(0, 2, 0, 2)))

    def kept(first: tuple[float, ...], second: tuple[float, ...]) -> int:
        load = Load("run:planted", recorded=(("0", first), ("1", second)))
        return activations_of(plan, 2, load, hidden=False).kept

    in_turns, in_both = kept(full + empty, empty + full), kept(full + empty, full + empty)
    assert in_turns == pytest.approx(activations_of(plan, 2, Load(), hidden=False).kept, rel=0.001)
    assert in_both == kept(empty + full, empty + full) > 1.2 * in_turns
