"""Pictures are drawn only from metrics, and what cannot be drawn is said in one line."""

import json
import math
import os
import subprocess
import sys
import warnings
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


ODD = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e308",
    "-1e308",
    "0",
    "-1",
    "null",
    "true",
    '"x"',
    "[]",
    "{}",
    "1e400",
    "9" * 5000,
]
WHERE = (
    '{"step": 1, "tokens": %s, "loss": 3}',
    '{"step": 1, "tokens": 256, "loss": %s}',
    '{"step": %s, "tokens": 256, "loss": 3}',
    '{"step": 1, "tokens": 256, "validation": {"a": {"loss": %s}}}',
    '{"step": 1, "tokens": 256, "validation": %s}',
    '{"step": 1, "tokens": 256, "loss": 3, "expert_load": {"1": [%s, 0.5]}}',
    '{"step": 1, "tokens": 256, "loss": 3, "expert_load": {"1": [0.5, 0.5]}, "moe": {"dropped": {"1": %s}}}',
    '{"step": 1, "tokens": 256, "loss": 3, "expert_load": %s}',
    '{"step": 1, %s}',
    "%s",
)


@pytest.mark.parametrize("draw", [plot_loss, plot_expert_load])
def test_odd_figures_are_left_out_or_named_with_their_step(
    tmp_path: Path, draw: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_mamba.run.plots._save", lambda figure, output: figure.draw_without_rendering())
    whole = [json.dumps({"step": step, "tokens": 256 * step, "loss": 3.0}) for step in (2, 3)]
    tried = drawn = 0
    for where in WHERE:
        for value in ODD:
            (tmp_path / "metrics.jsonl").write_text("\n".join([where % value, *whole, ""]))
            tried += 1
            try:
                with warnings.catch_warnings(action="error"):
                    draw({"a": tmp_path} if draw is plot_loss else tmp_path, tmp_path / "picture.png")
                drawn += 1
            except UserError as error:
                assert "metrics.jsonl" in str(error) or "expert_load" in str(error), (where, value)
    print(f"{tried} files of metrics, {drawn} drawn")
    assert 0 < drawn < tried


def test_a_name_is_text_and_leaves_room(tmp_path: Path) -> None:
    for name in (r"$\frac{", "x" * 250, "日本"):
        plot_loss({name: write_run(tmp_path / name, 3)}, tmp_path / "loss.png")
        assert min(size_of_png(tmp_path / "loss.png")) > 500
