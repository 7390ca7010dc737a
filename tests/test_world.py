"""The world that other tests stand on: faults are reported, and the world goes on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.world import WorkerError, World


def add_up(value: torch.Tensor) -> torch.Tensor:
    value = value + dist.get_rank()
    dist.all_reduce(value)
    return value


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("as planned")
    dist.barrier()


def die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(3)
    dist.barrier()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_function_runs_on_the_ranks_asked_for(world: World, ranks: int) -> None:
    results = world.run(add_up, torch.ones(2), ranks=ranks)
    assert [result.tolist() for result in results] == [[ranks + ranks * (ranks - 1) / 2] * 2] * ranks


@pytest.mark.parametrize(
    ("function", "message"),
    [(fail_on_rank_1, "as planned"), pytest.param(die_on_rank_0, r"exit code 3", marks=pytest.mark.slow)],
)
def test_a_failing_rank_is_reported_and_the_world_goes_on(world: World, function, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        world.run(function)
    assert time.monotonic() - begin < 20
    assert len(world.run(add_up, torch.ones(1), ranks=3)) == 3


def test_a_rank_that_hangs_is_reported(world: World) -> None:
    with pytest.raises(WorkerError, match="no answer in time"):
        world.run(time.sleep, 60, timeout=0.5)
    assert len(world.run(add_up, torch.ones(1))) == 2
