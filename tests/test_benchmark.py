"""The benchmark tool runs, with tiny shapes; figures are never looked at, for they depend on the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark import main

from benchmarks import before
from benchmarks.designs import DesignShapes, active, model_of
from benchmarks.gpu_clock import Rates
from benchmarks.pairs import Absent, median_interval, pair_row, peer, table
from moe_mamba.errors import RunStopped, UserError
from tests import ROOT

WITH_STAND_INS = """
import pytest, benchmark
from tests.kernels import stand_ins
stand_ins.install(pytest.MonkeyPatch())
benchmark.main(only="gpu_scan,gpu_conv,gpu_moe,gpu_step,gpu_profile", tiny=True, repeats=1, output={output!r})
"""


def run(*command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "tools", "tests"))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def benchmark(*flags: str) -> subprocess.CompletedProcess:
    return run("tools/benchmark.py", *flags)


GENERATION = {
    "reading 32 tokens",
    "decoding 2 tokens of 1 sequence",
    "decoding 2 tokens of 2 sequences",
    "decoding 2 tokens of 1 sequence in bf16",
}
GENERATION |= {"8 tokens after 64", "states after 64 tokens"}
DESIGNS = {"parallel layers", "Routing Mamba"}
HEAD = {"head", "head in a training step"}
ALL = (
    {"scan", "training step", "training step in bf16", "MoE layer", "weak scaling", "plan of a step", "preprocessing"}
    | HEAD
    | GENERATION
    | DESIGNS
)


@pytest.mark.parametrize(
    ("flags", "measured"),
    [
        # Processes that import torch again take most of the time: of the rows that start some, one.
        pytest.param(
            ("--only=head,prefill,decode,context,profile,designs,scaling",),
            {"weak scaling"} | HEAD | GENERATION | DESIGNS,
            marks=pytest.mark.slow,
        ),
        pytest.param((), ALL, marks=pytest.mark.long),
    ],
    ids=["quick", "whole"],
)
def test_table_and_json(flags: tuple[str, ...], measured: set[str], tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text(json.dumps({"text": "some text"}) + "\n", encoding="utf-8")
    inputs = (f"--documents={tmp_path / 'documents.jsonl'}", "--tokenizer=bytes")
    done = benchmark("--tiny", "--repeats=1", *flags, *inputs, f"--output={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| what | against | ours | theirs | ratio | goal |")
    content = json.loads((tmp_path / "rows.json").read_text())
    rows = content["rows"]
    assert {row["what"].split(",")[0] for row in rows} == measured
    assert all(row["ours"] > 0 for row in rows)
    compared = [row for row in rows if not row["skipped"]]
    assert all(row["theirs"] > 0 and row["ratio"] > 0 for row in compared)
    assert {row["against"] for row in rows if row["skipped"]} <= {
        "mamba.py's parallel scan",
        "torch's linear_cross_entropy",
    }
    tables = done.stdout.strip().split("\n\n")
    assert tables[0].count("\n") == len(rows) + 1
    profile, routed, dense = content["profiles"]
    assert {"scan", "convolution", "matrix products", "experts", "routing", "norms", "optimizer"} <= set(
        profile["operations"]
    )
    assert all(f"| {operation} | " in tables[1] for operation in profile["operations"])
    assert {"experts", "routing"} <= set(routed["operations"]) - set(dense["operations"])
    single, two = (row for row in rows if row["what"].startswith("weak scaling"))
    assert single["collectives"] == {} and "1 process, " in single["what"]
    assert set(two["collectives"]) == {"all-reduce", "all-gather", "all-to-all"}
    assert min(two["collectives"].values()) > 0 and sum(two["collectives"].values()) < 1
    assert "2 processes, " in two["what"] and two["goal"] == min(1, two["cores"] / 2)


@pytest.mark.long
def test_the_plan_beside_steps(tmp_path: Path) -> None:
    done = benchmark("--tiny", "--only=plan", f"--output={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["what"].split(", ")[1] for row in rows] == ["one process", "expert 2"]
    for row in rows:
        assert row["ours"] == pytest.approx(sum(row["parts"].values()))
        assert row["spread"][0] <= row["theirs"] <= row["spread"][1]
    assert "inside" in rows[1]["parts"] and "inside" not in rows[0]["parts"]


@pytest.mark.slow
def test_rows_of_a_gpu_against_stand_ins(tmp_path: Path) -> None:
    done = run("-c", WITH_STAND_INS.format(output=str(tmp_path / "rows.json")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| what | against | ours | theirs | ratio | goal | floor |")
    content = json.loads((tmp_path / "rows.json").read_text())
    measured = {"scan", "convolution", "MoE layer", "training step"}
    assert {row["what"].split(",")[0] for row in content["rows"]} == measured
    for row in content["rows"]:
        assert row["ours"] > 0 and row["theirs"] > 0 and row["floor"] > 0 and not row["skipped"]
        assert row["floor_of"] in ("bytes", "operations")
    assert content["profiles"][0]["operations"]["scan"] > 0


def test_an_absent_peer_is_a_gap() -> None:
    def theirs() -> None:
        peer("fast_scan.interface", "scan", "fast-scan", "cuda")

    row = pair_row("scan", "fast-scan", lambda: None, theirs, 1, 1.5, floor=(0.25, "bytes"))
    assert row.theirs is None and row.ratio is None and row.ours >= 0
    assert "| skipped: fast-scan is not installed: pip install -e '.[cuda]' |  | 1.5 | 0.25 ms (bytes) |" in table(
        [row]
    )
    with pytest.raises(Absent, match=r"^json does not load: module 'json' has no attribute 'none'$"):
        peer("json", "none", "json")


def test_a_peer_that_does_not_fit_is_a_gap() -> None:
    def theirs() -> None:
        raise torch.OutOfMemoryError

    assert pair_row("step", "peer", lambda: None, theirs, 1, 1).skipped == "does not fit into the GPU's memory"


def test_interval_of_a_median_is_the_sign_test() -> None:
    values = [float(value) for value in range(20, 0, -1)]
    assert median_interval(values) == (6.0, 15.0)  # tabulated: 95.9 %
    assert median_interval(values[:9]) == (13.0, 19.0)  # 96.1 %
    assert median_interval(values[:6]) == (15.0, 20.0)  # 96.9 %
    assert median_interval(values[:5]) is None and median_interval([]) is None
    row = pair_row("step", "peer", lambda: None, lambda: lambda: None, 6, 1)
    assert row.interval is not None and row.ratio is not None
    assert row.interval[0] <= row.ratio <= row.interval[1]
    assert "| goal | 95 % |" in table([row]) and " to " in table([row])


def test_designs_that_are_compared_have_the_same_active_parameters() -> None:
    for shapes in (DesignShapes(), DesignShapes.choose(tiny=True)):
        routed, dense = model_of(shapes, "M", 1, inner=True), model_of(shapes, "M", 1, dt_rank=shapes.dense_dt_rank)
        assert active(routed) == active(dense)


def test_floor() -> None:
    rates = Rates(bytes_per_second=2e12, bf16_flops=4e14, fp32_flops=5e13)
    assert rates.floor(4e9, 5e10) == (2.0, "bytes")
    assert rates.floor(1e9, 5e10) == (1.0, "operations")
    assert rates.floor(1e9, 8e11, in_bf16=True) == (2.0, "operations")


@pytest.mark.gpu
def test_rows_of_a_gpu() -> None:
    done = benchmark("--device=cuda", "--only=gpu_conv", "--repeats=1")
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_preprocessing_of_the_built_in_corpus() -> None:
    done = benchmark("--tiny", "--repeats=1", "--only=preprocess")
    assert done.returncode == 0, done.stderr
    assert "| preprocessing, " in done.stdout


OLDER = {
    "command_line.py": "def run_command(main):\n    main()\n",
    "run/metrics.py": "class MetricsWriter:\n    def write(self, line):\n        print(line)\n",
    "commands/train.py": """
