"""What runs on gloo is rehearsed with a GPU's kernels: every kind of layer and layout, in bf16, compiled or not."""

from typing import Any

import pytest

from moe_mamba.config import Config
from moe_mamba.kernels import backends
from moe_mamba.rehearsal import device
from moe_mamba.rehearsal.step import Report, rehearse
from tests.parallel.layouts import Layout, config_of, legal_layouts
from tests.parallel.test_parity import PATTERNS
from tests.rehearsal.process import Rehearsals

# One of each kind of layout: tensor, expert, both, sharded by tensor, replicas, stages of ZeRO.
QUICK = [
    ("(ME)(*E)-", Layout(8, 4, 4, zero=2)),
    ("M-", Layout(4, 1, 1, zero=3)),
    pytest.param("MEM-*E", Layout(4, 2, 2, zero=1), marks=pytest.mark.slow),
    pytest.param("M shared", Layout(4, 2, 2, zero=1, expert_tensor=True), marks=pytest.mark.slow),
]

RECOMPUTED, SHARED = {"train__recompute": True}, {"moe__shared_experts": 1}


def make(config: Config, ranks: int, rank: int = 0) -> tuple[Report, dict[str, str]]:
    """In the process: a rank's report, and the back ends that its kernels were."""
    asked: dict[str, str] = {}
    find = backends.find

    def noting(operation: str, on: str, *others: Any) -> Any:
        found = find(operation, on, *others)
        if on == device.TYPE:
            asked[operation] = found[0]
        return found

    backends.find = noting  # type: ignore[assignment]
    try:
        return rehearse(config, ranks, rank), asked
    finally:
        backends.find = find


def check(rehearsals: Rehearsals, pattern: str, layout: Layout, rank: int = 0, **keys: Any) -> Report:
    config = config_of(pattern, layout, train__precision="bf16", **keys)
    report, kernels = rehearsals.run(make, config, layout.ranks, rank)
    on_triton = {name for name, table in backends.BACKENDS.items() if "triton" in table}
    assert kernels
    for operation, name in kernels.items():
        assert name == ("triton" if operation in on_triton else "torch"), operation
    assert not report.mixed
    of_steps = [wait.what for wait in report.waits if wait.phase in ("forward", "backward", "update")]
    assert set(of_steps) <= {"sizes of an exchange"}
    return report


@pytest.mark.parametrize(("pattern", "layout"), QUICK, ids=str)
def test_kinds_of_layouts(rehearsals: Rehearsals, pattern: str, layout: Layout) -> None:
    check(rehearsals, pattern, layout, layout.ranks - 1)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(rehearsals: Rehearsals, pattern: str) -> None:
    experts = 2 if "E" in pattern or " " in pattern else 1
    check(rehearsals, pattern, Layout(4, 2, experts), data__reset_at_document=True)
    check(rehearsals, pattern, Layout(4, 1, experts, zero=2), train__recompute=True)


@pytest.mark.long
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_whole_matrix(rehearsals: Rehearsals, pattern: str) -> None:
    for layout in legal_layouts(pattern):
        if layout.zero:  # ZeRO 0 has no masters for bf16
            check(rehearsals, pattern, layout, layout.ranks - 1)


@pytest.mark.parametrize(
    ("pattern", "layout", "keys"),
    [
        pytest.param("M*-", Layout(4, 2), {}, marks=pytest.mark.long),
        pytest.param("M*-", Layout(4, 2), RECOMPUTED, marks=pytest.mark.slow),
        pytest.param("ME", Layout(4, 2, 2), {}, marks=pytest.mark.long),
        pytest.param("*E", Layout(4, 2, 2, expert_tensor=True), {}, marks=pytest.mark.long),
        pytest.param("(ME)", Layout(4, 2, 4, zero=2), {}, marks=pytest.mark.long),
        pytest.param("M shared", Layout(4, 2, 4), {}, marks=pytest.mark.long),
        pytest.param("E", Layout(4, 2, 2, expert_tensor=True), RECOMPUTED | SHARED, marks=pytest.mark.long),
        pytest.param("(ME)(M-)", Layout(4, 2, 2), RECOMPUTED | SHARED, marks=pytest.mark.long),
        pytest.param("M shared", Layout(4, 2, 2), RECOMPUTED, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_compiled_layers(rehearsals: Rehearsals, pattern: str, layout: Layout, keys: dict[str, Any]) -> None:
    """Graphs are made of each layer; none breaks but those that send rows to experts, where sizes are read.

    And where a layer is computed again, at the sum with which it ends, which is not made again: what compiled layers
    send is what others do.
    """
    report = check(rehearsals, pattern, layout, train__compile=True, **keys)
    plain = check(rehearsals, pattern, layout, **keys)
    assert report.graphs >= len(config_of(pattern, layout).model.layers)
    assert not (report.breaks and not keys and layout.expert == 1)
    assert [one for one in report.collectives if one.bytes] == [one for one in plain.collectives if one.bytes]
