"""Layouts of a search: they fit, they are ranked, and the best would be trained as it says."""

import shlex

import pytest

from moe_mamba.config import Config
from moe_mamba.config_file import load_config
from moe_mamba.errors import UserError
from moe_mamba.planning.cluster import Cluster
from moe_mamba.planning.estimate import estimate
from moe_mamba.planning.figures import change
from moe_mamba.planning.load import Load
from moe_mamba.planning.memory import memory_of
from moe_mamba.planning.micro_batch import possible_micro_batches
from moe_mamba.planning.report import command_line
from moe_mamba.planning.search import MARGIN, margin_load, search, worlds_table
from tests import ROOT

H100 = Cluster.of("h100")


def paper(**keys: object) -> Config:
    given = {key.replace("__", "."): value for key, value in keys.items()}
    return load_config(
        ROOT / "configs/paper/moe_mamba_25m.yaml", {"train.precision": "bf16", "moe.experts": 32} | given
    )


def test_the_best_fits_and_is_what_its_command_line_says() -> None:
    found = search(paper(moe__capacity_factor=None), H100, 4)
    speeds = [one.tokens_per_second for one in found.best]
    assert speeds == sorted(speeds, reverse=True)
    assert all(one.fits for one in found.best)
    assert found.tried == len(found.best) + found.too_large
    best = max(found.best, key=lambda one: one.plan.topology.expert)  # whose load is not even
    line = command_line(best, "my configs/a.yaml", paper(), {"moe.capacity_factor": "null"})
    assert line.startswith("deepspeed --num_gpus=4 launch/train.py --config 'my configs/a.yaml' --")
    keys = dict(part.removeprefix("--").split("=") for part in shlex.split(line)[5:])
    assert best.load.text.startswith("skewed:")
    load = Load.parse(best.load.text)  # as a user would give it again
    again = estimate(paper(**{key.replace(".", "__"): value for key, value in keys.items()}), H100, 4, load)
    assert again.tokens_per_second == best.tokens_per_second
    assert again.memory == best.memory


def test_where_memory_is_short_layouts_drop_out_and_then_all() -> None:
    config = paper(train__global_batch=16)
    most, few, none = (search(config, change(H100, {"memory_gib": size}), 2) for size in (80, 4, 0.5))
    assert 0 < len(few.best) < len(most.best)
    assert few.too_large > most.too_large == 0
    assert not none.best
    assert none.least is not None
    assert not none.least.fits
    assert "none fits" in worlds_table(config, change(H100, {"memory_gib": 0.5}), [1], None, None)


def test_a_batch_that_nobody_can_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"no layout of 7 GPUs shares train\.global_batch=64"):
        search(paper(), change(H100, {"gpus_per_machine": 7}), 7)


@pytest.mark.parametrize("ranks", [1, 2, 8, 32])
def test_the_margin_is_of_the_rows_of_the_fullest_rank(ranks: int) -> None:
    matrix = margin_load(32, ranks).matrix(ranks, 32, 3200)
    first = sum(sum(row[: 32 // ranks]) for row in matrix)
    assert first == pytest.approx(3200 * (1 if ranks == 1 else MARGIN), rel=0.01)


def test_memory_grows_with_the_micro_batch_as_the_search_believes() -> None:
    """But for a single micro-step, which it looks at by itself."""
    one = estimate(paper(), H100, 2, Load())
    *totals, whole = (memory_of(one.plan, size, one.load).total for size in possible_micro_batches(one.plan))
    assert len(totals) > 3
    assert totals == sorted(totals)
    assert whole > totals[0]


def test_a_mamba_searches_zero_3_as_well_and_no_experts() -> None:
    config = load_config(ROOT / "configs/paper/mamba_25m.yaml", {"train.precision": "bf16"})
    found = search(config, H100, 2)
    assert {one.plan.config.parallel.zero for one in found.best} == {1, 2, 3}
    assert {one.plan.topology.expert for one in found.best} == {1}
