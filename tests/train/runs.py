"""Small whole runs, for the tests to look at."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.train import train
from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.run.metrics import read_metrics
from tests.world import World

STEPS = 6


def run(world: World, tiny: Path, folder: Path, ranks: int = 1, **overrides: Any) -> list[dict]:
    """A run in `folder`; keys of `overrides` are written section__key. Its lines of metrics."""
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    world.run(train, ranks=ranks, config=str(tiny), **{"run.folder": str(folder)}, **keys)
    return read_metrics(folder)


def curve(metrics: list[dict]) -> list[float]:
    return [line["loss"] for line in metrics if "loss" in line]


def validations(metrics: list[dict]) -> list[tuple[int, float]]:
    """Step and loss of each validation."""
    return [(line["step"], line["validation_loss"]) for line in metrics if "validation_loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    step = store.resolve(folder)
    return {name: store.read_tensor(step, name) for name in store.logical_tensors(step)}


def same_weights(folder: Path, other: Path) -> None:
    """The newest checkpoints of two runs are the same, bit for bit."""
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def save_as_before(folder: Path, step: int, shards: Sequence[Shard], description: dict[str, Any] | None = None) -> Path:
    """Save as versions did that looked for no NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "first_not_finite", lambda _: None)
        path = store.save(folder, step, shards, description or {}, keep=99)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["finite"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path
