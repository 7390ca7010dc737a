"""Compile Triton kernels for GPUs that this machine need not have, and read what they use off the machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Specimen:
    """A kernel with the types and constants of a typical launch.

    Attributes:
        name: what it is called in a table.
        kernel: a function under ``triton.jit``.
        types: run-time argument -> Triton's name of its type, such as ``*bf16``, ``i32`` or ``fp32``.
        constants: compile-time argument -> value; None for a pointer that is left out.
        warps: of a program.
        stages: of software pipelining.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spilled: bytes a thread that did not fit into registers.
        shared: bytes of shared memory a program.
        instructions: machine instruction, without its modifiers -> how often it stands in the code (not: is run).
    """

    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]


def compile_for(specimen: Specimen, capability: int) -> Resources:
    """Compile for a GPU of this compute capability, 90 for Hopper; must not run under Triton's interpreter.

    Pointers are taken to be aligned to 16 bytes, as torch's allocations are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    signature = {name: specimen.types.get(name, "constexpr") for name in names}
    constants = {name: specimen.constants[name] for name in names if name not in specimen.types}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name].startswith("*")
    }
    source = ASTSource(specimen.kernel, signature, constants, aligned)
    options = {"num_warps": specimen.warps, "num_stages": specimen.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(machine_code: bytes, shared: int) -> Resources:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(machine_code)
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", str(path))
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    words = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", listing, re.MULTILINE)
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], shared, dict(Counter(words).most_common()))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
