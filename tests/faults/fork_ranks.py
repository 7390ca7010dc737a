"""A process on a machine that holds the libraries and forks ranks on request, so that a start costs a second.

Reads requests, a line of JSON each: the environment, the arguments of launch/train.py, the file for its screen. Answers
with a line when it is ready, and with one for each rank that has ended: its exit code, negative for a signal.
"""

import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

from tests.train.poison import poisoned
from tests.world import PRELOADED


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import_libraries()
    print("ready", file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            become_rank(**request)
            return
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), file=answers)


def import_libraries() -> None:
    """What a run imports, once."""
    for name in (*PRELOADED, "moe_mamba.train.run"):
        importlib.import_module(name)


def become_rank(environment: dict[str, str], arguments: list[str], screen: str, nan_batches: list[int]) -> None:
    """Be the process that a launcher would start; the loss of the batches with these numbers is NaN."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    output = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(opened, descriptor)
    script = Path(__file__).resolve().parents[2] / "launch" / "train.py"
    sys.argv = [str(script), *arguments]
    with poisoned(dict.fromkeys(nan_batches, float("nan")), int(environment["RANK"])):
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
