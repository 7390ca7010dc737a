"""The C++ kernels' library: built once, never in the way of a run that cannot have it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import psutil
import pytest

from moe_mamba.kernels import extension, requirements
from tests import ROOT

Build = Callable[[], str | None]
PROGRAM = "from moe_mamba.kernels.extension import build; print(build())"
# a warning's text, then a scan's sum: what a user without a compiler gets
SCAN = """
import torch
from moe_mamba.kernels import selective_scan
wide, narrow = torch.ones(1, 3, 2), torch.ones(1, 3, 4)
print(selective_scan(wide, wide, -torch.ones(2, 4), narrow, narrow, torch.ones(2))[0].sum().isfinite().item())
"""
QUICKLY = 'exec c++ "$@" -O0'
needs_compiler = pytest.mark.skipif(requirements.cpu() is not None, reason=f"{requirements.cpu()}")


def start(cache: Path, program: str = PROGRAM, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**variables, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """``build`` as a process that starts calls it, with a cache and a compiler of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    monkeypatch.setattr(extension, "library", cache(extension.library.__wrapped__))
    return extension.build.__wrapped__


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.strip(), errors


def write_compiler(folder: Path, script: str) -> str:
    """A compiler that answers to --version, and otherwise does what the script says."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo a compiler && exit\n{script}\n')
    path.chmod(0o755)
    return str(path)


def test_no_compiler_is_one_warning_and_the_torch_version(tmp_path: Path) -> None:
    output, errors = finish(start(tmp_path, SCAN, PATH=""))
    assert output == "True" and "Traceback" not in errors
    assert errors.count("no C++ compiler was found (c++): install g++") == 1
    assert "without it the scan takes three times as long" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_compiler
def test_processes_that_start_at_once_build_once_and_a_killed_build_is_no_obstacle(
    fresh: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = write_compiler(tmp_path, "exec sleep 10")
    killed = start(tmp_path, CXX=compiler)
    assert killed.stderr is not None and "building the C++ kernels (once, a few seconds)" in killed.stderr.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    (folder,) = (tmp_path / "moe_mamba" / "kernels").iterdir()
    (folder / "moe_mamba_kernels.so").write_bytes(b"truncated")
    write_compiler(tmp_path, QUICKLY)  # the same name and answer: the same folder

    both = [start(tmp_path, CXX=compiler) for _ in range(2)]
    answers = [finish(process) for process in both]
    assert [output for output, _ in answers] == ["None", "None"]
    assert sum(errors.count("building the C++ kernels") for _, errors in answers) == 1
    assert {path.name for path in folder.iterdir()} == {"lock", "moe_mamba_kernels.so"}
    capfd.readouterr()
    assert fresh() is None  # from the cache, silently
    assert capfd.readouterr().err == ""


def test_a_compiler_that_fails_is_one_line_for_all_that_waited(
    fresh: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_compiler(tmp_path, "echo 'x.cpp:1: error: this is not C++'; exit 1")
    with ThreadPoolExecutor(3) as threads:
        answers = {future.result() for future in [threads.submit(fresh) for _ in range(3)]}
    (answer,) = answers
    assert answer is not None
    assert answer.startswith("the C++ compiler failed: x.cpp:1: error: this is not C++, log at ")
    assert "\n" not in answer and Path(answer.split("log at ")[1]).exists()
    assert capfd.readouterr().err.count("building the C++ kernels") == 1


@pytest.mark.slow
def test_a_compiler_that_hangs_is_stopped(fresh: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_compiler(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 300")
    monkeypatch.setattr(extension, "PATIENCE", 6.0)
    answer = fresh()
    assert answer is not None and answer.startswith("the C++ compiler did not end within 6 s")
    if (tmp_path / "pid").exists():  # a machine under load may not have come so far
        pid = int((tmp_path / "pid").read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@needs_compiler
def test_a_cache_that_cannot_be_written(
    fresh: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", write_compiler(tmp_path, QUICKLY))  # a file is not a folder
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        assert fresh() is None
        assert [path.name for path in tmp_path.iterdir()] == ["compiler"]
        patch.setattr(tempfile, "tempdir", str(tmp_path / "compiler"))
        extension.library.cache_clear()
        answer = fresh()
    assert answer is not None and answer.startswith("no folder for the C++ kernels can be written (Not a directory)")
    assert "(Not a directory): building them for only this process" in capfd.readouterr().err
