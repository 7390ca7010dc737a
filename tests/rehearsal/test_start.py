"""What the start takes of a rank grows no faster than the world, and no part of it asks all ranks without need."""

from functools import partial

import pytest

from moe_mamba.rehearsal import stand_ins, start_world
from moe_mamba.rehearsal.device import replaced
from moe_mamba.rehearsal.start import fitted, start_costs
from moe_mamba.rehearsal.start_files import CHUNKS
from moe_mamba.rehearsal.start_parts import Part
from moe_mamba.rehearsal.start_table import figures, lines_of, start_table
from tests.parallel.layouts import Layout, config_of
from tests.rehearsal.process import Rehearsals

FEW, MANY = 16, 256
KEYS = {"train__precision": "bf16", "moe__experts": 32}
# Collectives of objects among all ranks: those of the hub and of the start state, and a checkpoint's.
WORDS = {"watch": (1, 1, 0, 0), "start state": (1, 1, 0, 0), "checkpoint": (0, 2, 1, 1)}
KINDS = ("broadcast", "all-gather", "gather", "scatter")

Starts = dict[tuple[int, str], dict[str, Part]]


def starts() -> Starts:
    """In the process: the parts of rank 0's start and of the last rank's, in a small and in a larger world."""
    start = partial(start_costs, config_of("ME", Layout(64, 4, 16), **KEYS), measured=True)
    start(FEW, 0)  # what libraries keep from their first use is no matter of the world's size
    worlds = [(gpus, rank, name) for gpus in (FEW, MANY) for rank, name in ((0, "first"), (gpus - 1, "last"))]
    return {(gpus, name): {part.name: part for part in start(gpus, rank)} for gpus, rank, name in worlds}


@pytest.fixture(scope="module")
def counted(rehearsals: Rehearsals) -> Starts:
    return rehearsals.run(starts)


@pytest.mark.slow
def test_another_rank_asks_for_as_much_in_any_world(counted: Starts) -> None:
    few, many = counted[FEW, "last"], counted[MANY, "last"]
    for name in ("meeting", "machines"):
        assert many[name].store == few[name].store
        # Numbers have more digits, and of findings, which may be one for each machine, all hear a few.
        assert many[name].store_bytes <= few[name].store_bytes + 2 * 8 * 400
    for name in ("meeting", "machines", "corpora", "checkpoint"):
        assert many[name].files["removed"] == few[name].files["removed"] == (name == "machines")
        assert many[name].files["stats"] == few[name].files["stats"]
    for name in few:
        assert many[name].files["opened"] <= few[name].files["opened"] + 4
    assert (many["watch"].connections, many["watch"].descriptors, many["watch"].threads) == (1, 3, 1)
    assert many["corpora"].files == few["corpora"].files and many["corpora"].mapped == few["corpora"].mapped > 0
    # The manifest, the index and its own file.
    assert many["checkpoint"].files["opened"] == 3


