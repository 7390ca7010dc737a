"""Compile every Triton kernel for several GPUs, without one: ``python tools/compile_kernels.py``."""

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from moe_mamba.command_line import run_command
from moe_mamba.kernels.backends import BACKENDS
from moe_mamba.kernels.compilation import Specimen, compile_for


def main(capabilities: str = "80,90,100", only: str = "", output: str | None = None) -> None:
    """Print registers, spilled bytes and instructions of each kernel at its usual sizes.

    Args:
        capabilities: compute capabilities to compile for, separated by commas; 90 is Hopper.
        only: part of the name of the kernels to compile; empty: all.
        output: file to write the figures to as well, as JSON.
    """
    figures = []
    print("| kernel | sm | registers | spilled bytes | shared bytes | instructions |")
    print("|---|---|---|---|---|---|")
    for specimen in specimens():
        if only not in specimen.name:
            continue
        for capability in map(int, str(capabilities).strip("()").split(",")):
            used = compile_for(specimen, capability)
            total = sum(used.instructions.values())
            print(f"| {specimen.name} | {capability} | {used.registers} | {used.spilled} | {used.shared} | {total} |")
            figures.append({"kernel": specimen.name, "capability": capability, **asdict(used)})
    if output is not None:
        Path(output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def specimens() -> list[Specimen]:
    """Those that the Triton back ends name, each module's once."""
    modules = {table["triton"].module for table in BACKENDS.values() if "triton" in table}
    return [one for name in sorted(modules) for one in import_module(f"moe_mamba.kernels.{name}").specimens()]


if __name__ == "__main__":
    run_command(main)
