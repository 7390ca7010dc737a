"""Runs on synthetic tasks: trained, resumed, sharded and scored as runs on text are; and (long) the tasks learnt."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import evaluate as score
import generate
import pytest
import torch
import yaml

from moe_mamba.config_file import load_config
from moe_mamba.data.loader import evaluation_batches
from moe_mamba.data.synthetic import SyntheticTask
from moe_mamba.errors import UserError
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.metrics import read_metrics
from moe_mamba.run.restore import restore
from moe_mamba.train.corpora import open_corpora
from tests import ROOT
from tests.train.runs import curve, run, same_weights
from tests.world import World

STEPS = 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of a run on a task that takes two seconds."""
    config = {
        "model": {"pattern": "M", "repeat": 2, "d_model": 16, "d_state": 4, "vocab_size": 17},
        "data": {
            "train": ["synthetic:induction_heads:queries=4"],
            "validation": {
                "short": "synthetic:induction_heads:sequences=24",
                "long": "synthetic:induction_heads:sequences=6:length=64",
            },
            "tokenizer": "symbols",
            "sequence_length": 16,
        },
        "train": {"steps": STEPS, "global_batch": 8, "validate_every": 10, "sample_tokens": 4},
        "checkpoint": {"every": 10},
    }
    path = tmp_path_factory.mktemp("small") / "small.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(world: World, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done") / "run"
    run(world, small, folder)
    return folder


def test_a_run_measures_its_answers(done: Path) -> None:
    metrics = read_metrics(done)
    assert len(curve(metrics)) == STEPS
    validations = [line["validation"] for line in metrics if "validation" in line]
    assert [list(sets) for sets in validations] == [["short", "long"]] * 2
    restored = restore(done, torch.device("cpu"))
    for name, length, count in (("short", 16, 24), ("long", 64, 6)):
        found = validations[-1][name]
        task = SyntheticTask.parse("synthetic:induction_heads", 17)
        batch = next(evaluation_batches(task, length, count, 16, True))
        answers = batch.targets[:, -1]
        with torch.no_grad():
            guesses = restored.model(batch.tokens).logits[:, -1].argmax(-1)
        assert found["accuracy"] == pytest.approx(float((guesses == answers).double().mean()))
        assert found["bits_per_byte"] is None
    log = (done / "log.txt").read_text()
    assert "endless sequences to train on; short 24 sequences, long 6 sequences" in log
    assert ", accuracy " in log and "'The' is not a symbol" in log
    assert "--input synthetic:induction_heads:sequences=24" in log


def test_a_resumed_run_is_the_uninterrupted_one(world: World, small: Path, done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(world, small, folder)
    for file in sorted((folder / "checkpoints" / "step-00000020").rglob("*"), reverse=True):
        file.unlink()
    (folder / "checkpoints" / "step-00000020").rmdir()
    assert curve(run(world, small, folder)) == curve(read_metrics(done))
    same_weights(folder, done)


@pytest.mark.parametrize(("ranks", "tensor"), [(2, 1), (2, 2)])
def test_layouts_agree(world: World, small: Path, done: Path, tmp_path: Path, ranks: int, tensor: int) -> None:
    """Also on what is right: tensor-parallel ranks each have a part of the vocabulary."""
    metrics = run(world, small, tmp_path / "run", ranks=ranks, parallel__tensor=tensor)
    expected = read_metrics(done)
    assert curve(metrics) == pytest.approx(curve(expected), rel=1e-5)
    for line, other in zip(metrics, expected, strict=True):
        for name, scores in line.get("validation", {}).items():
            assert scores["accuracy"] == other["validation"][name]["accuracy"]
            assert scores["loss"] == pytest.approx(other["validation"][name]["loss"], rel=1e-5)


def test_without_selection_it_trains_and_generates(
    world: World, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    losses = curve(run(world, small, folder, model__selective=False))
    assert len(losses) == STEPS and losses[-1] < losses[0]
    capsys.readouterr()
    generate.main(str(folder), "3 15 2 4", max_new_tokens=3)
    assert capsys.readouterr().out.startswith("3 15 2 4")


def test_the_tool_scores_tasks_at_any_length(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score.main(str(done), "synthetic:induction_heads:sequences=6", sequence_length=64, json=True)
    expected = read_metrics(done)[-1]["validation"]["long"]
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 6
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    with pytest.raises(UserError, match="choose among synthetic:induction_heads"):
        score.main(str(done), "synthetic:sorting")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.train": "synthetic:induction_heads,synthetic:selective_copying"}, "must be the only source"),
        ({"data.train": "synthetic:selective_copying"}, "sequences of 16 tokens cannot hold the task: give 32 or more"),
        ({"data.tokenizer": "bytes", "model.vocab_size": 257}, "set data.tokenizer=symbols"),
        ({"data.validation": "synthetic:induction_head"}, "no such task"),
    ],
)
def test_runs_that_make_no_sense_end_before_they_begin(
    small: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError) as error:
        open_corpora(load_config(small, changes), folder, print)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("task", ["induction_heads", "selective_copying"])
def test_the_shipped_configs_solve_their_tasks_by_selection(task: str, selective: bool, tmp_path: Path) -> None:
    """About 2.5 minutes for induction heads and 10 for copying, on one core."""
    command = [sys.executable, "launch/train.py", f"--config=configs/synthetic/{task}.yaml"]
    command += [f"--run.folder={tmp_path}", f"--model.selective={str(selective).lower()}"]
    begin = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    minutes = (time.monotonic() - begin) / 60
    validation = read_metrics(tmp_path)[-1]["validation"]
    accuracy = {int(name): scores["accuracy"] for name, scores in validation.items()}
    print(f"{task}, selective={selective}: {accuracy} after {minutes:.1f} minutes")
    trained = accuracy[load_config(ROOT / f"configs/synthetic/{task}.yaml").data.sequence_length]
    longest = max(accuracy)
    assert longest == {"induction_heads": 16384, "selective_copying": 256}[task]
    if not selective:  # it learns the trained length's spacing at best, and no other's
        assert accuracy[longest] < 0.3
        assert task == "induction_heads" or trained < 0.7
    elif task == "induction_heads":
        assert min(accuracy.values()) >= 0.99
    else:
        assert trained >= 0.99
