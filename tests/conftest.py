"""Fixtures that every test may use."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moe_mamba.command_line import run_command
from moe_mamba.parallel.launcher import TORCH
from tests import ROOT

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, and runs it on CPU tensors then
pytest_plugins = [
    "tests.world",
    "tests.fixtures_of_runs",
    "tests.machines",
    "tests.rehearsal.process",
]  # a few gloo processes, shared by the session; small runs to look at; three machines
LAUNCH_VARIABLES = (*TORCH.values(), "MASTER_ADDR", "MASTER_PORT")
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real C4, Wikipedia and the GPT-2 vocabulary, where a checkout has them beside it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared/data folder beside this checkout")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _launch_forgotten() -> Iterator[None]:
    """Without the variables of a launcher that a command in this process fills in: libraries would believe them."""
    yield
    for name in LAUNCH_VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refusal(main, *flags)`: the line that a command ends with, as its user sees it, without a process of its own."""

    def call(main: Callable[..., None], *flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_command(main)
        said = capsys.readouterr()
        assert (stop.value.code, said.out) == (2, ""), said
        (line,) = said.err.splitlines()
        assert line.startswith("error: ")
        return line

    return call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; a test is slow or long, so that a mark picks what it says."""
    both = [item.nodeid for item in items if {"slow", "long"} <= item.keywords.keys()]
    if both:
        raise pytest.UsageError(f"slow and long at once: {', '.join(both)}")
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
