"""The plan's traffic against what gloo counts: of passes without an engine, and of the engine's own step."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from moe_mamba.config import Config
from moe_mamba.kernels.cross_entropy import linear
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.grouping import optimizer_groups
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology
from moe_mamba.parallel.topology import World as Ranks
from moe_mamba.planning import traffic
from moe_mamba.planning.load import Load
from moe_mamba.planning.traffic import FIGURES, Flow, members, sharing, traffic_of
from moe_mamba.train.objective import Objective
from moe_mamba.train.steps import REASONS
from tests.parallel.communication import Collective, counting
from tests.parallel.layouts import GLOBAL_BATCH, LENGTH, Layout, batch_of, build, config_of, share_of
from tests.world import World

Choices = dict[str, list[int]]
"""Of each router, the rows that this rank sent to each expert in the last micro-step."""
Counts = Counter[tuple[str, tuple[int, ...], str]]
"""Bytes and calls of each collective over each group."""
OF_ENGINE = ("gradients", "replicas", "weights", "norm")  # parts of what is sent between passes, and beside them


def choices_of(model: LanguageModel) -> Choices:
    """Filled by the passes to come."""
    chosen: Choices = {}
    for name, router in model.routers().items():
        router.register_forward_hook(lambda _, __, output, name=name: chosen.update({name: output[0].counts.tolist()}))
    return chosen


def micro_step(config: Config) -> tuple[list[Collective], Choices]:
    """In a worker: what a forward and a backward pass move without an engine, and where routers sent tokens."""
    built = build(config)
    chosen = choices_of(built.model)
    values = [share_of(values, built.topology, 0, config.train.micro_batch) for values in batch_of(0, config)]
    objective = Objective(config.moe, 100, 1, built.topology, built.model.balanced_routers())
    with counting() as found:
        output = built.model.train()(values[0], values[2], targets=values[1])
        objective(output.cross_entropy, output.statistics).backward()
    return found, chosen


def step(config: Config) -> tuple[list[Collective], Choices, list[Collective]]:
    """In a worker: what the engine's step moves, where routers sent tokens, and what starting the engine moves."""
    built, micro_batch = build(config), config.train.micro_batch
    chosen = choices_of(built.model)
    micro_steps = built.topology.sequences_per_data_rank(config.train.global_batch, micro_batch) // micro_batch
    with counting() as start:
        engine = engines.build_engine(built.model, config, built.groups, micro_batch)
    # ZeRO-3 records the order of modules in its first step, and compares it with other ranks' in the second.
    for number in range(3 if config.parallel.zero == 3 else 1):
        objective = Objective(config.moe, 100, micro_steps, built.topology, built.model.balanced_routers())
        with counting() as found:
            for micro_step in range(micro_steps):
                mine = (share_of(value, built.topology, micro_step, micro_batch) for value in batch_of(number, config))
                tokens, targets, document_starts = mine
                output = engine(tokens, document_starts, targets=targets)
                engine.backward(objective(output.cross_entropy, output.statistics))
                if micro_step < micro_steps - 1:
                    engine.step()
            engines.step(engine, config.train.gradient_clip, torch.zeros(FIGURES, dtype=torch.float64))
    return found, chosen, start


@dataclass(frozen=True)
class Recorded(Load):
    """The rows that were sent: router -> a row of each rank of the world."""

    rows: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = ()
    group: tuple[int, ...] = ()

    def matrix(self, ranks: int, experts: int, rows_per_rank: int, router: str | None = None) -> list[list[int]]:
        rows = dict(self.rows)[router]
        found = [list(rows[rank]) for rank in self.group]
        assert (len(found), len(found[0]), {sum(row) for row in found}) == (ranks, experts, {rows_per_rank})
        return found


def counted(calls: Iterable[Collective]) -> Counts:
    """Of groups of several ranks."""
    found: Counts = Counter()
    for call in calls:
        if len(call.group) > 1:
            found.update({(call.kind, call.group, "bytes"): call.bytes, (call.kind, call.group, "calls"): 1})
    return found


