"""One function on any layout: outputs, gradients, losses and weights are those of one process."""

import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_mamba.config import Config
from moe_mamba.kernels.cross_entropy import linear
from moe_mamba.train.objective import Objective
from tests import ROOT
from tests.parallel.layouts import (
    GLOBAL_BATCH,
    LENGTH,
    MARGIN_FLOAT64,
    VOCABULARY,
    Chunks,
    Layout,
    assemble,
    batch_of,
    build,
    chunks_of,
    config_of,
    difference,
    legal_layouts,
    mean_over_data_ranks,
    routing_margins,
    share_of,
    sum_replicas,
    train,
    train_far_from_ties,
)
from tests.world import World

MEASUREMENTS = ROOT / "docs" / "measurements" / "parity.json"
STEPS = 20
PATTERNS = ("ME", "*E", "M-", "*-", "MEM-*E", "(ME)", "(*E)-", "M own", "ME shared")
# One holds every kind of layer; the others, by themselves, are slow.
ALL = "MEM-*E"
ALL_AND_EACH = [pattern if pattern == ALL else pytest.param(pattern, marks=pytest.mark.slow) for pattern in PATTERNS]
# What imported models of attention have beside the plain ones' layers.
IMPORTED: dict[str, Any] = {
    "model__head_dim": 6,
    "model__sliding_window": 3,
    "model__attention_bias": True,
    "model__mlp_bias": True,
    "model__rope_type": "llama3",
    "model__rope_factor": 4.0,
    "model__rope_original_length": 32,
}


def forward_and_backward(config: Config) -> tuple[Chunks, Chunks]:
    """In a worker: logits and gradients of one global batch in float64, without an engine."""
    built = build(config)
    model = built.model.double().train()
    tokens, targets, document_starts = batch_of(0, config)
    micro_batch = config.train.micro_batch
    micro_steps = GLOBAL_BATCH // (micro_batch * built.topology.data)
    counted = int((targets != -100).sum())
    balanced = model.balanced_routers()
    objective = Objective(config.moe, counted, micro_steps, built.topology, balanced)
    outputs: Chunks = []
    with routing_margins(model) as margins:
        for number in range(micro_steps):
            mine = [
                share_of(values, built.topology, number, micro_batch) for values in (tokens, targets, document_starts)
            ]
            with torch.no_grad():
                logits = model(mine[0], mine[2]).logits
            outputs.append(logits_chunk(logits, built.topology, number))
            output = model(mine[0], mine[2], targets=mine[1])
            (objective(output.cross_entropy, output.statistics) / micro_steps).backward()
    assert min(margins, default=1.0) >= MARGIN_FLOAT64, "a routing decision lies near a tie: take another seed"
    sum_replicas(model)
    gradients = {name: mean_over_data_ranks(built, parameter) for name, parameter in model.named_parameters()}
    return outputs, chunks_of(gradients, built.held)


def logits_chunk(logits: Tensor, topology: Any, number: int) -> Any:
    """A rank's logits as a chunk of those of the global batch."""
    first = (number * topology.data + topology.data_rank) * len(logits)
    rows = logits.shape[-1]
    column = topology.tensor_rank * rows if topology.tensor > 1 else 0
    real = max(0, min(rows, VOCABULARY - column))
    assert logits[..., real:].isneginf().all()
    return "logits", (GLOBAL_BATCH, LENGTH, VOCABULARY), (first, 0, column), logits[..., :real].detach()


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == expected.keys()
    return max((difference(found[name], expected[name]), name) for name in expected)


def float64_error(world: World, pattern: str, layouts: Iterable[Layout], **keys: Any) -> dict[Layout, tuple]:
    """Worst error of outputs and gradients of each layout against one process."""
    expected: dict[int, Any] = {}
    errors = {}
    accumulation = keys.pop("accumulation", 1)
    for layout in layouts:
        if accumulation not in expected:
            single = config_of(pattern, Layout(1), accumulation, **keys)
            expected[accumulation] = [
                assemble([chunks]) for chunks in world.run(forward_and_backward, single, ranks=1)[0]
            ]
        config = config_of(pattern, layout, accumulation, **keys)
        ranks = world.run(forward_and_backward, config, ranks=layout.ranks)
        found = [assemble([rank[part] for rank in ranks]) for part in (0, 1)]
        errors[layout] = max(worst(mine, theirs) for mine, theirs in zip(found, expected[accumulation], strict=True))
    return errors


