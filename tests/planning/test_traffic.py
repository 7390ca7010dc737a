"""The plan's traffic against what gloo counts of the engine's own step."""

from collections import Counter
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from moe_mamba.config import Config
from moe_mamba.kernels.cross_entropy import linear
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology
from moe_mamba.parallel.topology import World as Ranks
from moe_mamba.planning import traffic
from moe_mamba.planning.load import Load
from moe_mamba.planning.traffic import FIGURES, members, traffic_of
from moe_mamba.train.objective import Objective
from moe_mamba.train.steps import REASONS
from tests.parallel.communication import Collective, counting
from tests.parallel.layouts import Layout, batch_of, build, config_of, share_of
from tests.world import World

Choices = dict[str, list[int]]
"""Of each router, the rows that this rank sent to each expert in the last micro-step."""


def step(config: Config, chunk: int = linear.CHUNK) -> tuple[list[Collective], Choices]:
    """In a worker: what the engine's third step moves, and where its routers sent tokens."""
    built, micro_batch = build(config), config.train.micro_batch
    built.model.recompute = config.train.recompute
    chosen: Choices = {}
    for name, router in built.model.routers().items():
        router.register_forward_hook(lambda _, __, output, name=name: chosen.update({name: output[0].counts.tolist()}))
    micro_steps = built.topology.sequences_per_data_rank(config.train.global_batch, micro_batch) // micro_batch
    engine = engines.build_engine(built.model, config, built.groups, micro_batch)
    for number in range(3):  # ZeRO-3 compares its trace of modules with other ranks' in the second
        objective = Objective(config.moe, 100, micro_steps, built.topology, built.model.balanced_routers())
        with mock.patch.object(linear, "CHUNK", chunk), counting() as found:
            for micro_step in range(micro_steps):
                mine = (share_of(value, built.topology, micro_step, micro_batch) for value in batch_of(number, config))
                tokens, targets, document_starts = mine
                output = engine(tokens, document_starts, targets=targets)
                engine.backward(objective(output.cross_entropy, output.statistics))
                if micro_step < micro_steps - 1:
                    engine.step()
            engines.step(engine, config.train.gradient_clip, torch.zeros(FIGURES, dtype=torch.float64))
    return found, chosen


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


def check(world: World, config: Config, layout: Layout, chunk: int = linear.CHUNK) -> None:
    """Bytes and calls of each collective over each group are the plan's, on every rank."""
    answers = world.run(step, config, chunk, ranks=layout.ranks)
    rows = tuple((name, tuple(tuple(chosen[name]) for _, chosen in answers)) for name in answers[0][1])
    share = config.train.global_batch // layout.data
    for rank, (found, _) in enumerate(answers):
        topology = Topology.of(config, Ranks(rank, layout.ranks, rank, layout.ranks))
        inner = "inner_expert" if config.moe.inner.projections else "expert"
        load = Recorded(recorded=(), rows=rows, group=members(topology, inner))
        with mock.patch.object(traffic, "CHUNK", chunk):
            flows = traffic_of(
                RunPlan.of(config, topology), config.train.micro_batch, share // config.train.micro_batch, load
            )
        planned, counted = Counter(), Counter()
        for flow in flows:
            group = members(topology, flow.group)
            assert flow.ranks == len(group)
            planned.update({(flow.kind, group, "bytes"): flow.bytes, (flow.kind, group, "calls"): flow.calls})
        for call in found:
            if len(call.group) > 1:
                counted.update({(call.kind, call.group, "bytes"): call.bytes, (call.kind, call.group, "calls"): 1})
        assert planned == counted, f"rank {rank}: {planned - counted} only planned, {counted - planned} only counted"


def test_the_trainer_adds_as_many_figures_to_the_norm() -> None:
    assert 2 + len(REASONS) == FIGURES


SHARED = {"moe__shared_experts": 1, "moe__capacity_factor": 1.0, "train__precision": "bf16"}
TOP_2 = {"moe__router": "top_k", "moe__top_k": 2, "train__precision": "bf16"}
BF16, CAPACITY = {"train__precision": "bf16"}, {"moe__capacity_factor": 1.25}
RECOMPUTED = {"train__recompute": True}
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
    "inner": ("M shared", Layout(4, 2, 4), 1, {}),
    "inner, recomputed": ("(ME)- switch", Layout(4, 2, 4), 1, {**CAPACITY, **RECOMPUTED, "model__d_inner": 22}),
    "inner, top 2": ("M own top-2", Layout(4, 1, 2, 2), 1, BF16),
    "offloaded": ("M-", Layout(4, 2, zero=2), 2, {"parallel__offload_optimizer": True}),
}


QUICK = ("dropless, ZeRO 2", "shared")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_what_a_step_sends(world: World, case: str) -> None:
    pattern, layout, accumulation, keys = CASES[case]
    check(world, config_of(pattern, layout, accumulation, **keys), layout)
