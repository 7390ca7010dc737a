from pathlib import Path

import pytest
import torch

from moe_mamba.config_file import load_config
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import World
from moe_mamba.planning.memory import layout
from moe_mamba.run.metrics import read_metrics
from moe_mamba.train.throughput import Throughput


def test_figures_are_a_devices_and_without_a_peak_there_is_no_mfu() -> None:
    found = Throughput(6_000_000, 4, 989e12).figures(1e8)
    assert found == {"tokens_per_second": 1e8, "tflops": 150.0, "mfu": 0.1517}
    assert Throughput(6_000_000, 1, None).figures(1e8) == {"tokens_per_second": 1e8, "tflops": 600.0}


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989e12), ("fp32", 67e12)])
def test_the_peak_is_the_gpus_in_the_dtype_that_is_trained_in(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, precision: str, peak: float
) -> None:
    config = load_config(tiny, {"train.precision": precision})
    plan = RunPlan.of(config, layout(config, gpus=4))
    assert Throughput.of(plan).peak is None  # of a CPU
    monkeypatch.setattr(World, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert Throughput.of(plan) == Throughput(plan.model.flops_per_token(32), 4, peak)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert Throughput.of(plan).peak is None


def test_a_runs_metrics_have_the_models_operations_per_second(plain: Path) -> None:
    config = load_config(plain / "config.yaml")
    operations = RunPlan.of(config, layout(config)).model.flops_per_token(32)
    lines = [line for line in read_metrics(plain) if "loss" in line]
    for line in lines:
        assert line["tflops"] == pytest.approx(operations * line["tokens_per_second"] / 1e12, rel=1e-3)
        assert "mfu" not in line
