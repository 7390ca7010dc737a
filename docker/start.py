"""Run a container's command, and stop it so that nothing is lost: ``python docker/start.py deepspeed launch/train.py``.

``docker stop`` sends TERM to a container's first process alone, and the container ends with that process. DeepSpeed's
launcher dies of TERM at once, and its ranks with the container, before they have saved anything. So the signal goes to
the ranks themselves: they save a checkpoint and end, and then the launcher does, as after any other training.
"""

import contextlib
import signal
import subprocess
import sys
from types import FrameType

import psutil


def ranks(process: psutil.Process) -> list[psutil.Process]:
    """The processes below this one that a launcher has started as ranks; not what those have started."""
    found = []
    for child in process.children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            found += [child] if "LOCAL_RANK" in child.environ() else ranks(child)
    return found


def main(command: list[str]) -> int:
    """Run the command; gives its exit code as a shell does."""
    process = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(process.pid)
            for one in ranks(first) or [first]:
                one.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to all processes by itself
    code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:
        sys.exit(f"error: {sys.argv[1]} cannot be run here ({error.strerror})")
