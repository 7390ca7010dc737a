"""Compiled layers of a layout are the same function."""

from typing import Any

import pytest
import torch._dynamo

from moe_mamba.config import Config
from tests.parallel.layouts import Layout, Trained, assemble, config_of, train
from tests.parallel.test_parity import worst
from tests.world import World


def train_compiled(config: Config, steps: int) -> tuple[Trained, int, int]:
    """In a worker: train, and count the graphs and the places where a layer broke into several."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trained = train(config, steps)
    counters = torch._dynamo.utils.counters
    return trained, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    ("pattern", "layout", "is_whole"),
    [
        pytest.param("M", Layout(2, 2), True, marks=pytest.mark.slow),
        pytest.param("M*-", Layout(2, 2), True, marks=pytest.mark.long),
        pytest.param("(M*)-", Layout(4, 4), True, marks=pytest.mark.long),
        pytest.param("(ME)", Layout(2, 2, 2), False, marks=pytest.mark.long),
        pytest.param("ME", Layout(4, 2, 2, expert_tensor=True), False, marks=pytest.mark.long),
        pytest.param("M shared", Layout(4, 2, 4), False, marks=pytest.mark.long),
    ],
)
def test_compiled_layers_train_alike(world: World, pattern: str, layout: Layout, is_whole: bool) -> None:
    """Each layer is one graph, its collectives inside, but where rows are sent to experts without waiting for them."""
    keys: dict[str, Any] = {"train__learning_rate": 1e-4}
    plain = world.run(train, config_of(pattern, layout, 2, **keys), 3, ranks=layout.ranks)
    config = config_of(pattern, layout, 2, train__compile=True, **keys)
    compiled = world.run(train_compiled, config, 3, ranks=layout.ranks, timeout=300)
    for (found, graphs, breaks), expected in zip(compiled, plain, strict=True):
        assert found.losses == pytest.approx(expected.losses, rel=1e-6)
        assert found.norms == pytest.approx(expected.norms, rel=1e-5)
        assert graphs > 0
        if is_whole:
            assert (graphs, breaks) == (len(config.model.layers), 0)
    error, name = worst(
        assemble([found.gradients for found, *_ in compiled]), assemble([rank.gradients for rank in plain])
    )
    assert error <= 1e-5, name
