"""A signal that comes while a command still imports its libraries."""

import subprocess
import sys

import pytest

from tests import ROOT

STARTING = """
import os, signal
from moe_mamba.faults.signals import end_before_the_run
end_before_the_run()
try:
    os.kill(os.getpid(), signal.{name})
except Exception:
    pass
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_it_ends_the_process_in_one_line(name: str) -> None:
    command = [sys.executable, "-c", STARTING.format(name=name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 143
    assert done.stderr == f"error: stopped by {name} before the run began: nothing is lost\n"