def engine_error(world: World, pattern: str, layouts: Iterable[Layout], **keys: Any) -> dict[Layout, "Errors"]:
    """Worst errors of 20 steps under the engine on each layout, against one process with the same micro-steps."""
    accumulation = keys.pop("accumulation", 1)
    keys = {"train__learning_rate": 1e-3} | keys
    keys["run__seed"], (single,) = train_far_from_ties(world, pattern, Layout(1), STEPS, accumulation, **keys)
    assert max(single.norms) > config_of(pattern, Layout(1), **keys).train.gradient_clip > 0, "clipping is at work"
    weights, gradients = assemble([single.weights]), assemble([single.gradients])
    errors = {}
    for layout in layouts:
        config = config_of(pattern, layout, accumulation, **keys)
        ranks = world.run(train, config, STEPS, ranks=layout.ranks, timeout=300)
        errors[layout] = Errors(
            loss=max(
                abs(mine / its - 1) for rank in ranks for mine, its in zip(rank.losses, single.losses, strict=True)
            ),
            norm=max(abs(mine / its - 1) for rank in ranks for mine, its in zip(rank.norms, single.norms, strict=True)),
            gradient=worst(assemble([rank.gradients for rank in ranks]), gradients)[0],
            weight=worst(assemble([rank.weights for rank in ranks]), weights)[0],
        )
    return errors


@dataclass(frozen=True)
class Errors:
    """Of losses and norms of the gradient over all steps, gradients of the first step, weights after the last one."""

    loss: float
    norm: float
    gradient: float
    weight: float

    def check(self, cell: object) -> None:
        assert self.loss <= 1e-5, f"{cell}: {self}"
        assert self.norm <= 5e-5, f"{cell}: {self}"  # those of later steps follow the weights
        assert self.gradient <= 1e-5, f"{cell}: {self}"
        assert self.weight <= 1e-4, f"{cell}: {self}"


def test_outputs_and_gradients_without_selection(world: World) -> None:
    """Each tensor-parallel rank's channels use the same constants: their gradient is the sum over the ranks."""
    keys = {"model__selective": False, "model__d_inner": 22}
    for layout, (error, name) in float64_error(world, "M-", [Layout(2, 2)], **keys).items():
        assert error <= 1e-10, f"{layout}: {name}"


@pytest.mark.parametrize(
    ("pattern", "layout", "keys"),
    [
        ("(ME)(*E)-", Layout(4, 2, 4), {}),
        ("(ME)(M*-)", Layout(4, 2, 2, expert_tensor=True), {"moe__shared_experts": 1, **IMPORTED}),
        pytest.param("(*E)-(M-)", Layout(4, 4, 2), {"moe__shared_experts": 1, **IMPORTED}, marks=pytest.mark.slow),
        pytest.param("(EE)", Layout(4, 2, 2), {"train__recompute": True}, marks=pytest.mark.slow),
        pytest.param("(ME)", Layout(4, 1, 4), {"moe__router": "top_k", "moe__top_k": 2}, marks=pytest.mark.slow),
        pytest.param("(*E)-", Layout(4, 2, 4), {"moe__router": "top_k", "moe__top_k": 2}, marks=pytest.mark.slow),
    ],
)
def test_parallel_layers_in_float64(world: World, pattern: str, layout: Layout, keys: dict[str, Any]) -> None:
    for cell, (error, name) in float64_error(world, pattern, [layout], **keys).items():
        assert error <= 1e-10, f"{cell}: {name}"


@pytest.mark.parametrize(
    ("pattern", "layout", "keys"),
    [
        ("M own", Layout(4, 1, 2), {}),
        ("M own top-2", Layout(4, 2, 1), {}),
        ("ME shared", Layout(4, 2, 4), {"moe__shared_experts": 1}),
        ("M switch", Layout(4, 2, 4), {"moe__balance": "bias", "model__d_inner": 22}),
        pytest.param("ME shared top-2", Layout(4, 1, 4), {"accumulation": 2}, marks=pytest.mark.slow),
        pytest.param("(ME) shared top-2", Layout(4, 2, 2, expert_tensor=True), {}, marks=pytest.mark.slow),
        pytest.param("MM switch", Layout(4, 4, 1), {"train__recompute": True}, marks=pytest.mark.slow),
    ],
)
def test_experts_inside_mamba_in_float64(world: World, pattern: str, layout: Layout, keys: dict[str, Any]) -> None:
    for cell, (error, name) in float64_error(world, pattern, [layout], **keys).items():
        assert error <= 1e-10, f"{cell}: {name}"


