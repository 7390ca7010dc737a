"""A table whose runs are stopped and killed ends with the same bits as one that nobody disturbed; and its start."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.train.runs import same_weights

FLAGS = ["--table=lr", "--only=rate_0.5,rate_1", "--tokens=327680", "--seeds=1", "--data.tokenizer=bytes"]
RUNS = ("runs_50/rate_0.5/seed1", "runs_50/rate_1/seed1")  # an early look: half the tokens
SPEEDS = ("tokens_per_second", "tflops", "pace")


def _start(folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "tools/reproduce.py", *FLAGS, f"--output={folder}"]
    with (folder.parent / "screen.txt").open("ab") as screen:
        return subprocess.Popen(
            words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=screen, stderr=screen
        )


def _step(folder: Path) -> int:
    path = folder / RUNS[0] / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


def _figures(folder: Path, run: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]


@pytest.mark.long
def test_stopped_and_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    assert _start(tmp_path / "plain").wait() == 0
    disturbed = tmp_path / "disturbed"
    for number, step in ((signal.SIGTERM, 10), (signal.SIGKILL, 20)):
        tool = _start(disturbed)
        while _step(disturbed) < step:
            assert tool.poll() is None
            time.sleep(0.1)
        runs = psutil.Process(tool.pid).children(recursive=True)
        for run in runs if number == signal.SIGKILL else ():
            run.kill()
        tool.send_signal(number)
        assert tool.wait() == (143 if number == signal.SIGTERM else -signal.SIGKILL)
        assert not psutil.wait_procs(runs, timeout=60)[1], "a run goes on without the tool"
    assert _start(disturbed).wait() == 0
    for run in RUNS:
        same_weights(disturbed / run, tmp_path / "plain" / run)
        assert _figures(disturbed, run) == _figures(tmp_path / "plain", run)
    rows = [json.loads((path / "lr-v1/table.json").read_text())["rows"] for path in (tmp_path / "plain", disturbed)]
    for name in ("rate_0.5", "rate_1"):
        assert rows[0][name]["loss"] == rows[1][name]["loss"]
    assert "stopped by SIGTERM" in (tmp_path / "screen.txt").read_text()


@pytest.mark.long
def test_a_dead_tool_takes_its_runs_along(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process of its parent's death")
    tool = _start(tmp_path / "out")
    while _step(tmp_path / "out") < 10:
        assert tool.poll() is None
        time.sleep(0.1)
    runs = psutil.Process(tool.pid).children(recursive=True)
    tool.kill()
    assert not psutil.wait_procs(runs, timeout=120)[1]
    events = (tmp_path / "out" / RUNS[0] / "events.jsonl").read_text()
    assert "stopped by SIGTERM" in events
