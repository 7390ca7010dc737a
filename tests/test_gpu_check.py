"""The check on a GPU runs whole on a CPU, with tiny sizes; its figures mean nothing there."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu_clock import Rates
from gpu_check import kernels, training
from gpu_check.__main__ import main
from gpu_check.report import finite, markdown
from gpu_check.sections import GRACE, SECTIONS, Result, Section, run_section
from moe_mamba.errors import UserError
from tests import ROOT


def check(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        ["tools/gpu_check.sh", *flags], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )


QUICK = ("kernels", "gpu_conv", "training")  # test_benchmark.py runs the other rows


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, marks=pytest.mark.slow),
        pytest.param(tuple(one.name for one in SECTIONS), marks=pytest.mark.long),
    ],
    ids=["quick", "whole"],
)
def test_the_check(names: tuple[str, ...], tmp_path: Path) -> None:
    done = check("--device=cpu", "--tiny", f"--only={','.join(names)}", OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr + (tmp_path / "gpu_check.md").read_text()
    assert done.stdout == f"report: {tmp_path / 'gpu_check.md'}\n"
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [section["name"] for section in content["sections"]] == list(names)
    assert {section["outcome"] for section in content["sections"]} == {"passed"}
    data = {section["name"]: section["data"] for section in content["sections"]}
    assert all(row["passed"] for row in data["kernels"]["rows"])
    assert {row["dtype"] for row in data["kernels"]["rows"]} == {"float32", "bfloat16", "float16"}
    assert data["training"]["tokens_per_second"] > 0 and len(data["training"]["losses"]) == 3
    report = (tmp_path / "gpu_check.md").read_text()
    for shown in ("| selective_scan, plain | torch | bfloat16 |", "| floor |", "| MFU against the measured rate |"):
        assert shown in report
    if names != QUICK:
        assert "| matrix products | " in report and " passed" in report


def test_the_limits_stay_under_nine_minutes() -> None:
    assert sum(section.limit for section in SECTIONS) + GRACE < 9 * 60


def section(code: str, limit: int = 60, **changes: tuple[str, ...]) -> Section:
    return replace(Section("one", "One", limit, ("-c", code), (), ()), **changes)


def test_a_section_that_fails_is_reported(tmp_path: Path) -> None:
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"figure\": 1}'); print('x\\ry'); sys.exit(3)"
    one = Section("one", "One", 60, ("-c", code, "{output}"))
    result = run_section(one, ROOT, "cpu", False, tmp_path)
    assert (result.outcome, result.data, result.log) == ("failed", {"figure": 1}, ["y"])


def test_a_section_out_of_time_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); "
        "time.sleep(60)"
    )
    result = run_section(section(code, limit=2), ROOT, "cpu", False, tmp_path)
    assert result.outcome == "out of time" and result.seconds < 10
    for _ in range(50):  # a signal takes a moment
        if not runs(int(result.log[0])):
            return
        time.sleep(0.1)
    pytest.fail("what the section started still runs")


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_section_without_its_package_is_skipped(tmp_path: Path) -> None:
    result = run_section(section("", needs=("no_such_package",)), ROOT, "cpu", False, tmp_path)
    assert result.outcome == "skipped: no_such_package is not installed"
    assert "Skipped: no_such_package is not installed." in markdown({}, [result])


def test_the_report_shows_what_went_wrong() -> None:
    rows = [
        kernels.Compared("scan", "triton", "float32", 0.5, "gradient of A", 1e-5),
        kernels.Compared("scan", "vendor", "float32", 0.0, "", 1e-5, refused="takes no document_starts"),
        kernels.Compared("scan", "cpu", "float32", 0.0, "", 1e-5, broken="RuntimeError: a\nb"),
    ]
    assert [row.passed for row in rows] == [False, True, False]
    data = {"rows": [vars(row) | {"passed": row.passed} for row in rows]}
    text = markdown({"torch": "2.11"}, [Result("kernels", "Kernels", "failed", 3.0, data, ["the last line"])])
    assert "- torch: 2.11" in text and "| Kernels | failed | 3 |" in text and "```\nthe last line\n```" in text
    assert "| scan | triton | float32 | 5.0e-01 **too large** | 1e-05 | gradient of A |" in text
    assert "| scan | vendor | float32 | refused |  | takes no document_starts |" in text
    assert "| scan | cpu | float32 | **broken** |  | RuntimeError: a |" in text


def test_a_broken_kernel_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(named: kernels.Named, backend: str) -> torch.Tensor:
        if backend == "torch":
            raise RuntimeError("broken")
        return named["x"] * (1 if backend == "reference" else float("nan"))

    case = kernels.Case("causal_conv", "plain", {"x": torch.ones(3, dtype=torch.float64)}, call)
    compared = {row.backend: row for row in kernels.compare(case, "cpu") if row.dtype == "float32"}
    assert compared["torch"].broken == "RuntimeError: broken"
    assert all(not row.passed for row in compared.values())


def test_mfu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": n, "loss": 5.0 - n, "tokens_per_second": 1.0 if n == 1 else 2e5} for n in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = training.figures(tmp_path, training.corpus(), Rates(3e12, 8e14, 5e13), 2**30, 60.0, "cuda")
    used = found["flops_per_token"] * 2e5
    assert found["shown"]["MFU against the measured rate"] == f"{used / 8e14:.1%} of 800.0 TFLOP/s"
    assert found["shown"]["MFU against the data sheet"] == f"{used / 989e12:.1%} of 989 TFLOP/s"
    assert found["shown"]["peak memory"] == "1.0 GiB"
    # The paper's 25M: 26.3 M active parameters and the head's 25.7 M, six operations each, and the scan's own.
    assert 6 * (26.2e6 + 25.7e6) < found["flops_per_token"] < 1.1 * 6 * (26.4e6 + 25.8e6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"device": "cpu"}, "--device=cpu is for trying the sections: add --tiny"),
        ({"only": "speed"}, "--only=speed: no section is called 'speed': choose among kernels, tests, gpu_scan"),
    ],
)
def test_bad_input(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        main(**flags)


def test_no_gpu_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = check()
    assert done.returncode == 2
    fix = "run this on a machine that has one, or give --device=cpu --tiny"
    assert done.stderr == f"error: torch finds no GPU: {fix}\n"


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ([5.0, 5.5, 4.9], None),
        ([10.8, 9.0, math.nan], "the loss did not fall: 10.8 -> nan"),
        ([10.8, math.inf, 4.0], "the loss did not fall: 10.8 -> inf"),
        ([10.8] * 20 + [10.9] * 20, "the loss did not fall: 10.8 -> 10.9"),
        ([], "the loss did not fall: the run took no step"),
    ],
)
def test_a_loss_that_does_not_fall_is_a_fault(curve: list[float], said: str | None) -> None:
    assert training.fault(curve) == said


def test_losses_that_are_nan_or_inf() -> None:
    curve = training.losses([{"loss": 2.0, "tokens_per_second": 1.0}, {"loss": None, "tokens_per_second": 1.0}, {}])
    assert curve[0] == 2.0 and math.isnan(curve[1]) and len(curve) == 2
    assert finite({"losses": curve, "steps": 2, "shown": "nan"}) == {"losses": [2.0, None], "steps": 2, "shown": "nan"}


def test_a_user_error_is_no_failure() -> None:
    def call(named: kernels.Named, backend: str) -> torch.Tensor:
        if backend != "reference":
            raise UserError("takes no x: choose auto")
        return named["x"]

    case = kernels.Case("causal_conv", "plain", {"x": torch.ones(3, dtype=torch.float64)}, call)
    assert {row.refused for row in kernels.compare(case, "cpu")} == {"takes no x: choose auto"}
