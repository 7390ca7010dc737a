"""One rank of a world that is not there makes its real step."""

from collections import Counter
from typing import Any

from moe_mamba.planning.load import Load
from moe_mamba.rehearsal.step import Report, rehearse
from tests.parallel.layouts import Layout, config_of
from tests.rehearsal.process import Rehearsals

ALL = "MEM-*E"


def make(
    pattern: str, layout: Layout, rank: int = -1, load: str = "even", precision: str = "bf16", **keys: Any
) -> Report:
    """In the process: the step of a rank, by default the last one."""
    config = config_of(pattern, layout, train__precision=precision, **keys)
    return rehearse(config, layout.ranks, rank % layout.ranks, Load.parse(load))


def test_a_rank_of_zero_1_makes_its_step(rehearsals: Rehearsals) -> None:
    report = rehearsals.run(make, ALL, Layout(8, 2, 4))
    kinds = Counter((one.kind, len(one.group)) for one in report.collectives)
    assert kinds["all-to-all", 4] == 2 * 5  # of each E: its counts; its rows there and back, forward and backward
    assert ("all-gather", 2) in kinds
    assert ("all-reduce", 8) in kinds
    memory = report.memory
    assert memory.kept["weights"] > 0
    assert memory.kept["optimizer"] > 0
    assert memory.kept["activations"] == memory.kept["gradients"] == 0
    assert memory.peak["activations"] > 0
    assert memory.largest["gradients"] > 0
    assert not report.mixed
    assert not report.host
    (wait,) = report.waits  # how many rows a rank sends, once a layer
    assert (wait.what, wait.phase, wait.count) == ("sizes of an exchange", "forward", 2)
    assert "expert.py" in wait.place


def test_sizes_come_from_the_load(rehearsals: Rehearsals) -> None:
    even = rehearsals.run(make, "E", Layout(4, 1, 4), 0)
    skewed = rehearsals.run(make, "E", Layout(4, 1, 4), 0, "skewed:2")
    (matrix,) = skewed.matrices.values()
    rows = [sum(row[:1]) for row in matrix]
    exchange = next(one for one in skewed.collectives if one.kind == "all-to-all" and one.dtype == "bfloat16")
    width = 16 * 2
    assert exchange.received == tuple(row[0] * width for row in matrix)
    assert exchange.sent == tuple(count * width for count in matrix[0])
    assert sum(rows) == 2 * sum(sum(row) for row in matrix) / 4
    assert skewed.memory.largest["activations"] > even.memory.largest["activations"]
