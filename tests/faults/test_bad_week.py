"""A bad week: failures at random, one after the other, and the run ends as if there had been none."""

import contextlib
import errno
import json
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from moe_mamba.checkpoint import store
from moe_mamba.run.metrics import read_metrics
from tests.machines import Machine, wait
from tests.train.runs import curve, same_weights

FAILURES = 60  # that end the run
NAN_BATCHES = 10  # besides
STEPS = 2400
STEPS_TO_FAILURE = 50  # at most, counted from a start
SECONDS_TO_START, SECONDS_TO_END = 60, 90
KEYS = {
    "train.steps": STEPS, "checkpoint.every": 5, "train.validate_every": 0, "train.sample_tokens": 0,
}  # fmt: skip
# What the screens must say after a failure, in one world of each size.
LINES = {
    "kill": {1: "", 2: r"error: rank \d \(node\d, process \d+\) died without an error message"},
    "link": {2: r"error: rank 1 \(node2, process \d+\) died without an error message"},
    "disk": dict.fromkeys((1, 2), r"error: (rank \d .*)?no space left .*: free some"),
    "SIGTERM": dict.fromkeys((1, 2), r"stopped by SIGTERM at step \d"),
    "SIGUSR1": dict.fromkeys((1, 2), r"stopped by SIGUSR1 at step \d"),
}


class Forked:
    """Ranks on one machine, one after the other, forked by a process that has the libraries; see ``fork_ranks``."""

    def __init__(self, machine: Machine, screen: Path) -> None:
        self.machine, self.screen = machine, screen
        words = machine.command(sys.executable, "-m", "tests.faults.fork_ranks")
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.code: int | None = None

    def answer(self) -> str:
        """The server's next line."""
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def start(self, arguments: list[str], nan_batches: list[int], **environment: str) -> None:
        """Start a rank; the loss of the batches with these numbers is NaN on it."""
        assert self._server.stdin is not None
        request = {"environment": environment, "arguments": arguments, "screen": str(self.screen)}
        request["nan_batches"] = nan_batches
        print(json.dumps(request), file=self._server.stdin, flush=True)
        self.code = None

    def signal(self, number: signal.Signals) -> None:
        """Signal the rank, if it has not ended."""
        (server,) = psutil.Process(self._server.pid).children()
        for process in server.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    @property
    def has_ended(self) -> bool:
        """Whether the rank has ended; `code` is its exit code then."""
        if self.code is None and select.select([self._server.stdout], [], [], 0)[0]:
            self.code = int(self.answer())
        return self.code is not None