@pytest.mark.parametrize("pattern", ALL_AND_EACH)
def test_outputs_and_gradients_in_float64(world: World, pattern: str) -> None:
    layouts = [Layout(2, 2), Layout(4, 4)]
    if "E" in pattern or " " in pattern:
        layouts = [Layout(2, 2, 2), Layout(4, 2, 4), Layout(4, 4, 1)]
    for layout, (error, name) in float64_error(world, pattern, layouts).items():
        assert error <= 1e-10, f"{layout}: {name}"


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        (Layout(4, 2, 2), {"moe__router": "top_k", "moe__top_k": 2, "moe__shared_experts": 1, "accumulation": 2}),
        (Layout(4, 2, 4), {"moe__scores": "sigmoid", "moe__balance": "bias", "model__tied_head": True}),
        (Layout(4, 2, 2), {"moe__router": "expert_choice", "moe__capacity_factor": 1.0, "moe__balance": "none"}),
        (Layout(4, 2, 2, expert_tensor=True), {"moe__top_k": 2, "moe__router": "top_k", "moe__shared_experts": 2}),
        pytest.param(
            Layout(4, 4, 1, expert_tensor=True),
            {"model__activation": "relu", "model__norm": "layernorm"},
            marks=pytest.mark.slow,
        ),
        (Layout(4, 4, 2), {"model__kv_heads": 1, "model__mamba_norms": False, "train__recompute": True}),
        pytest.param(Layout(4, 4, 2), {"moe__shared_experts": 1, **IMPORTED}, marks=pytest.mark.slow),
        pytest.param(
            Layout(4, 2, 2), {"model__kv_heads": 1, "model__activation": "gelu", **IMPORTED}, marks=pytest.mark.slow
        ),
    ],
    ids=[
        *(
            "top-2, shared, accumulation",
            "sigmoid, bias, tied",
            "expert choice",
            "experts sharded",
            "experts sharded 4",
        ),
        *("MQA", "imported", "imported, MQA"),
    ],
)
def test_every_router_and_option_in_float64(world: World, layout: Layout, keys: dict[str, Any]) -> None:
    for cell, (error, name) in float64_error(world, "MEM-*E", [layout], **keys).items():
        assert error <= 1e-10, f"{cell}: {name}"


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        (Layout(4, 4), {}),
        pytest.param(Layout(4, 2), {"model__tied_head": True, "accumulation": 2}, marks=pytest.mark.slow),
    ],
)
def test_chunks_of_the_head_in_float64(world: World, layout: Layout, keys: dict[str, Any]) -> None:
    """One process in one chunk, against tensor-parallel ranks in many."""
    accumulation = keys.pop("accumulation", 1)
    single, config = (config_of("-", one, accumulation, **keys) for one in (Layout(1), layout))
    expected = world.run(forward_and_backward, single, ranks=1)
    ranks = world.run(forward_and_backward_in_chunks, config, ranks=layout.ranks)
    for part in (0, 1):
        error, name = worst(*(assemble([rank[part] for rank in each]) for each in (ranks, expected)))
        assert error <= 1e-10, name


def forward_and_backward_in_chunks(config: Config) -> tuple[Chunks, Chunks]:
    """In a worker: with chunks of a few tokens, of which the number of tokens is no multiple."""
    with mock.patch.object(linear, "CHUNK", 5000):
        return forward_and_backward(config)


def test_balance_over_devices_sees_each_devices_own_tokens(world: World) -> None:
    """Two tensor-parallel ranks hold the tokens of two data ranks: by device, that is another loss than by all."""
    keys = {"moe__balance_over": "device", "moe__balance_weight": 1.0}
    gradients = [
        assemble([rank[1] for rank in world.run(forward_and_backward, config_of("ME", layout, **keys), ranks=2)])
        for layout in (Layout(2, 2, 2), Layout(2, 1, 1))
    ]
    assert worst(*gradients)[0] <= 1e-10
    (single,) = world.run(forward_and_backward, config_of("ME", Layout(1), **keys), ranks=1)
    assert worst(gradients[0], assemble([single[1]]))[0] > 1e-6


