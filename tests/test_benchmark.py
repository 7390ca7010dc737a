"""The benchmark tool runs, with tiny shapes; figures are never looked at, for they depend on the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def benchmark(*flags: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/benchmark.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_table_and_json(tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text(json.dumps({"text": "some text"}) + "\n", encoding="utf-8")
    inputs = (f"--documents={tmp_path / 'documents.jsonl'}", "--tokenizer=bytes")
    done = benchmark("--tiny", "--repeats=1", *inputs, f"--output={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| what | against | ours | theirs | ratio | goal |")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    measured = {"scan", "training step", "MoE layer", "weak scaling", "preprocessing"}
    assert {row["what"].split(",")[0] for row in rows} == measured
    assert all(row["ours"] > 0 and row["theirs"] > 0 and row["ratio"] > 0 for row in rows)
    assert done.stdout.count("\n") == len(rows) + 2
    alone, two = (row for row in rows if row["what"].startswith("weak scaling"))
    assert alone["collectives"] == {} and "1 process, " in alone["what"]
    assert set(two["collectives"]) == {"all-reduce", "all-gather", "all-to-all"}
    assert min(two["collectives"].values()) > 0 and sum(two["collectives"].values()) < 1
    assert "2 processes, " in two["what"] and two["goal"] == min(1, two["cores"] / 2)


@pytest.mark.long
def test_preprocessing_of_the_built_in_corpus() -> None:
    done = benchmark("--tiny", "--repeats=1", "--only=preprocess")
    assert done.returncode == 0, done.stderr
    assert "| preprocessing, " in done.stdout


def test_unknown_row_is_one_line() -> None:
    done = benchmark("--only=speed")
    assert done.returncode == 2
    known = "scan, step, moe, scaling, preprocess"
    assert done.stderr == f"error: --only=speed: no row is called 'speed': choose among {known}\n"
