"""Pictures are drawn only from metrics, and what cannot be drawn is said in one line."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_mamba.errors import UserError
from moe_mamba.run.plots import _smooth, plot_expert_load, plot_loss
from tests import ROOT
from tools.plot import main


def write_run(folder: Path, steps: int = 30, layers: tuple[int, ...] = (1, 3), experts: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, steps + 1):
            loss = None if step == 7 else 3 + math.exp(-step / 5)  # a step whose loss was not finite
            line = {"step": step, "tokens": 256 * step, "loss": loss}
            if layers:
                line["expert_load"] = {str(layer): [1 / experts] * experts for layer in layers}
                line["moe"] = {key: {str(layer): 0.1 for layer in layers} for key in ("dropped", "router_entropy")}
            stream.write(json.dumps(line) + "\n")
        scores = {"first": {"loss": 3.2}, "second": {"loss": 3.3}}
        stream.write(json.dumps({"step": steps, "tokens": 256 * steps, "validation": scores}) + "\n")
    return folder


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


@pytest.mark.parametrize("steps", [1, 2, 30, 700])
@pytest.mark.parametrize("count", [1, 3])
def test_losses_of_one_run_and_of_several_are_drawn(tmp_path: Path, steps: int, count: int) -> None:
    runs = {f"run {number}": write_run(tmp_path / str(number), steps) for number in range(count)}
    plot_loss(runs, tmp_path / "plots" / "loss.png")
    width, height = size_of_png(tmp_path / "plots" / "loss.png")
    assert width > height > 500


@pytest.mark.parametrize(("layers", "experts", "steps"), [((1,), 4, 1), ((1, 3), 1, 30), (tuple(range(7)), 64, 700)])
def test_the_load_of_experts_is_drawn(tmp_path: Path, layers: tuple[int, ...], experts: int, steps: int) -> None:
    plot_expert_load(write_run(tmp_path, steps, layers, experts), tmp_path / "load.png")
    assert min(size_of_png(tmp_path / "load.png")) > 500


def test_smoothing_keeps_levels_and_both_ends() -> None:
    assert np.allclose(_smooth(np.full(200, 3.0)), 3.0)
    line = np.arange(1000.0)
    assert np.allclose(_smooth(line)[:980], line[:980])
    noisy = np.random.default_rng(0).normal(size=5000)
    assert _smooth(noisy).std() < 0.2 * noisy.std()


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        plot_loss({"a": tmp_path / "a"}, tmp_path / "loss.png")
    run = write_run(tmp_path / "dense", layers=())
    with pytest.raises(UserError, match="logged no expert_load"):
        plot_expert_load(run, tmp_path / "load.png")
    with pytest.raises(UserError, match="cannot be written"):
        plot_loss({"a": run}, tmp_path / "loss.what")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no loss yet"):
        plot_loss({"a": run}, tmp_path / "loss.png")


def test_the_tool_draws_several_runs_and_ends_with_2_on_bad_input(refusal: Callable[..., str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    command = [sys.executable, str(ROOT / "tools" / "plot.py")]
    options = {
        "cwd": tmp_path,
        "capture_output": True,
        "text": True,
        "env": os.environ | {"PYTHONPATH": str(ROOT)},
    }
    good = subprocess.run([*command, "--runs", "a,b", "--output", "curves.png"], **options)
    assert (good.returncode, good.stderr) == (0, "")
    size_of_png(tmp_path / "curves.png")
    line = refusal(main, f"--runs={tmp_path / 'a'},{tmp_path / 'nothing'}")
    assert "nothing/metrics.jsonl does not exist" in line
