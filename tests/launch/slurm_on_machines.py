#!/usr/bin/env python3
"""Slurm's srun and scontrol, for a batch script on a machine of tests/machines.py; which one, its own name says.

MACHINES holds the allocation, as name:process pairs with a process in each machine; REQUEUED is a file that gets a line
for each ``scontrol requeue``. What it does not know it refuses, as Slurm does.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

VALUES = {"-N": "--nodes", "-n": "--ntasks", "-c": "--cpus-per-task", "-w": "--nodelist", "-W": "--wait"}
VALUES |= {name: name for name in (*VALUES.values(), "--ntasks-per-node", "--export", "--cpu-bind", "--gpus-per-task")}
FLAGS = {"-K", "--kill-on-bad-exit", "-l", "--label", "-u", "--unbuffered"}
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
SECONDS_TO_END = 30  # KillWait


def srun(words: list[str]) -> int:
    """Run a command once per task, each on its machine; the largest exit code."""
    options, command = parsed(words)
    allocation = dict(pair.split(":") for pair in os.environ["MACHINES"].split(","))
    names = options.get("--nodelist", ",".join(allocation)).split(",")
    names = names[: int(options.get("--nodes", len(names)))]
    each = int(options.get("--ntasks-per-node", int(options.get("--ntasks", len(names))) // len(names)))
    tasks = []
    for rank in range(each * len(names)):
        node, local = divmod(rank, each)
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_NODEID": node, "SLURM_NTASKS": each * len(names)}
        place |= {"SLURM_STEP_ID": 0, "SLURM_STEP_NODELIST": ",".join(names), "SLURMD_NODENAME": names[node]}
        place |= {"SLURM_NNODES": len(names), "SLURM_TASKS_PER_NODE": f"{each}(x{len(names)})"}
        enter = ["nsenter", f"--target={allocation[names[node]]}", "--net", "--uts", "--mount"]
        enter += ["--", "env", "-C", os.getcwd()]
        environment = os.environ | {name: str(value) for name, value in place.items()}
        tasks.append(subprocess.Popen([*enter, *command], env=environment, start_new_session=True))

    def forward(number: int, frame: object) -> None:
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    kills = "--kill-on-bad-exit" in options or "-K" in options
    return wait(tasks, kills)


def wait(tasks: list[subprocess.Popen[bytes]], kills: bool) -> int:
    """Wait for all tasks; with `kills`, the first one that fails ends the others."""
    killed_at = None
    while any(task.poll() is None for task in tasks):
        time.sleep(0.1)
        if kills and killed_at is None and any(task.returncode for task in tasks):
            killed_at = time.monotonic()
            signal.raise_signal(signal.SIGTERM)
        if killed_at is not None and time.monotonic() - killed_at > SECONDS_TO_END:
            for task in tasks:
                if task.poll() is None:
                    os.killpg(task.pid, signal.SIGKILL)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def parsed(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options before the command, by their long names, and the command."""
    options, words = {}, list(words)
    while words and words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        if name in FLAGS:
            options[name] = value
        elif name in VALUES:
            options[VALUES[name]] = value or words.pop(0)
        else:
            sys.exit(f"srun: unrecognized option '{name}'")
    return options, words


def scontrol(words: list[str]) -> int:
    """``show hostnames [LIST]``, and ``requeue JOB``."""
    if words[:2] == ["show", "hostnames"]:
        print("\n".join((words[2] if len(words) > 2 else os.environ["SLURM_JOB_NODELIST"]).split(",")))
    elif words[0] == "requeue" and len(words) == 2:
        with Path(os.environ["REQUEUED"]).open("a") as file:
            print(words[1], file=file)
    else:
        sys.exit(f"scontrol: invalid entity: {' '.join(words)}")
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[Path(sys.argv[0]).name](sys.argv[1:]))
