"""Libraries for levels of processors: the best that a processor has is loaded, and no compiler is asked."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from moe_mamba.kernels import extension
from moe_mamba.kernels.levels import LEVELS, best_level, levels_of, processor_flags
from tests import ROOT
from tests.kernels.test_extension import QUICKLY, needs_compiler, write_compiler
from tools import build_kernels

V4, V3, ARM = LEVELS
HERE = levels_of(platform.machine())
OLD_PROCESSOR = frozenset({"sse4_2", "avx"})
Library = Callable[[], str]

# what a user gets on a processor with the flags that are named (or this one): the library, and a scan's sum
SCAN = """
import sys, torch
from moe_mamba.kernels import extension, requirements, selective_scan
if sys.argv[1:]:
    extension.processor_flags = lambda: frozenset(sys.argv[1:])
wide, narrow = torch.ones(1, 3, 2), torch.ones(1, 3, 4)
y = selective_scan(wide, wide, -torch.ones(2, 4), narrow, narrow, torch.ones(2))[0]
print(None if requirements.cpu() else extension.library()._name, round(y.sum().item(), 4))
"""
needs_level = pytest.mark.skipif(not HERE, reason=f"no level of {platform.machine()} is known")


@pytest.mark.parametrize(
    ("there", "machine", "flags", "best"),
    [
        (LEVELS, "x86_64", V4.needs, V4),
        (LEVELS, "x86_64", V4.needs | {"amx_tile"}, V4),
        (LEVELS, "x86_64", V3.needs | {"avx512f"}, V3),  # a part of AVX-512 is not the level
        ([V3], "x86_64", V4.needs, V3),
        ([V4], "x86_64", V3.needs, None),
        (LEVELS, "x86_64", V3.needs - {"fma"}, None),
        (LEVELS, "aarch64", {"fp", "asimd", "sve"}, ARM),
        (LEVELS, "aarch64", frozenset(), None),  # a system that reports nothing
        (LEVELS, "riscv64", V4.needs, None),
    ],
)
def test_the_best_level_is_chosen(there: list, machine: str, flags: frozenset[str], best: object) -> None:
    assert best_level(there, machine, flags) == best


@pytest.fixture
def reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str | None]:
    """``build`` as a process without a compiler calls it, with libraries in `tmp_path`."""
    monkeypatch.setenv(extension.FOLDER, str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(extension, "library", cache(extension.library.__wrapped__))
    return extension.build.__wrapped__


NO_COMPILER = "no C++ compiler was found (no-such-compiler): install g++, or name one in CXX"


def test_a_folder_without_a_library_of_these_sources_says_so(reason: Callable[[], str], tmp_path: Path) -> None:
    (tmp_path / "moe_mamba_kernels-x86-64-v3-0123456789abcdef.so").touch()  # of other sources
    fix = f"python tools/build_kernels.py --output={tmp_path}"
    assert reason() == f"{tmp_path} holds no C++ kernels of these sources: {fix}; {NO_COMPILER}"


@needs_level
def test_a_processor_below_all_levels_says_so(
    reason: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / extension._file_name(HERE[0])).touch()
    monkeypatch.setattr(extension, "processor_flags", lambda: OLD_PROCESSOR)
    there = f"the C++ kernels in {tmp_path} are for {HERE[0].name}, which this processor is not"
    assert reason() == f"{there}; {NO_COMPILER}"


@needs_level
def test_a_damaged_library_says_so(reason: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / extension._file_name(HERE[0])
    path.write_bytes(b"truncated")
    monkeypatch.setattr(extension, "processor_flags", lambda: HERE[0].needs)
    answer = reason()
    assert answer.startswith(f"the C++ kernels in {tmp_path} cannot be loaded ({path}: ")
    assert answer.endswith(f"; {NO_COMPILER}")


def test_levels_of_another_architecture_are_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    (other, *_) = [level.name for level in LEVELS if level not in HERE]
    line = refusal(build_kernels.main, f"--output={tmp_path}", f"--levels={other}")
    assert f"has no level {other!r}: choose among " in line or "no level of" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_level
@needs_compiler
def test_libraries_for_levels_load_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", write_compiler(tmp_path, QUICKLY))
    built = tmp_path / "built"
    build_kernels.main(str(built))
    assert len(list(built.iterdir())) == len(HERE)

    def run(*flags: str) -> tuple[list[str], str]:
        monkeypatch.delenv("CXX", raising=False)
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
        process = subprocess.run(
            [sys.executable, "-c", SCAN, *flags],
            env={**variables, extension.FOLDER: str(built), "XDG_CACHE_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout.split(), process.stderr

    (library, expected), errors = run(*OLD_PROCESSOR)
    assert library == "None" and errors.count("which this processor is not; no C++ compiler was found") == 1, errors
    assert "without it the scan takes three times as long" in errors
    for level in [one for one in HERE if one.needs <= processor_flags()]:  # those that this machine can run
        (library, total), errors = run(*level.needs)
        assert (library, errors) == (str(built / extension._file_name(level)), "")
        assert abs(float(total) - float(expected)) < 1e-3
    assert not (tmp_path / "cache").exists()
