"""Optimizer state and step on the CPU: the same curve as on the device."""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.layouts import Layout, assemble, config_of, train, train_far_from_ties
from tests.parallel.test_parity import worst
from tests.parallel.test_zero3 import check_resumes
from tests.world import World

STEPS = 10
LAYOUTS = {
    "M-": [Layout(2), Layout(2, zero=2), Layout(2, zero=3), *(Layout(4, 2, zero=zero) for zero in (1, 2, 3))],
    "ME": [Layout(2, expert=2), Layout(2, expert=2, zero=2), Layout(2, 2, 2)],
}


@pytest.mark.parametrize("pattern", [pytest.param("M-", marks=pytest.mark.slow), "ME"])
def test_same_curve_as_on_the_device(world: World, pattern: str) -> None:
    for layout in LAYOUTS[pattern]:
        keys: dict[str, Any] = {"train__learning_rate": 1e-3, "train__gradient_clip": 0.3}
        keys["run__seed"], here = train_far_from_ties(world, pattern, layout, STEPS, 2, **keys)
        config = config_of(pattern, layout, 2, parallel__offload_optimizer=True, **keys)
        offloaded = world.run(train, config, STEPS, ranks=layout.ranks)
        assert offloaded[0].losses == pytest.approx(here[0].losses, rel=1e-5), layout
        assert offloaded[0].norms == pytest.approx(here[0].norms, rel=1e-5), layout
        error, name = worst(assemble([r.weights for r in offloaded]), assemble([r.weights for r in here]))
        assert error <= 1e-5, f"{layout}: {name}"


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.long),
        pytest.param(3, marks=pytest.mark.slow),
    ],
)
def test_runs_resume_with_it_and_without(world: World, tiny: Path, tmp_path: Path, zero: int) -> None:
    offloaded = {"parallel__zero": zero, "parallel__offload_optimizer": True, "ranks": 2}
    check_resumes(world, tiny, tmp_path / "from", offloaded, {"parallel__zero": 1, "ranks": 1})
    check_resumes(world, tiny, tmp_path / "to", {"parallel__zero": 3, "ranks": 2}, offloaded)
