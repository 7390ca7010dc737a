"""What starting a layout's groups leaves in the process."""

import torch

from moe_mamba.config import Config
from tests.parallel.layouts import Layout, build, config_of
from tests.world import World


def current_device(config: Config) -> str:
    """In a worker: where the function that every library asks for the current GPU comes from."""
    build(config)
    return torch.cuda.current_device.__module__


def test_torch_is_left_as_it_is(world: World) -> None:
    assert world.run(current_device, config_of("M-", Layout(2, 2)), ranks=2) == ["torch.cuda"] * 2