def planned(flows: Iterable[Flow], topology: Topology) -> Counts:
    """The same of the plan."""
    found: Counts = Counter()
    for flow in flows:
        group = members(topology, flow.group)
        assert flow.ranks == len(group)
        found.update({(flow.kind, group, "bytes"): flow.bytes, (flow.kind, group, "calls"): flow.calls})
    return found


def check(world: World, function: Callable[..., Any], config: Config, ranks: int, *arguments: Any) -> list[Any]:
    """Bytes and calls of each collective over each group are the plan's on every rank; the ranks' answers."""
    answers = world.run(function, config, *arguments, ranks=ranks)
    rows = tuple((name, tuple(tuple(answer[1][name]) for answer in answers)) for name in answers[0][1])
    for rank, answer in enumerate(answers):
        topology = Topology.of(config, Ranks(rank, ranks, rank, ranks))
        inner = "inner_expert" if config.moe.inner.projections else "expert"
        load = Recorded(recorded=(), rows=rows, group=members(topology, inner))
        accumulation = config.train.global_batch // topology.data // config.train.micro_batch
        flows = traffic_of(RunPlan.of(config, topology), config.train.micro_batch, accumulation, load)
        if function is not step:
            flows = [flow for flow in flows if flow.part not in OF_ENGINE]
        wanted, found = planned(flows, topology), counted(answer[0])
        assert wanted == found, f"rank {rank}: {wanted - found} only planned, {found - wanted} only counted"
    return answers


def test_the_trainer_adds_as_many_figures_to_the_norm() -> None:
    assert 2 + len(REASONS) == FIGURES


SHARED = {"moe__shared_experts": 1, "moe__capacity_factor": 1.0, "train__precision": "bf16"}
TOP_2 = {"moe__router": "top_k", "moe__top_k": 2, "train__precision": "bf16"}
BF16, CAPACITY = {"train__precision": "bf16"}, {"moe__capacity_factor": 1.25}
RECOMPUTED = {"train__recompute": True}
BY_WIDTH = Layout(4, 2, 2, expert_tensor=True)


@pytest.mark.parametrize(
    ("pattern", "layout", "keys"),
    [
        *(
            (pattern, Layout(tensor, tensor), keys)
            for pattern in ("M", "*", "-", "(M*-)")
            for tensor, keys in [(2, {}), (4, BF16)]
        ),
        ("*", Layout(4, 4), {"model__kv_heads": 4}),  # one for each rank: no replicas
        ("ME", Layout(2), {}),  # data parallelism says nothing but the statistics
        *(
            ("E", layout, keys)
            for layout in (Layout(2, 1, 2), Layout(4, 2, 2), BY_WIDTH)
            for keys in ({}, TOP_2, CAPACITY, SHARED)
        ),
        ("(ME)", BY_WIDTH, CAPACITY),
        ("(ME)", BY_WIDTH, SHARED),
        ("MEM-*E", Layout(4, 2, 2), {"moe__capacity_factor": 1.0, "moe__balance": "bias"}),
        *(
            pytest.param("E", layout, keys, marks=pytest.mark.slow)
            for layout in (
                Layout(4, 1, 4),
                Layout(2, 2, 2),
                Layout(4, 2, 4),
                Layout(4, 4, 2),
                Layout(2, 2, expert_tensor=True),
            )
            for keys in ({}, SHARED)
        ),
    ],
    ids=str,
)
def test_what_passes_send(world: World, pattern: str, layout: Layout, keys: dict[str, Any]) -> None:
    check(world, micro_step, config_of(pattern, layout, **keys), layout.ranks)


def in_chunks(config: Config, chunk: int) -> tuple[list[Collective], Choices]:
    """In a worker: as ``micro_step``, with a head of smaller chunks."""
    with mock.patch.object(linear, "CHUNK", chunk):
        return micro_step(config)


