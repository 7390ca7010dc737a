"""Transformers' Trainer: in two processes that ``accelerate launch`` starts, over micro-steps, and in bf16."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import ROOT

pytest.importorskip("accelerate")
pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")
from tests.hf.trainer_script import main

Pair = Callable[..., Any]
pytestmark = pytest.mark.long
PATTERNS = ["M", "ME", "MEM-*E"]
SCRIPT = Path(__file__).with_name("trainer_script.py")
# On machines without a GPU --multi_gpu is the way to start several processes (--cpu starts one, or MPI's), and port 0
# is any free one.
TWO = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


def _train(folder: Path, name: str, launcher: str | None = None, **keys: Any) -> tuple[dict[str, Tensor], list[float]]:
    """(weights, losses) after the script's steps: in this process, or in those that accelerate starts."""
    if launcher is None:
        main(folder, name, keys)
    else:
        _launch(launcher, str(folder), name, *(f"{key}={json.dumps(value)}" for key, value in keys.items()))
    result = json.loads((folder / name / "result.json").read_text())
    assert result["processes"] == (1 if launcher is None else 2)
    return torch.load(folder / name / "weights.pt", weights_only=True), result["losses"]


def _launch(launcher: str, *arguments: str) -> None:
    path = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    environment = os.environ | path | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher.split(), str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def _compare(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_two_processes_and_micro_steps_are_one_process_with_the_whole_batch(
    pair: Pair, tmp_path: Path, pattern: str
) -> None:
    """Texts have unlike numbers of labels, so a mean of means would differ: ``num_items_in_batch`` is their sum."""
    _, model = pair(pattern, {"router": "top_k", "top_k": 2})
    model.save_pretrained(tmp_path)
    steps = {"max_steps": 2, "learning_rate": 0.1}
    whole, losses = _train(tmp_path, "whole", **steps, per_device_train_batch_size=4)
    assert losses[1] < losses[0]
    initial = model.state_dict()
    assert max(float((whole[name] - initial[name]).abs().max()) for name in whole) > 1e-3

    parallel, parallel_losses = _train(tmp_path, "two", TWO, **steps, per_device_train_batch_size=2)
    _compare(whole, parallel)
    assert parallel_losses == pytest.approx(losses, rel=1e-5)

    accumulated, accumulated_losses = _train(
        tmp_path, "micro", **steps, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    _compare(whole, accumulated)
    assert accumulated_losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bf16_computes_in_16_bits_and_trains_weights_in_32(pair: Pair, tmp_path: Path, pattern: str) -> None:
    _, model = pair(pattern, {"router": "top_k", "top_k": 2})
    model.save_pretrained(tmp_path)
    steps = {"max_steps": 6, "learning_rate": 0.1, "per_device_train_batch_size": 8}
    exact, losses = _train(tmp_path, "fp32", **steps)
    mixed, mixed_losses = _train(tmp_path, "bf16", **steps, bf16=True)
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float32}
    assert mixed_losses == pytest.approx(losses, rel=2e-2) and mixed_losses != losses
    assert mixed_losses[-1] < mixed_losses[0] - 0.05
    initial = model.state_dict()
    for name, tensor in exact.items():
        moved = (tensor - initial[name]).norm()
        assert (mixed[name] - tensor).norm() < 0.1 * moved + 1e-4, name
