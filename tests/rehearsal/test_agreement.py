"""Rehearsal, plan and torch's own tracker count the same bytes, each by itself."""

from collections import Counter
from typing import Any

import pytest
from torch.distributed._tools.mem_tracker import MemTracker

from moe_mamba.config import Config
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.activations import activations_of
from moe_mamba.planning.load import Load
from moe_mamba.planning.state import state_of
from moe_mamba.planning.traffic import members, traffic_of
from moe_mamba.rehearsal import step
from moe_mamba.rehearsal.device import TYPE
from tests.parallel.layouts import Layout, config_of
from tests.rehearsal.process import Rehearsals

# Wide enough that a matrix is more than what is kept beside it, and two chunks of the head.
WIDE: dict[str, Any] = {
    "model__d_model": 256,
    "model__d_state": 16,
    "model__d_ff": 1024,
    "moe__d_expert": 512,
    "model__vocab_size": 8192,
    "data__sequence_length": 256,
}


def tracked(config: Config) -> tuple[int, int]:
    """In the process: the peak of a step on one device by torch's tracker, and by the rehearsal of the same step."""
    tracker, steps, found = MemTracker(), step._steps, []

    def under_the_tracker(engine: Any, *others: Any) -> int:
        state = [value for one in engine.optimizer.state.values() for value in one.values()]
        tracker.track_external(engine.module, *state)
        with tracker:
            before = steps(engine, *others)
        (found_here,) = [
            kinds["Total"] for on, kinds in tracker.get_tracker_snapshot("peak").items() if on.type == TYPE
        ]
        found.append(found_here)
        return before

    step._steps = under_the_tracker
    try:
        report = step.rehearse(config, 1, 0)
    finally:
        step._steps = steps
    return found[0], report.memory.total


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("MEM-*E", {}),
        pytest.param("MEM-*E", {"train__recompute": True}, marks=pytest.mark.slow),
        pytest.param("(M*)(ME)", {"data__reset_at_document": True}, marks=pytest.mark.slow),
        pytest.param("M shared", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_torch_tracks_the_same_peak(rehearsals: Rehearsals, pattern: str, keys: dict[str, Any]) -> None:
    by_torch, by_us = rehearsals.run(tracked, config_of(pattern, Layout(1, zero=0), **WIDE, **keys))
    assert by_us == pytest.approx(by_torch, rel=0.01)


@pytest.mark.parametrize(
    ("pattern", "layout", "keys"),
    [
        ("MEM-*E", Layout(4, 2, 2, zero=1), {}),
        pytest.param("MEM-*E", Layout(4, 2, 2, zero=1), {"train__recompute": True}, marks=pytest.mark.slow),
        pytest.param("ME", Layout(8, 2, 4, zero=2), {}, marks=pytest.mark.slow),
        # Experts' products read their rows, and no mixer is a loop over time.
        pytest.param("M-", Layout(1), {"model__selective": False}, marks=pytest.mark.slow),
        pytest.param("*E", Layout(4, 2, 2, zero=1, expert_tensor=True), {}, marks=pytest.mark.slow),
        pytest.param("M own", Layout(4, 1, 2, zero=1), {}, marks=pytest.mark.slow),
        pytest.param("(ME)(*E)-", Layout(4, 2, 4, zero=2), {}, marks=pytest.mark.slow),
        pytest.param("M-", Layout(4, 2, zero=0), {"train__precision": "fp32"}, marks=pytest.mark.slow),
        pytest.param("M-", Layout(4, 2, zero=2), {"train__precision": "fp32"}, marks=pytest.mark.slow),
        pytest.param("M-", Layout(4, zero=1), {"parallel__offload_optimizer": True}, marks=pytest.mark.slow),
        pytest.param("M*-", Layout(4, zero=3), {}, marks=pytest.mark.slow),
        pytest.param("M-", Layout(4, 2, zero=3), {}, marks=pytest.mark.slow),
        pytest.param("M-", Layout(2, 2, zero=3), {}, marks=pytest.mark.slow),
        pytest.param("M-", Layout(1, zero=0), {"train__precision": "fp32"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_plan_says_the_same(rehearsals: Rehearsals, pattern: str, layout: Layout, keys: dict[str, Any]) -> None:
    """Weights, gradients and optimizer within 2 %, activations and buffers within 10 %, collectives to the byte."""
    config = config_of(pattern, layout, 2, **{"train__precision": "bf16", **WIDE, **keys})
    report = rehearsals.run(step.rehearse, config, layout.ranks, 0)
    plan = RunPlan.of(config, Topology.of(config, World(0, layout.ranks, 0, layout.ranks)))
    micro_batch, memory = config.train.micro_batch, report.memory
    state, activations = state_of(plan, "cuda"), activations_of(plan, micro_batch, Load(), "cuda", hidden=False)
    assert memory.kept["weights"] == pytest.approx(state.weights, rel=0.02)
    assert memory.passes["gradients"] == pytest.approx(state.gradients, rel=0.02)
    assert memory.kept["optimizer"] == pytest.approx(state.optimizer, rel=0.02)
    assert memory.largest["activations"] == pytest.approx(activations.peak, rel=0.1)
    # Without ZeRO, what reduces gradients comes behind the backward pass: the plan's update.
    buffers = state.buckets if layout.zero else state.update
    assert memory.largest["communication"] == pytest.approx(buffers, rel=0.1)
    planned: Counter[tuple[str, tuple[int, ...]]] = Counter()
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for flow in traffic_of(plan, micro_batch, 2, Load()):
        planned[flow.kind, members(plan.topology, flow.group)] += flow.bytes
    for one in report.collectives:
        if len(one.group) > 1:
            found[one.kind, one.group] += one.bytes
    assert found == planned


@pytest.mark.slow
def test_the_reference_kernels_read_counts_of_the_load(rehearsals: Rehearsals) -> None:
    config = config_of("*E", Layout(2, 1, 2), train__precision="bf16", run__kernels="reference")
    report = rehearsals.run(step.rehearse, config, 2, 0)
    assert "rows of each expert" in {wait.what for wait in report.waits}
