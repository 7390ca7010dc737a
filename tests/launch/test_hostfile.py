"""launch/hostfile.example as DeepSpeed reads it, and its launcher without ssh, with the lines of docs/clusters.md."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from moe_mamba.run.metrics import read_metrics
from tests import ROOT
from tests.train.runs import STEPS, curve
from tests.world import free_port


def test_deepspeed_reads_the_example() -> None:
    assert fetch_hostfile(str(ROOT / "launch" / "hostfile.example")) == {"node1": 8, "node2": 8}


@pytest.mark.slow
def test_the_pages_lines_without_ssh_train_on_two_machines(tiny: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "clusters.md").read_text()
    lines = re.findall(r"(?m)^deepspeed .*--no_ssh .*$", page)
    assert len(lines) == 2
    hosts, folder = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    here = {
        "launch/hostfile.example": str(hosts),
        "node1": "localhost",
        "29500": str(free_port()),
        "configs/paper/moe_mamba_100m.yaml": str(tiny),
        "runs/site": str(folder),
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    processes = []
    for line in lines:
        for there, place in here.items():
            assert there in line
            line = line.replace(there, place)
        command, pipe = shlex.split(line), subprocess.PIPE
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 x cpu" in outputs[0]
    assert len(curve(read_metrics(folder))) == STEPS