import sys, time
from moe_mamba.run.metrics import MetricsWriter
def main():
    folders = [argument for argument in sys.argv if argument.startswith("--run.folder=")]
    assert len(folders) == 1 and "--model.pattern=ME" in sys.argv
    for step in range(10**6):
        until = time.process_time() + SECONDS
        while time.process_time() < until:
            pass
        MetricsWriter().write({"step": step})
""",
}


def older(folder: Path, seconds: float) -> Path:
    """A checkout whose step takes so many seconds of the processor."""
    for name, text in OLDER.items():
        path = folder / "moe_mamba" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("SECONDS", str(seconds)), encoding="utf-8")
    return folder


def test_older_code_is_measured_in_turns_each_with_its_own_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before, "ROOT", older(tmp_path / "ours", 0.02))
    theirs = older(tmp_path / "theirs", 0.04)
    rows = before.step_rows(theirs, before.BeforeShapes.choose(tiny=True), 1)
    time, memory = before.head_rows(theirs, before.BeforeShapes.choose(tiny=True), 1)
    for row in (*rows, time):
        assert row.unit == "ms" and row.ours == pytest.approx(20, rel=0.3) and row.ratio == pytest.approx(2, rel=0.3)
        assert row.interval is not None and row.interval[0] <= row.ratio <= row.interval[1]
    assert memory.unit == "MiB" and memory.ours == pytest.approx(memory.theirs, rel=0.2)
    (started,) = before.startup_rows(older(theirs, 0.5), 1)
    assert started.ours < 500 < started.theirs and started.ratio > 1.5  # Python's own start is in both


def test_older_code_that_cannot_do_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "ROOT", older(tmp_path / "ours", 0.01))
    theirs = older(tmp_path / "theirs", 0.01)
    (theirs / "moe_mamba" / "run" / "metrics.py").write_text("")
    said = f"^the code in {theirs} does not do this: ImportError: cannot import name 'MetricsWriter'"
    with pytest.raises(RunStopped, match=said):
        before.step_rows(theirs, before.BeforeShapes.choose(tiny=True), 1)


@pytest.mark.slow
def test_this_checkout_against_itself() -> None:
    done = benchmark("--tiny", "--repeats=1", "--only=decode_before,head_before", f"--before={ROOT}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| the older checkout | ") == 4


@pytest.mark.long
def test_all_rows_of_this_checkout_against_itself() -> None:
    done = benchmark("--tiny", "--repeats=1", "--only=step_before,startup_before", f"--before={ROOT}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| the older checkout | ") == 3


def test_older_code_is_asked_for_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--only=step,head_before: head_before needs --before=FOLDER: make one with "):
        main(only="step,head_before")
    with pytest.raises(UserError, match=f"^--before={tmp_path} is no checkout of this project: make one with git "):
        main(only="head_before", before=str(tmp_path))
    with pytest.raises(
        UserError, match=r"^--before=.*: no row of --only=step needs it: leave it out, or choose step_before$"
    ):
        main(only="step", before=str(ROOT))


def test_unknown_row_is_one_line() -> None:
    known = "scan, step, head, prefill, decode, context, profile, moe, designs, scaling, plan, preprocess"
    known += ", step_before, decode_before, head_before, startup_before"
    with pytest.raises(UserError, match=f"^--only=speed: no row is called 'speed': choose among {known}$"):
        main(only="speed")


def test_no_gpu_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = benchmark("--device=cuda")
    assert done.returncode == 2
    assert done.stderr == "error: --device=cuda: torch finds no GPU: leave it out\n"
