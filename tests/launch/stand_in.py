"""Stand-ins for SLURM's commands: several "machines" that are all this one, and a queue that is a file.

`install` puts `sbatch`, `srun`, `scontrol` and `apptainer` into a folder for the PATH. They refuse options that
`launch/slurm.sbatch` has no business to use, and note what they are told in files beside themselves.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil

COMMANDS = ("sbatch", "srun", "scontrol", "apptainer")
SRUN_OPTIONS = {
    *("--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--kill-on-bad-exit", "--wait", "--unbuffered"),
    *("--no-kill", "--container-image", "--container-mounts", "--container-workdir"),
}
SBATCH_OPTIONS = {
    *("--job-name", "--nodes", "--ntasks-per-node", "--exclusive", "--mem", "--requeue", "--open-mode", "--signal"),
    *("--no-kill", "--gpus-per-node"),
}


def install(folder: Path) -> None:
    """Put the stand-ins into `folder`, which is made."""
    folder.mkdir()
    for command in COMMANDS:
        path = folder / command
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {command} "$@"\n')
        path.chmod(0o755)


def split(arguments: list[str], known: set[str]) -> tuple[dict[str, str], list[str]]:
    """Options, written `--name=value`, and what follows them."""
    options: dict[str, str] = {}
    for place, word in enumerate(arguments):
        if not word.startswith("-"):
            return options, arguments[place:]
        name, _, value = word.partition("=")
        if name not in known:
            sys.exit(f"unrecognized option '{word}'")
        options[name] = value
    return options, []


def note(line: object) -> None:
    """Add a line to the notes of all commands."""
    with Path(os.environ["STAND_IN_NOTES"]).open("a") as notes:
        notes.write(json.dumps(line) + "\n")


def sbatch(arguments: list[str]) -> int:
    """Run a batch script as its machine would, and again as often as it is requeued."""
    place = next(number for number, word in enumerate(arguments) if Path(word).is_file())
    script = Path(arguments[place])
    inside = re.findall(r"(?m)^#SBATCH (\S+)$", script.read_text())
    given = re.sub(r"(--nodes|--gpus-per-node) (\d+)", r"\1=\2", " ".join(arguments[:place])).split()
    options, _ = split([*inside, *given], SBATCH_OPTIONS)
    nodes = int(options["--nodes"])
    spooled = Path(os.environ["STAND_IN_NOTES"]).with_name("slurm_script")
    spooled.write_text(script.read_text())
    environment = os.environ | {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(["localhost", "127.0.0.1"][:nodes]),
        "SLURM_CPUS_ON_NODE": "2",
    }
    count, code = 0, 0
    while True:
        requeued = os.environ["STAND_IN_NOTES"] + ".requeued"
        Path(requeued).unlink(missing_ok=True)
        if count:
            environment["SLURM_RESTART_COUNT"] = str(count)
        process = subprocess.Popen(["bash", spooled, *arguments[place + 1 :]], env=environment)
        note(["batch", process.pid])
        code = process.wait()
        if not Path(requeued).exists() or count >= int(os.environ.get("STAND_IN_REQUEUES", "0")):
            return code
        count += 1


def srun(arguments: list[str]) -> int:
    """Run a command once for each machine; signals go on to all processes of all of them."""
    options, command = split(arguments, SRUN_OPTIONS)
    note(["srun", *arguments])
    tasks = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for task in tasks:
            for process in [*psutil.Process(task.pid).children(recursive=True), task]:
                process.send_signal(number)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, pass_on)
    for node, host in enumerate(os.environ["SLURM_JOB_NODELIST"].split(",")):
        identity = {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURMD_NODENAME": host}
        tasks.append(subprocess.Popen(command, env=os.environ | identity))
    assert len(tasks) == int(options["--nodes"]) == int(options["--ntasks"])
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(arguments: list[str]) -> int:
    """`show hostnames`, `show job`, `requeue`."""
    match arguments:
        case ["show", "hostnames", names]:
            print("\n".join(names.split(",")))
        case ["show", "job", "-o", job]:
            print(f"JobId={job} JobName=moe_mamba JobState={os.environ.get('STAND_IN_STATE', 'RUNNING')} Reason=None")
        case ["requeue", job]:
            note(["requeue", job])
            Path(os.environ["STAND_IN_NOTES"] + ".requeued").touch()
        case _:
            sys.exit(f"invalid request: {arguments}")
    return 0


def apptainer(arguments: list[str]) -> int:
    """Run the command that follows the image, here."""
    note(["apptainer", *arguments])
    image = next(place for place, word in enumerate(arguments) if word.endswith(".sif"))
    os.execvp(arguments[image + 1], arguments[image + 1 :])


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "apptainer": apptainer}[sys.argv[1]](sys.argv[2:]))
