"""Compile every Triton kernel for several GPUs, without one: ``python tools/compile_kernels.py``."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from moe_mamba.command_line import run_command
from moe_mamba.errors import UserError
from moe_mamba.kernels.backends import BACKENDS
from moe_mamba.kernels.compilation import Resources, Specimen, compile_for


def main(capabilities: str = "80,90,100", only: str = "", output: str | None = None) -> None:
    """Print registers, spilled bytes and instructions of each kernel at its usual sizes.

    Args:
        capabilities: compute capabilities to compile for, separated by commas; 90 is Hopper.
        only: part of the name of the kernels to compile; empty: all.
        output: file to write the figures to as well, as JSON.
    """
    wanted = capabilities.split(",")
    if unknown := [one for one in wanted if not one.isdecimal()]:
        raise UserError(f"--capabilities={capabilities}: {unknown[0]!r} is not a compute capability such as 90")
    names = [specimen.name for specimen in specimens()]
    tasks = [(place, capability) for place, name in enumerate(names) if only in name for capability in map(int, wanted)]
    figures = []
    print("| kernel | sm | registers | spilled bytes | shared bytes | instructions |")
    print("|---|---|---|---|---|---|")
    with ProcessPoolExecutor(mp_context=get_context("fork")) as processes:  # with the modules imported already
        for (place, capability), used in zip(tasks, processes.map(_compile, *zip(*tasks, strict=True)), strict=True):
            total = sum(used.instructions.values())
            print(f"| {names[place]} | {capability} | {used.registers} | {used.spilled} | {used.shared} | {total} |")
            figures.append({"kernel": names[place], "capability": capability, **asdict(used)})
    if output is not None:
        Path(output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _compile(place: int, capability: int) -> Resources:
    return compile_for(specimens()[place], capability)


@cache
def specimens() -> list[Specimen]:
    """Those that the Triton back ends name, each module's once."""
    modules = {table["triton"].module for table in BACKENDS.values() if "triton" in table}
    return [one for name in sorted(modules) for one in import_module(f"moe_mamba.kernels.{name}").specimens()]


if __name__ == "__main__":
    run_command(main)
