"""In a layer of several mixers, tokens travel to their experts while the others compute."""

import pytest
import torch

from moe_mamba.config import Config
from moe_mamba.train.objective import Objective
from tests.parallel.layouts import Layout, batch_of, build, config_of, share_of
from tests.world import World


def events(config: Config) -> list[str]:
    """In a worker: what happens in a step, forward and backward, by name in the order in which it begins."""
    built = build(config)
    mine = [share_of(values, built.topology, 0, config.train.micro_batch) for values in batch_of(0, config)]
    objective = Objective(config.moe, 1, 1, built.topology, built.model.balanced_routers())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = built.model.train()(mine[0], mine[2], targets=mine[1])
        objective(output.cross_entropy, output.statistics).backward()
    return [event.name for event in sorted(profile.events(), key=lambda event: event.time_range.start)]


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("pattern", ["(ME)", "(EM)", "(EM) shared"])
def test_mamba_computes_while_tokens_travel(world: World, pattern: str, capacity_factor: float | None) -> None:
    config = config_of(pattern, Layout(2, 1, 2), moe__capacity_factor=capacity_factor)
    for names in world.run(events, config, ranks=2):
        # The first journey to begin is that of the layer E, and the last one to end; backward likewise.
        ends = len(names) - names[::-1].index("_Arrive")
        assert names.index("_Leave") < names.index("moe_mamba::selective_scan_cpu") < ends
        ends = len(names) - names[::-1].index("_LeaveBackward")
        assert names.index("_ArriveBackward") < names.index("moe_mamba::selective_scan_cpu_backward") < ends
