"""Small whole runs, for the tests to look at."""

from pathlib import Path
from typing import Any

import torch
from world import World

from launch.train import train
from moe_mamba.train import checkpoint
from moe_mamba.train.metrics import read_metrics

STEPS = 6


def run(world: World, tiny: Path, folder: Path, ranks: int = 1, **overrides: Any) -> list[dict]:
    """A run in `folder`; keys of `overrides` are written section__key. Its lines of metrics."""
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    world.run(train, ranks=ranks, config=str(tiny), **{"run.folder": str(folder)}, **keys)
    return read_metrics(folder)


def curve(metrics: list[dict]) -> list[float]:
    return [line["loss"] for line in metrics if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    step = checkpoint.resolve(folder)
    return {name: checkpoint.read_tensor(step, name) for name in checkpoint.logical_tensors(step)}


def same_weights(folder: Path, other: Path) -> None:
    """The newest checkpoints of two runs are the same, bit for bit."""
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
