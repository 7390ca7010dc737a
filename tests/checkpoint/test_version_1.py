"""Checkpoints that earlier code wrote still load: the run goes on along its curve, and its export has not moved.

make_version_1.py says how they were made. On the machine where they were made the losses are the same to the bit; other
processors multiply matrices in another order.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import convert_to_hf
import pytest

from launch.train import train
from moe_mamba.checkpoint import store
from moe_mamba.run.metrics import read_metrics
from tests.checkpoint.make_version_1 import CASES, FOLDER, SAVED, STEPS, TWO_RANKS, fingerprints
from tests.world import World


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def expected(name: str, tmp_path: Path) -> dict[str, Any]:
    """What the code that wrote the checkpoint made of it; the run's folder is unpacked beside it."""
    shutil.unpack_archive(FOLDER / f"{name}.zip", tmp_path)
    return json.loads((tmp_path / "expected.json").read_text())


def test_the_run_goes_on(name: str, expected: dict[str, Any], world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    files = {file.name for file in run.glob("checkpoints/*/*.safetensors")}
    assert files == {f"rank-{rank:05d}.safetensors" for rank in range(1 + (name == TWO_RANKS))}
    kinds = {tensor.partition("/")[0] for tensor in store.logical_tensors(store.resolve(run))}
    assert {"weights", "moment1", "moment2"} <= kinds
    world.run(
        train,
        ranks=1,
        config=str(run / "config.yaml"),
        **{"run.folder": str(run), "parallel.tensor": 1, "parallel.expert": 1},
    )
    losses = {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}
    assert list(losses) == list(range(SAVED + 1, STEPS + 1))
    assert losses == pytest.approx({int(step): loss for step, loss in expected["losses"].items()}, rel=1e-6)


def test_the_export_is_the_same(name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    convert_to_hf.main(str(tmp_path / "run"), str(tmp_path / "export"), scoring_only=name == "expert_choice")
    assert fingerprints(tmp_path / "export") == expected["tensors"]
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    known, routing = dict(expected["config"]), config.get("moe", {})  # which may have gained keys
    assert known.pop("moe", {}).items() <= routing.items()
    assert known.items() <= config.items()
