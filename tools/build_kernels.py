"""Build the C++ kernels for machines without a compiler: ``python tools/build_kernels.py --output=kernels``."""

import platform
from pathlib import Path

from moe_mamba.command_line import run_command
from moe_mamba.errors import UserError
from moe_mamba.kernels.extension import FOLDER, build_for
from moe_mamba.kernels.levels import LEVELS, levels_of

ARCHITECTURES = sorted({level.machine for level in LEVELS})


def main(output: str, levels: str = "") -> None:
    """Build one library for each level of processors; a run takes the best one that its processor has.

    Args:
        output: folder to write them to; a run looks into the one that the variable MOE_MAMBA_KERNELS names, or else
            into moe_mamba/kernels/prebuilt.
        levels: which of this machine's architecture, separated by commas; empty: all.
    """
    machine = platform.machine()
    known = {level.name: level for level in levels_of(machine)}
    wanted = levels.split(",") if levels else list(known)
    if not known:
        raise UserError(f"no level of {machine} is known: build on {' or '.join(ARCHITECTURES)}")
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"--levels={levels}: {machine} has no level {unknown[0]!r}: choose among {', '.join(known)}")
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            print(build_for(known[name], folder))
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror}): name another folder") from error
    print(f"for runs with {FOLDER}={folder.resolve()}")


if __name__ == "__main__":
    run_command(main)
