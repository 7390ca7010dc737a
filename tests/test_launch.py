"""The commands as a user types them, in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import evaluate as score
import generate
import pytest

from moe_mamba.config import Config
from moe_mamba.config_model import InnerConfig
from moe_mamba.run.metrics import read_metrics
from tests import ROOT
from tests.train.runs import STEPS, curve
from tests.world import free_port

# Each step multiplies every weight by 1 - rate x decay.
DIVERGING = ("--train.learning_rate=100", "--train.weight_decay=1000", "--train.decay_all=true")
BIN = Path(sys.executable).parent


def call(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout, as installed with `pip install -e .`; at most two minutes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )


def test_help_lists_every_key_with_default_and_meaning() -> None:
    done = call(sys.executable, "launch/train.py", "--help")
    assert done.returncode == 0
    for section, field in Config.model_fields.items():
        for name, key in field.annotation.model_fields.items():  # type: ignore[union-attr]
            if (section, name) != ("moe", "inner"):
                assert f"--{section}.{name}=" in done.stdout
                assert key.description in done.stdout
    for name, key in InnerConfig.model_fields.items():
        assert f"--moe.inner.{name}=" in done.stdout
        assert key.description in done.stdout


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--model.d_mode=3", "did you mean model.d_model?"),  # before any library is loaded
        ("--data.train=nowhere.jsonl", "nowhere.jsonl"),  # after that
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny: Path, tmp_path: Path, argument: str, named: str) -> None:
    done = call(sys.executable, "launch/train.py", f"--config={tiny}", f"--run.folder={tmp_path / 'run'}", argument)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "launcher",
    [
        [str(BIN / "deepspeed"), "--num_gpus=2", "--master_port={port}"],
        pytest.param([str(BIN / "torchrun"), "--nproc-per-node=2", "--master-port={port}"], marks=pytest.mark.slow),
    ],
    ids=["deepspeed", "torchrun"],
)
def test_every_launcher_trains_on_two_processes(tiny: Path, tmp_path: Path, launcher: list[str]) -> None:
    folder = tmp_path / "run"
    launcher = [part.format(port=free_port()) for part in launcher]
    done = call(*launcher, "launch/train.py", f"--config={tiny}", f"--run.folder={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu" in done.stdout
    assert len(curve(read_metrics(folder))) == STEPS


@pytest.mark.slow
def test_two_launchers_at_once_take_ports_of_their_own(tiny: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        train = (str(BIN / "deepspeed"), "--num_gpus=2", "launch/train.py", f"--config={tiny}")
        folders = [tmp_path / name for name in ("one", "other")]
        both = [pool.submit(call, *train, f"--run.folder={folder}") for folder in folders]
        for done, folder in zip([one.result() for one in both], folders, strict=True):
            assert done.returncode == 0, done.stdout + done.stderr
            assert len(curve(read_metrics(folder))) == STEPS


@pytest.mark.slow
def test_a_diverged_run_ends_in_one_line_and_the_same_line_trains_at_a_lower_rate(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = sys.executable, "launch/train.py", f"--config={tiny}", f"--run.folder={folder}", "--checkpoint.every=1"
    done = call(*line, *DIVERGING)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the loss is nan at step 2; the first bad value is in the output of ")
    assert done.stderr.endswith("; the same command then starts over\n")
    assert done.stderr.count("\n") == 1
    done = call(*line, "--train.learning_rate=1e-3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step-00000001 has diverged (step 2: loss nan): there is no older one\n" in done.stdout
    assert len(curve(read_metrics(folder))) == STEPS


@pytest.mark.slow
def test_the_launcher_passes_exit_code_2_through(tiny: Path, tmp_path: Path) -> None:
    done = call(
        str(BIN / "deepspeed"),
        "--num_gpus=2",
        f"--master_port={free_port()}",
        "launch/train.py",
        f"--config={tiny}",
        f"--run.folder={tmp_path / 'run'}",
        "--data.train=nowhere.jsonl",
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: ") == 1


@pytest.mark.slow
def test_the_screen_says_that_kernels_are_built_and_what_a_missing_one_costs(tiny: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo a compiler && exit\necho error: broken >&2\nexit 1\n')
    compiler.chmod(0o755)
    done = call(
        sys.executable, "launch/train.py", f"--config={tiny}", f"--run.folder={tmp_path / 'run'}", "--train.steps=2",
        CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    screen = done.stdout + done.stderr
    assert screen.count(f"building the C++ kernels (once, a few seconds): {tmp_path}") == 1
    assert "warning   selective_scan's back end 'cpu' cannot run here: the C++ compiler failed: error: broken" in screen
    assert "without it the scan takes three times as long" in screen
    assert "kernels   torch: selective_scan" in screen


@pytest.mark.slow
def test_a_broken_run_is_one_line_and_exit_code_1(tiny: Path, tmp_path: Path) -> None:
    done = call(
        sys.executable,
        "launch/train.py",
        f"--config={tiny}",
        f"--run.folder={tmp_path / 'run'}",
        *DIVERGING,
    )
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "error: " in line] == done.stderr.splitlines()
    assert "at step" in done.stderr


def test_generation_and_evaluation_of_a_run(
    plain: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "generate.py"), f"--checkpoint={plain}", "--prompt=1, 2 (plus)"]
    once = call(*tool, "--max_new_tokens=12", "--seed=3", "--json")
    assert once.returncode == 0, once.stderr
    written = json.loads(once.stdout)
    assert written["text"].startswith("1, 2 (plus)")
    generate.main(str(plain), "1, 2 (plus)", max_new_tokens=12, seed=3)
    assert capsys.readouterr().out == written["text"] + "\n"

    tool = [sys.executable, "tools/evaluate.py", f"--checkpoint={plain}", f"--input={corpus / 'validation.jsonl'}"]
    done = call(*tool, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    expected = next(line["validation"]["validation"] for line in reversed(read_metrics(plain)) if "validation" in line)
    assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert scores["accuracy"] == pytest.approx(expected["accuracy"])
    assert scores.keys() == {"loss", "perplexity", "bits_per_byte", "accuracy", "tokens"}

    (tmp_path / "text.txt").write_text("3 plus 3 is 6; twice that is 12.")
    for source in (tmp_path / "text.txt", next((corpus / "cache").glob("*/manifest.json")).parent):
        score.main(str(plain), str(source))
        assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize(("tool", "flag"), [(generate, "--prompt=a"), (score, "--input=a.txt")])
def test_a_missing_checkpoint_is_one_line(refusal: Callable[..., str], tool: Any, flag: str, tmp_path: Path) -> None:
    assert "nowhere" in refusal(tool.main, f"--checkpoint={tmp_path / 'nowhere'}", flag)
