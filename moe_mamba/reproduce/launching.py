"""Starts runs in processes of their own, so many at once as there are cores or GPUs, and stops them in time."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from moe_mamba.atomic_file import write_atomically
from moe_mamba.config_file import save_config
from moe_mamba.errors import RunStopped, one_line
from moe_mamba.installation import CHECKOUT, command
from moe_mamba.reproduce.runs import Run
from moe_mamba.run.outcome import FILE as OUTCOME

IN_USE = "is in use by another run"  # of a process that an earlier call left behind, and that is about to save
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_UNTIL_FREE = 5.0
ASKED_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = (130, 143, *(-number for number in ASKED_TO_STOP))  # what a process that was asked to stop ends with
COMMAND = "env OMP_NUM_THREADS=1"  # how each line of a list of jobs begins
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slots(gpus_per_run: int) -> int:
    """Runs that this machine takes at once."""
    return max(1, torch.cuda.device_count() // gpus_per_run) if torch.cuda.is_available() else cores()


def config_file(run: Run, output: Path) -> Path:
    """Where the configuration of a run is kept, which makes it by itself."""
    return output / "configs" / run.kind / run.row / f"{run.folder.name}.yaml"


def write_config(run: Run, output: Path) -> Path:
    """Write the configuration of a run."""
    path = config_file(run, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_config(run.config, path)
    return path


def command_of(run: Run, output: Path, gpus_per_run: int) -> str:
    """The line that makes a run, or goes on with it, for a job list."""
    train = command("train")
    if gpus_per_run > 1:
        module = "-m moe_mamba.commands.train" if train.startswith("moe-mamba") else train.removeprefix("python ")
        train = f"torchrun --standalone --nproc-per-node={gpus_per_run} {module}"
    return f"{COMMAND} {train} --config={shlex.quote(str(config_file(run, output)))}"


def _words(run: Run, output: Path, gpus_per_run: int) -> list[str]:
    """The same for a process of this Python, whatever folder it stands in."""
    python = [sys.executable, "-P", "-m"]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={gpus_per_run}", "-m"]
    words = [*python, *(launcher if gpus_per_run > 1 else []), "moe_mamba.commands.train"]
    return [*words, f"--config={config_file(run, output)}"]


@dataclass
class _Process:
    run: Run
    slot: int
    process: subprocess.Popen[bytes]
    outcome: Path
    since: float


class Launcher:
    """Makes runs.

    Args:
        output: folder of the table's output.
        at_once: runs that go on beside one another.
        gpus_per_run: devices of a run, where there are GPUs.
        say: prints a line.
    """

    def __init__(self, output: Path, at_once: int, gpus_per_run: int, say: Callable[[str], None]) -> None:
        self.output, self.at_once, self.gpus_per_run, self.say = output, at_once, gpus_per_run, say
        self.stopped_by: int | None = None

    def make(self, runs: Iterable[Run]) -> dict[str, str]:
        """Make runs, or go on with them; those that are done are passed over.

        Returns:
            Name of a run that has failed -> why, in a line.

        Raises:
            RunStopped: a signal came; all runs have saved, and the same call goes on with them.
        """
        waiting = [run for run in runs if not run.is_done]
        total, failed, working = len(waiting), dict[str, str](), list[_Process]()
        with self._signals():
            while working or (waiting and self.stopped_by is None):
                while waiting and len(working) < self.at_once and self.stopped_by is None:
                    free = next(slot for slot in range(self.at_once) if slot not in {one.slot for one in working})
                    run = waiting.pop(0)
                    if not run.is_done:  # another call may have made it meanwhile
                        working.append(self._start(run, free))
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for one in [one for one in working if one.process.poll() is not None]:
                    working.remove(one)
                    fault = self._fault(one)
                    if fault and IN_USE in fault:
                        time.sleep(SECONDS_UNTIL_FREE)
                        waiting.append(one.run)
                        continue
                    if fault:
                        failed[one.run.name] = fault
                    left = len(waiting) + len(working)
                    self.say(f"{one.run.name:<32}{self._said(one, fault)}; {total - left} of {total}")
                self._pass_on(working)
        if self.stopped_by is not None:
            name = signal.Signals(self.stopped_by).name
            code = 130 if self.stopped_by == signal.SIGINT else 143
            raise RunStopped(f"stopped by {name}: runs have saved; the same command goes on with them", code=code)
        return failed

    def _start(self, run: Run, slot: int) -> _Process:
        write_config(run, self.output)
        left = self.output / "outcomes" / run.kind / run.row
        left.mkdir(parents=True, exist_ok=True)
        outcome = left / f"{run.folder.name}.txt"
        write_atomically(outcome, "")
        with (left / f"{run.folder.name}.log").open("ab") as screen:
            process = subprocess.Popen(
                _words(run, self.output, self.gpus_per_run),
                env=os.environ | self._environment(slot, outcome),
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=screen,
                start_new_session=True,  # Ctrl-C is passed on once, by us
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        return _Process(run, slot, process, outcome, time.monotonic())

    def _environment(self, slot: int, outcome: Path) -> Mapping[str, str]:
        paths = [str(CHECKOUT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        found = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths)), OUTCOME: str(outcome)}
        if torch.cuda.is_available():
            first = slot * self.gpus_per_run % torch.cuda.device_count()
            devices = range(first, first + self.gpus_per_run)
            found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        return found

    def _fault(self, one: _Process) -> str | None:
        """Why a run has failed; None where it is finished, has diverged, or was asked to stop."""
        said = one.outcome.read_text(encoding="utf-8").strip()
        if said == "finished" or one.run.state == "diverged":
            return None
        if self.stopped_by is not None and (said == "stopped" or one.process.returncode in STOPPED):
            return None
        if said == "stopped":
            return "it was asked to stop by somebody else, and has saved"
        why = said.partition(": ")[2] if said.startswith(("mistake", "failed")) else ""
        log = one.outcome.with_suffix(".log")
        return one_line(why or f"it ended with code {one.process.returncode} and without a word: see {log}")

    def _said(self, one: _Process, fault: str | None) -> str:
        if fault:
            return f"failed: {fault}"
        state, minutes = one.run.state, (time.monotonic() - one.since) / 60
        loss = one.run.loss()
        reached = "" if loss is None else f", validation loss {loss:.4f}"
        return f"{'saved' if state == 'begun' else state}{reached}, {minutes:.1f} min"

    def _pass_on(self, working: list[_Process]) -> None:
        """Ask all processes to stop, once each, if this one was asked."""
        if self.stopped_by is None:
            return
        for one in working:
            if one.slot >= 0 and one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)
                one.slot = -1

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self.stopped_by = self.stopped_by or number

        before = {number: signal.signal(number, note) for number in ASKED_TO_STOP}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork


def _die_with_parent() -> None:
    """Let the kernel ask a run to stop, and so to save, when the process that started it dies."""
    assert _LIBC is not None
    _LIBC.prctl(DEATH_SIGNAL, int(signal.SIGTERM))