@pytest.mark.slow
def test_rank_0_asks_for_no_more_than_in_proportion(counted: Starts) -> None:
    many = counted[MANY, "first"]
    assert many["meeting"].store.total() == 3 + 2 * MANY
    assert many["meeting"].store_bytes < 400 * MANY
    assert many["machines"].store.total() <= 40 + 20 * MANY
    assert many["machines"].store_bytes < 10_000 + 1500 * MANY
    assert many["machines"].files["removed"] == 1
    assert many["watch"].connections == MANY + 1  # its own has both ends
    assert (many["watch"].descriptors, many["watch"].threads) == (MANY + 4, 2)
    assert many["watch"].sent < 1000 + 400 * MANY
    assert many["watch"].kept < 50_000 + 1500 * MANY
    assert many["checkpoint's check"].files["opened"] <= 10 + 2 * MANY
    assert many["checkpoint's check"].files["stats"] <= 20 + 4 * MANY


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "last"])
def test_a_rank_keeps_no_more_than_in_proportion(counted: Starts, name: str) -> None:
    few, many = counted[FEW, name], counted[MANY, name]
    groups = many["groups"]
    # Tensor, data, expert and expert-data ranks; DeepSpeed has each rank list all groups of experts, twice the world.
    assert (groups.groups, groups.members) == (4, 4 + MANY // 4 + 16 + MANY // 16)
    assert groups.listed == 4 + MANY // 4 + 2 * MANY
    assert groups.kept < 100_000 + 200 * MANY
    assert many["plan"].kept < 1.1 * few["plan"].kept + 10_000
    assert many["start state"].peak < 30_000 + 1000 * MANY
    # An index, whose chunks are as many as ranks wrote, and the same again for each file in the manifest.
    assert many["checkpoint"].read < 5000 + (CHUNKS + 1) * 110 * MANY
    assert many["checkpoint"].peak < 200_000 + CHUNKS * 1500 * MANY
    for part, parts in many.items():
        of_all = {(f"{kind} of objects", MANY): count for kind, count in zip(KINDS, WORDS.get(part, ()), strict=False)}
        assert parts.collectives == {key: count for key, count in of_all.items() if count}, part
        grown = 1.05 * MANY / FEW
        assert parts.collective_bytes.total() <= 200 + grown * few[part].collective_bytes.total()
        assert parts.store_bytes <= 2000 + grown * few[part].store_bytes


def engines(zero: int, precision: str, worlds: tuple[int, ...]) -> list[dict[str, Part]]:
    """In the process: the parts of the last rank's start in each world."""
    config = config_of("ME", Layout(64, 4, 16, zero), **(KEYS | {"train__precision": precision}))
    return [{part.name: part for part in start_costs(config, gpus, gpus - 1)} for gpus in worlds]


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "bf16")])
def test_the_engine_sends_weights_and_nothing_else(rehearsals: Rehearsals, zero: int, precision: str) -> None:
    """DeepSpeed's broadcasts keep replicas alike where processors round differently; they stay as many."""
    few, many = rehearsals.run(engines, zero, precision, (FEW, MANY))
    for parts, gpus in ((few, FEW), (many, MANY)):
        assert {kind for kind, _ in parts["engine"].collectives} == {"broadcast"}
        assert not parts["model"].collectives
        assert max(ranks for _, ranks in parts["engine"].collectives) == gpus // 4
    assert many["engine"].collectives.total() == few["engine"].collectives.total()
    assert many["engine"].collective_bytes.total() <= few["engine"].collective_bytes.total()
    assert 0 < many["engine"].shards <= few["engine"].shards
    parameters = few["engine"].collectives.total()
    assert many["engine"].objects < few["engine"].objects + 8 * MANY // 4 * parameters


def test_a_layout_that_does_not_divide_a_world_is_reduced() -> None:
    config = fitted(config_of("ME", Layout(64, 4, 16), **KEYS), 8)
    assert (config.parallel.tensor, config.parallel.expert, config.train.global_batch) == (4, 8, 2 * 1)


def test_what_fewer_connections_gave_is_said_to_be_computed() -> None:
    part = Part("watch", seconds=1.0, connections=101, sent=3000, descriptors=104, threads=2, share=0.5)
    said = dict(figures(part))
    assert said["seconds"] == "~2.00" and said["connections"] == "~202" and said["bytes there"] == "~6,000"
    columns = [{("layout",): "TP 1", ("engine", "rank 0"): "1"}, {("layout",): "TP 2", ("machines", "rank 0"): "2"}]
    assert lines_of(["8 ranks", "16 ranks"], columns) == [
        "                  8 ranks  16 ranks",
        "layout               TP 1      TP 2",
        "machines, rank 0        -         2",
        "engine, rank 0          1         -",
    ]


def with_few_connections() -> tuple[Part, str]:
    """In the process: the hub's part where descriptors are few, and the table of a small world."""
    config = config_of("M", Layout(8, 2), train__precision="bf16")
    with replaced(start_world, "most_connections", lambda: 3):
        parts = start_costs(config, 8, 0, measured=True)
    return next(part for part in parts if part.name == "watch"), start_table(config, [2])


@pytest.mark.slow
def test_the_table_has_a_column_for_each_world(rehearsals: Rehearsals) -> None:
    few, table = rehearsals.run(with_few_connections)
    assert (few.connections, few.share) == (5, 0.5)
    lines = table.splitlines()
    assert lines[0].split() == ["2", "ranks"]
    assert lines[1].split() == ["layout", "TP", "2,", "EP", "1,", "ZeRO", "1"]
    (keys,) = (line for line in lines if line.startswith("meeting, rank 0, keys at the store"))
    assert int(keys.partition("store")[2].split()[0].rstrip(",")) == 7  # of each rank two keys, and three of its own


def test_a_process_asks_for_all_descriptors_that_it_may_have() -> None:
    assert 1 <= stand_ins.most_connections() <= stand_ins.PORTS
