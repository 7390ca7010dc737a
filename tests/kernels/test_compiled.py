"""Every Triton kernel compiled for Ampere, Hopper and Blackwell, on any machine: what the interpreter cannot show."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from moe_mamba.kernels.backends import BACKENDS

CAPABILITIES = (80, 90, 100)
REGISTERS = 255  # of a thread, at most


def specimens() -> dict[str, list[str]]:
    """Module of Triton kernels -> names of what is compiled of it."""
    modules = {table["triton"].module for table in BACKENDS.values() if "triton" in table}
    return {
        module: [one.name for one in import_module(f"moe_mamba.kernels.{module}").specimens()] for module in modules
    }


def test_every_module_lists_what_is_to_be_compiled() -> None:
    pytest.importorskip("triton")
    names = [name for named in specimens().values() for name in named]
    assert all(specimens().values())
    assert len(names) == len(set(names))  # figures are kept by them


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    output = tmp_path / "figures.json"
    capabilities = ",".join(map(str, CAPABILITIES))
    command = [sys.executable, "tools/compile_kernels.py", f"--capabilities={capabilities}", f"--output={output}"]
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = request.config.rootpath
    done = subprocess.run(command, cwd=root, env=compiling | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = {(one["kernel"], one["capability"]): one for one in json.loads(output.read_text())}

    for module, named in specimens().items():
        missing = [(name, one) for name in named for one in CAPABILITIES if (name, one) not in figures]
        assert not missing, f"{module}: {missing}"
    for one in figures.values():
        assert one["spilled"] == 0, one
        assert 0 < one["registers"] <= REGISTERS and sum(one["instructions"].values()) > 0, one