def test_what_the_test_compares_would_see_an_unreduced_x_proj(world: World) -> None:
    errors = world.run(gradients_without_the_sum_over_peers, config_of("M-", Layout(2, 2)), ranks=2)
    expected = world.run(forward_and_backward, config_of("M-", Layout(1)), ranks=1)
    assert worst(assemble([rank[1] for rank in errors]), assemble([expected[0][1]]))[0] > 1e-3


def gradients_without_the_sum_over_peers(config: Config) -> tuple[Chunks, Chunks]:
    """The known fault of others: each rank keeps its own gradient of what x_proj gave."""
    from moe_mamba.parallel import tensor

    with mock.patch.object(tensor, "share_with_ranks", lambda x, group: x):
        return forward_and_backward(config)


@pytest.mark.parametrize(
    ("pattern", "layouts"),
    [
        ("ME", [Layout(4, 2, 2, zero=2)]),
        pytest.param("M-", [Layout(2, 2, zero=1)], marks=pytest.mark.slow),
        pytest.param("MEM-*E", [Layout(4, 2, 2, zero=1, expert_tensor=True)], marks=pytest.mark.slow),
        pytest.param("ME", [Layout(8, 2, 4, zero=1)], marks=pytest.mark.slow),
        pytest.param("*E", [Layout(4, 4, 4, zero=0)], marks=pytest.mark.slow),
        pytest.param("M-", [Layout(3, zero=2)], marks=pytest.mark.slow),
        pytest.param("MEM-*E", [Layout(4, 1, 4, zero=0)], marks=pytest.mark.slow),
        pytest.param("(ME)(*E)-", [Layout(4, 2, 2, zero=2)], marks=pytest.mark.slow),
        ("ME shared", [Layout(4, 2, 4, zero=2)]),
        pytest.param("M own", [Layout(4, 1, 2, zero=1), Layout(4, 2, 4, zero=0)], marks=pytest.mark.slow),
        pytest.param("M shared", [Layout(4, 2, 2, zero=1, expert_tensor=True)], marks=pytest.mark.slow),
    ],
)
def test_training_under_the_engine(world: World, pattern: str, layouts: list[Layout]) -> None:
    for layout, errors in engine_error(world, pattern, layouts, accumulation=1 + (pattern == "M-")).items():
        errors.check(layout)


@pytest.mark.slow
def test_training_with_biases_and_a_window(world: World) -> None:
    for layout, errors in engine_error(world, "*-", [Layout(4, 2, zero=2)], **IMPORTED).items():
        errors.check(layout)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["ME", "(ME)M shared"])
def test_training_in_bf16_is_near_one_process(world: World, pattern: str) -> None:
    """Rounding decides some routings here, so the bound is that of bf16."""
    keys = {"train__precision": "bf16", "train__recompute": True}
    (single,) = world.run(train, config_of(pattern, Layout(1), **keys), STEPS, ranks=1)
    layout = Layout(4, 2, 4)
    for rank in world.run(train, config_of(pattern, layout, **keys), STEPS, ranks=layout.ranks):
        assert rank.losses == pytest.approx(single.losses, rel=1e-2)
        assert rank.norms == pytest.approx(single.norms, rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_whole_matrix(world: World, pattern: str) -> None:
    layouts = legal_layouts(pattern)
    float64 = float64_error(world, pattern, [layout for layout in layouts if layout.zero == 0])
    engine = engine_error(world, pattern, layouts)
    cells = {
        str(layout): {"float64": float64[replace(layout, zero=0)][0], **asdict(errors)}
        for layout, errors in engine.items()
    }
    keep(pattern, cells)
    for layout, (error, name) in float64.items():
        assert error <= 1e-10, f"{layout}: {name}"
    for layout, errors in engine.items():
        errors.check(layout)


def keep(pattern: str, cells: dict[str, dict[str, float]]) -> None:
    """Keep the matrix's worst errors, with date and versions, among the measurements."""
    known = json.loads(MEASUREMENTS.read_text()) if MEASUREMENTS.exists() else {}
    about = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
        "bounds": {"float64": 1e-10, "loss": 1e-5, "norm": 5e-5, "gradient": 1e-5, "weight": 1e-4},
    }
    patterns = known.get("patterns", {}) | {pattern: cells}
    rows = {
        name: {cell: {k: float(f"{v:.2g}") for k, v in errors.items()} for cell, errors in found.items()}
        for name, found in patterns.items()
    }
    MEASUREMENTS.write_text(json.dumps(about | {"patterns": rows}, indent=1) + "\n")
