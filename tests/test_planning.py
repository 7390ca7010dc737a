import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_mamba.config_file import load_config
from moe_mamba.planning import plan, table

ROOT = Path(__file__).resolve().parents[1]


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


def test_table_names_the_pattern_and_the_work() -> None:
    shown = table(load_config(None, {"model.pattern": "*-"}))
    assert "*- x 8" in shown
    assert "FLOPs a token" in shown


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plan.py", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_command() -> None:
    done = _run("--config", "configs/paper/moe_mamba_25m.yaml", "--json", "--moe.experts=32")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"total_parameters", "active_parameters", "norm_parameters", "embedding_parameters"} <= set(found)
    assert found["active_parameters"] == pytest.approx(26.272e6, rel=1e-4)


def test_command_refuses_in_one_line() -> None:
    done = _run("--model.d_modle=512")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "d_modle" in done.stderr
