"""The wheel, installed elsewhere: the command and the configurations that a user without a checkout needs."""

import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moe_mamba.__main__ import COMMANDS
from moe_mamba.run.metrics import read_metrics
from tests import ROOT
from tests.train.runs import STEPS, curve

pytestmark = pytest.mark.slow  # a wheel is built and installed

PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "moe_mamba", "configs")


def _pip(folder: Path, *command: str) -> None:
    """pip in `folder`, without a network."""
    line = [sys.executable, "-m", "pip", *command, "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pip wheel .`` makes of a copy of the checkout, in which nothing is left from an earlier build."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    _pip(source, "wheel", ".", "--no-build-isolation", "--wheel-dir=wheels")
    (file,) = (source / "wheels").iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds only the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    _pip(target, "install", str(wheel), f"--target={target}")
    return target


def _call(installed: Path, folder: Path, *command: str) -> str:
    """What a command prints, run in `folder` with nothing of the checkout in reach."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_every_config_and_source_and_nothing_beside_the_package(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    configs = {f"moe_mamba/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "moe_mamba").rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    }
    assert len(configs) > 10
    assert names == configs | sources


def test_one_command_names_every_other(installed: Path, tmp_path: Path) -> None:
    files = {path.stem for path in (ROOT / "moe_mamba" / "commands").glob("*.py")} - {"__init__"}
    assert files == COMMANDS.keys()
    shown = _call(installed, tmp_path, str(installed / "bin" / "moe-mamba"), "--help")
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_a_config_that_ships_is_found_by_its_name(installed: Path, tmp_path: Path) -> None:
    line = str(installed / "bin" / "moe-mamba"), "plan", "--config=configs/paper/moe_mamba_25m.yaml"
    assert "ME x 8" in _call(installed, tmp_path, *line)


def test_it_trains_and_generates(installed: Path, tiny: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "moe-mamba")
    shown = _call(installed, tmp_path, command, "train", f"--config={tiny}", "--run.folder=run")
    assert "next      moe-mamba generate --checkpoint run --prompt 'The'" in shown
    assert len(curve(read_metrics(tmp_path / "run"))) == STEPS
    written = _call(installed, tmp_path, command, "generate", "--checkpoint=run", "--prompt=1", "--max_new_tokens=2")
    assert written.startswith("1")


def _free_port() -> int:
    with socket.socket() as kernel:
        kernel.bind(("127.0.0.1", 0))
        return kernel.getsockname()[1]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_every_launcher_finds_the_module(installed: Path, tiny: Path, tmp_path: Path, launcher: str) -> None:
    flags = {
        "deepspeed": ["--num_gpus=2", f"--master_port={_free_port()}", "--module"],
        "torchrun": ["--standalone", "--nproc-per-node=2", "-m"],
    }[launcher]
    line = [str(Path(sys.executable).parent / launcher), *flags, "moe_mamba.commands.train"]
    assert "2 x cpu" in _call(installed, tmp_path, *line, f"--config={tiny}", "--run.folder=run")
    assert len(curve(read_metrics(tmp_path / "run"))) == STEPS
