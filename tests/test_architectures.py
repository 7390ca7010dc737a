"""Each of the paper's five architectures learns real C4, small (long: about ten minutes each on two cores)."""

import statistics
from pathlib import Path

import pytest

from launch.train import train
from moe_mamba.run.metrics import read_metrics
from tests.train.runs import curve

ARCHITECTURES = {"transformer": "*-", "transformer_moe": "*E", "mamba": "M", "mamba_mlp": "M-", "moe_mamba": "ME"}


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_learns_c4(name: str, world, shared_data: Path, tmp_path: Path) -> None:
    """200 steps of 4,096 tokens, d_model 128, four layers: the mean loss of the last 20 is below 6.9."""
    pattern = ARCHITECTURES[name]
    overrides = {
        "run.folder": str(tmp_path / name),
        "model.pattern": pattern,
        "model.repeat": 4 // len(pattern),
        "model.d_model": 128,
        "model.d_state": 16,
        "model.vocab_size": 50257,
        "moe.experts": 8,
        "moe.d_expert": "null",
        "moe.capacity_factor": 1.25,
        "data.train": str(shared_data / "c4" / "en" / "c4-train.*.json.gz"),
        "data.validation": str(shared_data / "c4" / "en" / "c4-validation.*.json.gz"),
        "data.tokenizer": str(shared_data / "gpt2"),
        "data.cache": str(tmp_path / "cache"),
        "train.steps": 200,
        "train.global_batch": 16,
        "train.micro_batch": 4,
        "train.learning_rate": 3e-3,
        "train.validate_every": 0,
        "checkpoint.every": 0,
    }
    world.run(train, ranks=1, timeout=3600, **overrides)
    last = statistics.mean(curve(read_metrics(tmp_path / name))[-20:])
    print(f"{name}: mean loss of the last 20 steps {last:.4f}")
    assert last < 6.9
