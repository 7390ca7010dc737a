"""What the start takes of a rank grows no faster than the world, and no part of it asks all ranks without need."""

import pytest

from moe_mamba.config import Config
from moe_mamba.rehearsal.start import Part, fitted, start_costs, start_table
from tests.parallel.layouts import Layout, config_of
from tests.rehearsal.process import Rehearsals

WORLDS = (64, 1024, 4096)
KEYS = {"train__precision": "bf16", "moe__experts": 32}


def costs(config: Config, worlds: tuple[int, ...], last: bool, measured: bool) -> list[dict[str, Part]]:
    """In the process: parts of the start in each world."""
    start_costs(config, worlds[0], 0)  # what libraries keep from their first use is no matter of the world's size
    found = []
    for gpus in worlds:
        parts = start_costs(config, gpus, gpus - 1 if last else 0, measured=measured)
        found.append({part.name: part for part in parts})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["rank 0", "last rank"])
def test_a_rank_keeps_and_asks_for_no_more_than_in_proportion(rehearsals: Rehearsals, last: bool) -> None:
    config = config_of("ME", Layout(64, 4, 16), **KEYS)
    few, _, many = rehearsals.run(costs, config, WORLDS, last, measured=True)
    groups = many["groups"]
    # Tensor, data, expert and expert-data ranks; DeepSpeed has each rank list all groups of experts, twice the world.
    assert (groups.groups, groups.members) == (4, 4 + 4096 // 4 + 16 + 4096 // 16)
    assert groups.listed == 4 + 4096 // 4 + 2 * 4096
    assert groups.kept < 100_000 + 200 * 4096
    assert many["plan"].kept < 1.1 * few["plan"].kept + 10_000
    meeting = many["meeting"].store.total()
    assert meeting == few["meeting"].store.total() if last else meeting <= 3 + 2 * 4096
    assert many["meeting"].store_bytes < (20_000 if last else 400 * 4096)
    assert not any(part.collectives for part in many.values())


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_the_engine_sends_weights_and_nothing_else(rehearsals: Rehearsals, zero: int) -> None:
    """DeepSpeed's broadcasts keep replicas alike where processors round differently; they stay as many."""
    precision = "bf16" if zero else "fp32"
    config = config_of("ME", Layout(64, 4, 16, zero), **(KEYS | {"train__precision": precision}))
    few, many = rehearsals.run(costs, config, (64, 1024), True, measured=False)
    for parts in (few, many):
        assert {kind for kind, _ in parts["engine"].collectives} == {"broadcast"}
        assert not parts["model"].collectives
        assert max(ranks for _, ranks in parts["engine"].collectives) == (16 if parts is few else 256)
    assert many["engine"].collectives.total() == few["engine"].collectives.total()
    assert many["engine"].collective_bytes.total() <= few["engine"].collective_bytes.total()
    parameters = few["engine"].collectives.total()
    assert many["engine"].objects < few["engine"].objects + 8 * 256 * parameters


def test_a_layout_that_does_not_divide_a_world_is_reduced() -> None:
    config = fitted(config_of("ME", Layout(64, 4, 16), **KEYS), 8)
    assert (config.parallel.tensor, config.parallel.expert, config.train.global_batch) == (4, 8, 2 * 1)


@pytest.mark.slow
def test_the_table_has_a_column_for_each_world(rehearsals: Rehearsals) -> None:
    lines = rehearsals.run(start_table, config_of("M", Layout(8, 2), train__precision="bf16"), [4, 8]).splitlines()
    assert lines[0].split() == ["4", "ranks", "8", "ranks"]
    assert lines[1].split() == ["layout", *["TP", "2,", "EP", "1,", "ZeRO", "1"] * 2]
    (keys,) = (line for line in lines if line.startswith("meeting, rank 0, keys at the store"))
    # of each rank two keys, and three of its own
    assert [
        int(word[:-1]) for word in keys.partition("store")[2].split() if word[:-1].isdigit() and word.endswith(",")
    ] == [11, 19]
