"""The benchmark tool runs, with tiny shapes; figures are never looked at, for they depend on the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def benchmark(*flags: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/benchmark.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_table_and_json(tmp_path: Path) -> None:
    done = benchmark("--tiny", "--repeats=1", f"--output={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| what | against | ours | theirs | ratio | goal |")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["what"].split(",")[0] for row in rows} == {"scan", "training step", "MoE layer", "preprocessing"}
    assert all(row["ours"] > 0 and row["theirs"] > 0 and row["ratio"] > 0 for row in rows)
    assert done.stdout.count("\n") == len(rows) + 2


def test_unknown_row_is_one_line() -> None:
    done = benchmark("--only=speed")
    assert done.returncode == 2
    assert done.stderr == "error: --only=speed: no row is called 'speed': choose among scan, step, moe, preprocess\n"
