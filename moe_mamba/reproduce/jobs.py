"""Runs for somebody else to start: a list of commands, and an array for SLURM."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from moe_mamba.atomic_file import write_atomically
from moe_mamba.errors import UserError
from moe_mamba.reproduce.launching import COMMAND, command_of, write_config
from moe_mamba.reproduce.runs import Run

SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH {devices}
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
# Task N makes line N of the list, counted from 0. Two minutes before the limit a run is told to save and end: submit
# this file again, from the same folder, and each run goes on where it stopped; those that are done say so and end.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {jobs})
exec srun bash -c "exec $line"
"""


def write_jobs(runs: Sequence[Run], output: Path, path: Path, gpus_per_run: int) -> None:
    """Write a command a line, and the configurations that they name.

    Args:
        runs: to make, or to go on with.
        output: folder of the table's output.
        path: the list.
        gpus_per_run: devices of each; with more than one, torchrun starts it.

    Raises:
        UserError: the file is there, and is no such list.
    """
    _check_list(path)
    for run in runs:
        write_config(run, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{command_of(run, output, gpus_per_run)}\n" for run in runs))


def _check_list(path: Path) -> None:
    """Raise a UserError where a file would be lost that we have not written."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a file for the list of jobs")
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if not all(line.startswith(COMMAND) for line in lines):
            raise UserError(f"{path} is there, and is no list of jobs: give another file, or move it away")


def write_slurm(runs: Sequence[Run], output: Path, folder: Path, name: str, gpus: int, gpus_per_run: int) -> Path:
    """Write a list of jobs and the script of an array over it; the script.

    Args:
        runs: to make, or to go on with.
        output: folder of the table's output.
        folder: of list and script.
        name: of the job.
        gpus: 0 where runs need none.
        gpus_per_run: devices of each, where they need some.
    """
    jobs, script = folder / "jobs.txt", folder / "array.sbatch"
    write_jobs(runs, output, jobs, gpus_per_run)
    devices = f"--gpus-per-task={gpus_per_run} --cpus-per-task={4 * gpus_per_run}" if gpus else "--cpus-per-task=1"
    content = SCRIPT.format(name=name, last=len(runs) - 1, devices=devices, jobs=shlex.quote(str(jobs.absolute())))
    write_atomically(script, content)
    return script
