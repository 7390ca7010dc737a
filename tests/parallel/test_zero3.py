"""ZeRO-3 trains the same function as one process under ZeRO 1."""

from typing import Any

import pytest
from parallel.layouts import Layout, assemble, config_of, train
from parallel.test_parity import worst
from world import World

from moe_mamba.config import Config
from moe_mamba.parallel import zero3

STEPS = 20


def train_gathering(config: Config, steps: int = STEPS) -> Any:
    """In a worker: train with every weight freed after use, however small."""
    zero3.PERSISTENT = 0
    return train(config, steps)


@pytest.mark.parametrize("pattern", ["M-", "*-"])
def test_same_curve_as_one_process(world: World, pattern: str) -> None:
    (alone,) = world.run(train, config_of(pattern, Layout(1)), STEPS, ranks=1)
    for layout in (Layout(1, zero=3), Layout(2, zero=3), Layout(4, zero=3)):
        ranks = world.run(train_gathering, config_of(pattern, layout), ranks=layout.ranks)
        for rank in ranks:
            assert rank.losses == pytest.approx(alone.losses, rel=1e-5), layout
            assert rank.norms == pytest.approx(alone.norms, rel=1e-4), layout
        error, name = worst(assemble([rank.weights for rank in ranks]), assemble([alone.weights]))
        assert error < 1e-4, f"{layout}: {name}"
        error, name = worst(assemble([rank.gradients for rank in ranks]), assemble([alone.gradients]))
        assert error < 1e-5, f"{layout}: {name}"
