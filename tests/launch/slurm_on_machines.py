"""Stand-ins for Slurm's srun and scontrol, for a batch script on one of the machines of tests/machines.py.

MACHINES holds the allocation, as name:process pairs with a process in each machine; REQUEUED is a file that gets a line
for each ``scontrol requeue``. What they do not know they refuse, as Slurm does.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

OPTIONS = {"--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--kill-on-bad-exit", "--wait"}
OPTIONS |= {"--unbuffered", "--no-kill"}


def install(folder: Path) -> None:
    """Put both into `folder`, which is made."""
    folder.mkdir()
    for name in ("srun", "scontrol"):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        (folder / name).chmod(0o755)


def srun(words: list[str]) -> int:
    """Run a command once on each machine, and pass signals on to all processes of it; the largest exit code."""
    options = {}
    while words and words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        if name not in OPTIONS:
            sys.exit(f"srun: unrecognized option '{name}'")
        options[name] = value
    allocation = dict(pair.split(":") for pair in os.environ["MACHINES"].split(","))
    assert {options["--nodes"], options.get("--ntasks", "")} <= {str(len(allocation)), ""}
    tasks = []
    for number, (name, process) in enumerate(allocation.items()):
        enter = ["nsenter", f"--target={process}", "--net", "--uts", "--mount", "--", "env", "-C", os.getcwd()]
        place = {"SLURM_PROCID": str(number), "SLURM_NODEID": str(number), "SLURM_LOCALID": "0"}
        place |= {"SLURM_NTASKS": str(len(allocation)), "SLURMD_NODENAME": name}
        tasks.append(subprocess.Popen([*enter, *words], env=os.environ | place))

    def pass_on(number: int, frame: object) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def scontrol(words: list[str]) -> int:
    """`show hostnames`, `show job`, `requeue`."""
    match words:
        case ["show", "hostnames", names]:
            print("\n".join(names.split(",")))
        case ["show", "job", "-o", job]:
            print(f"JobId={job} JobState=RUNNING")
        case ["requeue", job]:
            with Path(os.environ["REQUEUED"]).open("a") as file:
                print(job, file=file)
        case _:
            sys.exit(f"scontrol: invalid request: {words}")
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
