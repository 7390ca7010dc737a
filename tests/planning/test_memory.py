import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from moe_mamba.config_file import load_config
from moe_mamba.planning.memory import plan, table
from tests import ROOT
from tools.plan import main


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        ("mamba_25m", 27.116, 27.116),
        ("mamba_100m", 120.668, 120.668),
        ("moe_mamba_25m_v1", 416.3, 26.272),
        ("moe_mamba_25m", 542.2, 26.313),
        ("moe_mamba_100m", 2439.0, 117.473),
        ("transformer_moe_25m", 545.4, 25.297),
        ("transformer_moe_100m", 2454.1, 113.639),
    ],
)
def test_paper_configs_have_the_paper_sizes(config: str, total: float, active: float) -> None:
    found = plan(load_config(ROOT / f"configs/paper/{config}.yaml"))
    assert round(found["total_parameters"] / 1e6, 1 if total > 200 else 3) == total
    assert round(found["active_parameters"] / 1e6, 3) == active
    assert found["embedding_parameters"] == 2 * 50257 * (768 if "100m" in config else 512)


MAMBA = 1_694_720  # of a layer, d 512
ROUTED = 121_856  # of it without the three projections that are routed


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        # router, and 42 or 1 experts of 6 d^2
        (
            "paper/moe_mamba_parallel_25m",
            8 * (MAMBA + 21_504 + 42 * 1_572_864),
            8 * (MAMBA + 21_504 + 1_572_864),
        ),
        # in every other layer a router and 16 or 1 experts of 512 x 344 and 344 x 1024, for a gate of 512 x 1024
        (
            "paper/moe_mamba_inner_25m",
            16 * MAMBA + 8 * (8_192 + 16 * 528_384 - 524_288),
            16 * MAMBA + 8 * (8_192 + 528_384 - 524_288),
        ),
        # 8 or 1 experts of three matrices of 512 x 1024, and the router
        ("kin/routing_mamba_25m", 16 * (ROUTED + 8 * 1_572_864 + 4_096), 16 * (ROUTED + 1_572_864 + 4_096)),
    ],
)
def test_other_designs_have_the_sizes_of_their_formulas(config: str, total: int, active: int) -> None:
    found = plan(load_config(ROOT / f"configs/{config}.yaml"))
    assert (found["total_parameters"], found["active_parameters"]) == (total, active)
    if config.startswith("kin"):
        assert (total, active) == (203_341_824, 27_181_056)
    if "parallel" in config:
        sequential = plan(load_config(ROOT / "configs/paper/moe_mamba_25m.yaml"))
        assert (total, active) == (sequential["total_parameters"], sequential["active_parameters"])


def test_table_names_the_pattern_and_the_work() -> None:
    shown = table(load_config(None, {"model.pattern": "*-"}))
    assert "*- x 8" in shown
    assert "FLOPs per token" in shown


def test_command() -> None:
    command = [sys.executable, "tools/plan.py", "--config", "configs/paper/moe_mamba_25m.yaml"]
    command += ["--json", "--moe.experts=32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"total_parameters", "active_parameters", "norm_parameters", "embedding_parameters"} <= set(found)
    assert found["active_parameters"] == pytest.approx(26.272e6, rel=1e-4)


def test_more_devices_hold_less_each() -> None:
    keys = {"model.pattern": "ME", "model.vocab_size": 1024, "train.precision": "bf16"}
    one = plan(load_config(None, keys))
    assert one["devices"] == 1
    assert one["parameters_per_device"] == sum(one[f"{kind}_parameters"] for kind in ("total", "norm", "embedding"))
    assert one["optimizer_bytes"] == 12 * one["parameters_per_device"]
    assert 2 * one["parameters_per_device"] < one["weight_bytes"] < 2.1 * one["parameters_per_device"]
    spread = plan(load_config(None, {**keys, "parallel.tensor": 2, "parallel.expert": 8}))
    assert spread["devices"] == 8
    assert spread["parameters_per_device"] < one["parameters_per_device"] / 6
    assert spread["weight_bytes"] < one["weight_bytes"] / 6
    more = plan(load_config(None, {**keys, "parallel.tensor": 2, "parallel.expert": 8}), 64)
    assert more["weight_bytes"] == spread["weight_bytes"]
    assert more["optimizer_bytes"] == pytest.approx(spread["optimizer_bytes"] / 8, rel=1e-3)
    sharded = plan(
        load_config(None, {**keys, "parallel.tensor": 2, "parallel.expert": 8, "parallel.expert_tensor": True})
    )
    assert sharded["devices"] == 16


@pytest.mark.parametrize(("zero", "weights", "gradients", "optimizer"), [(0, 4, 4, 8), (1, 4, 4, 3), (3, 1, 1, 3)])
def test_zero_shares_more_from_stage_to_stage(zero: int, weights: int, gradients: int, optimizer: int) -> None:
    """Bytes a parameter in fp32 on four devices: 4 of weight, 4 of gradient, 8 of moments, 4 of masters with ZeRO."""
    numbers = plan(load_config(None, {"model.pattern": "M-", "parallel.zero": zero}), 4)
    found = [
        numbers[f"{kind}_bytes"] / numbers["parameters_per_device"] for kind in ("weight", "gradient", "optimizer")
    ]
    assert found == pytest.approx([weights, gradients, optimizer], rel=0.02)
    if zero:
        keys = {"model.pattern": "M-", "parallel.zero": zero, "parallel.offload_optimizer": True}
        offloaded = plan(load_config(None, keys), 4)
        assert offloaded["optimizer_bytes"] == 0
        assert offloaded["host_bytes"] > numbers["optimizer_bytes"]


def test_the_table_shows_the_layout() -> None:
    keys = {"parallel.tensor": 2, "parallel.expert": 4, "parallel.offload_optimizer": True}
    shown = table(load_config(None, keys), 16)
    assert "16 devices, tensor 2 x data 8, experts over 4" in shown
    for row in ("parameters", "weights", "gradients", "together", "offloaded"):
        assert f"\n  {row} " in shown


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model.d_modle=512"], ["d_modle"]),
        (["--gpus=6", "--parallel.tensor=4"], ["parallel.tensor=4", "6"]),
        (["--gpus=64", "--parallel.expert=64"], ["parallel.expert=64", "moe.experts=32", "parallel.expert=32"]),
        (["--gpus=0"], ["--gpus=0"]),
        (["--gpus=many"], ["--gpus=many"]),
        (["--gpus=48"], ["train.global_batch=64", "48"]),
    ],
)
def test_command_refuses_in_one_line_as_training_does(
    refusal: Callable[..., str], flags: list[str], named: list[str]
) -> None:
    line = refusal(main, *flags)
    for part in named:
        assert part in line
