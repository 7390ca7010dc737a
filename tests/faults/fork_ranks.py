"""A process on a machine that holds the libraries and forks ranks on request, so that a start costs a second.

Reads requests, a line of JSON each: the environment, the arguments of launch/train.py, the file for its screen. Answers
with a line when it is ready, and with one for each rank that has ended: its exit code, negative for a signal.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


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
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401

    import moe_mamba.train.run  # noqa: F401


def become_rank(environment: dict[str, str], arguments: list[str], screen: str, nan_batches: list[int]) -> None:
    """Be the process that a launcher would start; the gradient of the batches with these numbers is NaN."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    output = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(opened, descriptor)
    script = Path(__file__).resolve().parents[2] / "launch" / "train.py"
    sys.argv = [str(script), *arguments]
    spoil(set(nan_batches))
    runpy.run_path(str(script), run_name="__main__")


def spoil(batches: set[int]) -> None:
    """Let the gradient of these batches be NaN, in this process."""
    from moe_mamba.train import trainer as loop

    step, objective = loop.Trainer._train_step, loop.Objective.__call__
    current = [0]

    def note(trainer: loop.Trainer, number: int, *rest: Any) -> bool:
        current[0] = number
        return step(trainer, number, *rest)

    def spoiled(*parts: Any) -> Any:
        return objective(*parts) * (float("nan") if current[0] in batches else 1.0)

    loop.Trainer._train_step, loop.Objective.__call__ = note, spoiled  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
