"""The benchmark's rows against older code of ours: ``step_before``, ``decode_before`` and the others so named.

Each side is a process of its own with the code of its checkout (``in_checkout.py``), and only one works at a time: they
take turns step by step, text by text or start by start. Milliseconds are the processor's, which other work on the
machine spoils less than the clock's.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from benchmarks.pairs import Pair, Row, measure, median_interval, medians, ratios
from moe_mamba.errors import RunStopped, UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("in_checkout.py")
PAIRS = 8  # times as many pairs of steps and texts as repeats: they are short
STARTS = 2  # times as many pairs of starts
WARM_UP = 2  # steps and texts
FOREVER = 10**6


@dataclass(frozen=True)
class BeforeShapes:
    """What is measured."""

    d_model: int = 256
    pairs: int = 4  # of Mamba and experts
    batch: int = 8
    length: int = 256
    vocab_size: int = 512
    head_pairs: int = 1
    head_vocab_size: int = 50_304
    tokens: int = 64  # of a text

    @staticmethod
    def choose(tiny: bool) -> "BeforeShapes":
        """The shapes that docs/measurements.md reports, or tiny ones."""
        return BeforeShapes(16, 1, 2, 16, 300, 1, 400, 2) if tiny else BeforeShapes()


AGAINST = "the older checkout"
STARTED = BeforeShapes(d_model=16, pairs=8, batch=4, length=32)


class Worker:
    """A process with a checkout's code, which does a piece of its work when it is told to.

    Attributes:
        peak: the most memory that it had until its last answer, in MiB.
    """

    def __init__(self, checkout: Path, *arguments: str) -> None:
        self._checkout, self.peak = checkout, 0.0
        orders, self._give = os.pipe()
        self._answers, answers = os.pipe()
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 `end` closes it
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(orders), str(answers), *arguments],
            cwd=checkout,
            env=environment,
            pass_fds=(orders, answers),
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
        )
        for descriptor in (orders, answers):
            os.close(descriptor)

    def __call__(self) -> float:
        """Do a piece; CPU milliseconds of it.

        Raises:
            RunStopped: the process ended; what it said last is in the line.
        """
        with contextlib.suppress(BrokenPipeError):
            os.write(self._give, b"\n")
        answer = os.read(self._answers, 100)
        if not answer:
            self._process.wait()
            self._said.seek(0)
            last = [line.strip() for line in self._said if line.strip()][-1:] or ["it said nothing"]
            raise RunStopped(f"the code in {self._checkout} does not do this: {last[0]}")
        milliseconds, self.peak = map(float, answer.split())
        return milliseconds

    def end(self) -> None:
        """Let it end."""
        for descriptor in (self._give, self._answers):
            os.close(descriptor)
        self._process.wait()
        self._said.close()


def check_checkout(before: Path) -> None:
    """Refuse what is no checkout of this project.

    Raises:
        UserError: one line.
    """
    if not (before / "moe_mamba" / "commands" / "train.py").is_file():
        raise UserError(
            f"--before={before} is no checkout of this project: make one with git worktree add --detach {before} COMMIT"
        )


def step_rows(before: Path, shapes: BeforeShapes, repeats: int) -> list[Row]:
    """A step of training as ``launch/train.py`` does it, in fp32 and in bf16."""
    rows = []
    for precision in ("fp32", "bf16"):
        with _training(before, shapes.pairs, shapes.vocab_size, shapes, precision) as (ours, theirs):
            what = f"training step, {_name(shapes, shapes.pairs)}, {precision}, CPU time"
            rows.append(_row(what, _taken(ours, theirs, repeats)))
    return rows


def head_rows(before: Path, shapes: BeforeShapes, repeats: int) -> list[Row]:
    """The same with a large vocabulary: its time, and the most memory of the processes."""
    with _training(before, shapes.head_pairs, shapes.head_vocab_size, shapes, "fp32") as (ours, theirs):
        name = f"{_name(shapes, shapes.head_pairs)}, {shapes.head_vocab_size:,} words"
        rows = [_row(f"training step, {name}, CPU time", _taken(ours, theirs, max(1, repeats // 2)))]
        peaks = ours.peak, theirs.peak, theirs.peak / ours.peak
        return [*rows, Row(f"memory of the process, {name}", AGAINST, "MiB", *peaks, 1.0)]


def decode_rows(before: Path, shapes: BeforeShapes, repeats: int) -> list[Row]:
    """A text written by ``moe_mamba.model.generation``, in fp32 and in bf16."""
    rows = []
    for precision in ("fp32", "bf16"):
        arguments = "generate", str(shapes.d_model), str(shapes.pairs), str(shapes.tokens), precision
        with _workers(before, lambda checkout, name: arguments) as (ours, theirs):  # noqa: B023 called in this turn
            what = f"writing {shapes.tokens} tokens, ME x {shapes.pairs}, d {shapes.d_model}, {precision}, CPU time"
            rows.append(_row(what, _taken(ours, theirs, repeats)))
    return rows


def startup_rows(before: Path, repeats: int) -> list[Row]:
    """From the command to the end of the first step of a tiny model, of one process; shards are in a cache."""

    def start(checkout: Path, name: str) -> Callable[[], float]:
        numbers = count()

        def run() -> float:
            flags = _flags(Path(folder) / name, STARTED.pairs, STARTED.vocab_size, STARTED, "fp32", 1)
            worker = Worker(checkout, "train", *flags, f"--run.folder={folder}/{name}/{next(numbers)}")
            try:
                return worker()
            finally:
                worker.end()

        return run

    with tempfile.TemporaryDirectory(prefix="before-") as folder:
        pairs = _measured(start(ROOT, "ours"), start(before.resolve(), "theirs"), 1, STARTS * repeats)
    what = f"from the command to the end of the first step, {_name(STARTED, STARTED.pairs)}, CPU time"
    return [_row(what, pairs, goal=1.5)]


def _name(shapes: BeforeShapes, pairs: int) -> str:
    return f"ME x {pairs}, d {shapes.d_model}, {shapes.batch} x {shapes.length} tokens"


def _row(what: str, pairs: list[Pair], goal: float = 1.0) -> Row:
    return Row(what, AGAINST, "ms", *medians(pairs), goal, interval=median_interval(ratios(pairs)))


def _taken(ours: Worker, theirs: Worker, repeats: int) -> list[Pair]:
    return _measured(ours, theirs, WARM_UP, PAIRS * repeats)


def _measured(ours: Callable[[], float], theirs: Callable[[], float], warm_up: int, pairs: int) -> list[Pair]:
    """Pairs of CPU milliseconds, taken in turns, after some that are not counted."""
    for _ in range(warm_up):
        ours()
        theirs()
    return measure(ours, theirs, pairs, clock=lambda run: float(run()))  # type: ignore[arg-type]


@contextlib.contextmanager
def _training(
    before: Path, pairs: int, vocab_size: int, shapes: BeforeShapes, precision: str
) -> Iterator[tuple[Worker, Worker]]:
    with tempfile.TemporaryDirectory(prefix="before-") as folder:

        def arguments(checkout: Path, name: str) -> tuple[str, ...]:
            flags = _flags(Path(folder) / name, pairs, vocab_size, shapes, precision, FOREVER)
            return "train", *flags, f"--run.folder={folder}/{name}/run"

        with _workers(before, arguments) as workers:
            yield workers


@contextlib.contextmanager
def _workers(before: Path, arguments: Callable[[Path, str], tuple[str, ...]]) -> Iterator[tuple[Worker, Worker]]:
    """Ours and theirs."""
    with contextlib.ExitStack() as stack:
        workers = []
        for checkout, name in ((ROOT, "ours"), (before.resolve(), "theirs")):
            workers.append(Worker(checkout, *arguments(checkout, name)))
            stack.callback(workers[-1].end)
        yield workers[0], workers[1]


def _flags(folder: Path, pairs: int, vocab_size: int, shapes: BeforeShapes, precision: str, steps: int) -> list[str]:
    """A run's: shards in a cache of its own, for their format may be another, and no step but those of training."""
    return [
        "--model.pattern=ME",
        f"--model.repeat={pairs}",
        f"--model.d_model={shapes.d_model}",
        f"--model.vocab_size={vocab_size}",
        "--moe.experts=8",
        f"--moe.d_expert={2 * shapes.d_model}",
        "--moe.capacity_factor=null",
        "--data.tokenizer=bytes",
        f"--data.cache={folder / 'cache'}",
        "--data.max_documents=100",
        f"--data.sequence_length={shapes.length}",
        f"--train.steps={steps}",
        f"--train.global_batch={shapes.batch}",
        f"--train.micro_batch={shapes.batch}",
        f"--train.precision={precision}",
        "--train.validate_every=0",
        "--train.sample_tokens=0",
        "--checkpoint.every=0",
        "--logging.plots=false",
    ]