@dataclass
class Week:
    """One run and its failures, on one rank a machine.

    Attributes:
        ranks: the first one is rank 0.
        folder: of the run, as the machines see it.
        config: of the run.
        chance: when things fail.
        keys: of the run, besides those that all weeks have.
        nan_batches: numbers of batches whose loss is NaN on the last rank.
        seconds: wall time by what it was spent on.
        steps: by what became of them.
    """

    ranks: list[Forked]
    folder: Path
    config: Path
    chance: random.Random
    keys: dict[str, Any] = field(default_factory=dict)
    nan_batches: list[int] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)

    @property
    def seen(self) -> Path:
        """The run's folder, as this process sees it."""
        return self.ranks[0].machine.seen(self.folder)

    @property
    def has_ended(self) -> bool:
        """Whether all ranks have ended."""
        return all([rank.has_ended for rank in self.ranks])

    @property
    def screens(self) -> str:
        """What the ranks wrote."""
        return "".join(rank.screen.read_text() for rank in self.ranks)

    @property
    def logged(self) -> int:
        """The last step in the metrics."""
        with contextlib.suppress(FileNotFoundError):
            *lines, _ = (self.seen / "metrics.jsonl").read_bytes().split(b"\n")
            return json.loads(lines[-1])["step"] if lines else 0
        return 0

    @property
    def _written(self) -> int:
        """When the metrics were last written."""
        with contextlib.suppress(FileNotFoundError):
            return (self.seen / "metrics.jsonl").stat().st_mtime_ns
        return 0

    @property
    def saved(self) -> int:
        """The newest valid checkpoint's step."""
        found = store.newest(self.seen / "checkpoints")
        return store.step_of(found) if found else 0

    def run(self, failures: list[str]) -> None:
        """Make all steps, with these failures in this order."""
        for failure in [*failures, None]:
            begun = self.saved
            self._start(begun)
            started = time.monotonic()
            if failure is not None:
                target = begun + self.chance.randint(1, STEPS_TO_FAILURE)
                wait(lambda target=target: self.logged >= target or self.has_ended, SECONDS_TO_START, f"step {target}")
                time.sleep(self.chance.uniform(0, 0.2))
                assert not self.has_ended, self.screens
                failed = time.monotonic()
                self._break(failure)
            else:
                wait(lambda: self.has_ended, 600, "the end")
                failed = time.monotonic()
                assert [rank.code for rank in self.ranks] == [0] * len(self.ranks), self.screens
            made, kept = self.logged - begun, self.saved - begun
            self.steps.update(kept=kept, lost=made - kept)
            spent, share = failed - started, kept / made
            self.seconds.update(kept=spent * share, lost=spent * (1 - share), ending=time.monotonic() - failed)

    def _start(self, begun: int) -> None:
        """Start all ranks, and wait until one step is made."""
        before = time.monotonic()
        arguments = [f"--config={self.config}", f"--run.folder={self.folder}"]
        arguments += [f"--{key}={value}" for key, value in (KEYS | self.keys).items()]
        world = {"MASTER_ADDR": self.ranks[0].machine.name, "MASTER_PORT": str(self.chance.randint(20000, 30000))}
        world |= {"WORLD_SIZE": str(len(self.ranks)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        before_it = self._written
        for number, rank in enumerate(self.ranks):
            is_last = rank is self.ranks[-1]
            rank.start(arguments, self.nan_batches if is_last else [], **world, RANK=str(number))
        # A start first drops the lines that lie past its checkpoint.
        begins = lambda: (self._written != before_it and self.logged > begun) or self.has_ended  # noqa: E731
        wait(begins, SECONDS_TO_START, f"step {begun + 1}")
        assert not self.has_ended, self.screens
        self.seconds["starting"] += time.monotonic() - before

    def _break(self, failure: str) -> None:
        """Let one thing fail, wait until the run has ended, and repair it."""
        ballast = self.seen.parent / "ballast"
        if failure == "kill":
            self.chance.choice(self.ranks).signal(signal.SIGKILL)
        elif failure == "link":
            self.ranks[1].machine.cut()
        elif failure == "disk":
            fill(ballast)
        else:
            self.chance.choice(self.ranks).signal(signal.Signals[failure])
        wait(lambda: self.has_ended, SECONDS_TO_END, f"the end after {failure}")
        screens = self.screens
        assert re.search(LINES[failure][len(self.ranks)], screens), f"{failure}: {screens}"
        assert "Traceback" not in screens, f"{failure}: {screens}"
        ballast.unlink(missing_ok=True)
        for rank in self.ranks:
            rank.machine.reconnect()


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as stream:
        while True:
            try:
                stream.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                return


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_a_bad_week_changes_no_bit(
    machines: list[Machine], tiny: Path, tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = [kind for kind, lines in LINES.items() if size in lines]
    chance = random.Random(size)
    failures = [kinds[number % len(kinds)] for number in range(FAILURES)]
    chance.shuffle(failures)
    ranks = [Forked(machine, tmp_path / f"{machine.name}.txt") for machine in machines[:size]]
    assert [rank.answer() for rank in ranks] == ["ready"] * size
    nan_batches = sorted(chance.sample(range(1, STEPS + 1), NAN_BATCHES))
    bad = Week(ranks, machines[0].disk / "bad" / "run", tiny, chance, {"train.on_nan": "skip"}, nan_batches)
    bad.run(failures)
    newest = store.newest(bad.seen / "checkpoints")
    assert newest is not None
    skipped = store.read_description(newest)["recovery"]["skipped_batches"]
    assert skipped == nan_batches
    quiet = Week(ranks, machines[0].disk / "quiet" / "run", tiny, chance, {"train.skip_batches": skipped})
    quiet.run([])
    assert bad.saved == STEPS
    assert curve(read_metrics(bad.seen)) == curve(read_metrics(quiet.seen))
    assert len(curve(read_metrics(bad.seen))) == STEPS
    same_weights(bad.seen, quiet.seen)
    with capsys.disabled():
        print(f"\n{size} ranks, {dict(Counter(failures))}")
        for name, week in (("quiet", quiet), ("bad", bad)):
            wall = sum(week.seconds.values())
            spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in week.seconds.items())
            print(f"{name}: {wall:.1f} s, goodput {week.seconds['kept'] / wall:.1%}; {spent}; steps {dict(week.steps)}")