def test_chunks_of_the_head_send_the_same_bytes_in_more_calls(world: World) -> None:
    chunk = 50_000  # of 192 tokens x 256 words, padding included, x 4 bytes: a quarter
    config = config_of("-", Layout(2, 2))
    with mock.patch.object(traffic, "CHUNK", chunk):
        answers = check(world, in_chunks, config, 2, chunk)
    for found, _ in answers:
        assert Counter(call.bytes for call in found if call.kind == "all-reduce") == {
            size * GLOBAL_BATCH * LENGTH // 4 * 4: 4 for size in (1, 2)
        }


CASES = {
    "one kind": ("M", Layout(2, 2), 1, {}),
    "attention and feed-forward": ("*-", Layout(4, 4, zero=2), 3, {"train__precision": "bf16"}),
    "read together": ("(M*-)", Layout(4, 2, zero=0), 1, {}),
    "dropless": ("ME", Layout(4, 2, 2, 1), 1, {}),
    "dropless, ZeRO 2": ("(ME)", Layout(4, 1, 4, 2), 1, TOP_2),
    "capacity": ("MEM-*E", Layout(4, 2, 2, 2), 2, {"moe__capacity_factor": 1.25}),
    "shared": ("(ME)", Layout(4, 2, 2, 1, expert_tensor=True), 1, SHARED),
    "shared, recomputed": ("ME(M-E)", Layout(4, 2, 2, 0), 1, {**SHARED, "train__precision": "fp32", **RECOMPUTED}),
    "dropless, recomputed": ("ME*(ME)-", Layout(4, 2, 4, 1), 1, {**TOP_2, **RECOMPUTED}),
    "by width, recomputed": ("ME(ME)", Layout(4, 2, 2, 1, True), 1, {**SHARED, **RECOMPUTED}),
    "expert choice": ("ME", Layout(4, 2, 2), 1, {"moe__router": "expert_choice", "moe__capacity_factor": 1.0}),
    "ZeRO 3": ("M-", Layout(4, 2, zero=3), 1, {"model__d_model": 128}),
    "ZeRO 3 in bf16": (
        "*M-",
        Layout(2, zero=3),
        2,
        {"model__d_model": 256, "model__d_state": 32, **BF16, **RECOMPUTED},
    ),
    "ZeRO 3, replicas": ("*-**", Layout(4, 4, zero=3), 3, BF16),
    "inner": ("M shared", Layout(4, 2, 4), 1, {}),
    "inner, recomputed": ("(ME)- switch", Layout(4, 2, 4), 1, {**CAPACITY, **RECOMPUTED, "model__d_inner": 22}),
    "inner, top 2": ("M own top-2", Layout(4, 1, 2, 2), 1, BF16),
    "offloaded": ("M-", Layout(4, 2, zero=2), 2, {"parallel__offload_optimizer": True}),
}


QUICK = ("attention and feed-forward", "read together", "dropless, ZeRO 2", "shared", "ZeRO 3")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_what_a_step_sends(world: World, case: str) -> None:
    pattern, layout, accumulation, keys = CASES[case]
    config = config_of(pattern, layout, accumulation, **keys)
    answers = check(world, step, config, layout.ranks)
    if layout.zero < 3:
        check_start([answer[2] for answer in answers], config)


def check_start(ranks: list[list[Collective]], config: Config) -> None:
    """DeepSpeed sends every parameter once, though all ranks have made the same numbers."""
    for rank, found in enumerate(ranks):
        plan = RunPlan.of(config, Topology.of(config, Ranks(rank, len(ranks), rank, len(ranks))))
        expected: Counts = Counter()
        for group in optimizer_groups(plan):
            to = members(plan.topology, sharing(group))
            if len(to) > 1:
                size = group.size * (4 if group.is_fp32 else 2)
                expected.update({("broadcast", to, "bytes"): size, ("broadcast", to, "calls"): len(group.names)})
        assert counted(found) == expected
