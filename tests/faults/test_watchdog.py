"""What ends a run from outside: signals, launchers that end, ranks that die, hang or fail."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.train import train
from moe_mamba.errors import RunStopped
from moe_mamba.faults.coordinator import hang_line
from moe_mamba.faults.signals import REASONS, Stop, launchers
from moe_mamba.run.metrics import read_metrics
from tests import ROOT
from tests.train.runs import STEPS, curve, run, same_weights, validations
from tests.train.seams import stepping_in
from tests.world import WorkerError, World, free_port

BIN = Path(sys.executable).parent
LONG = ("--train.steps=100000", "--train.validate_every=0", "--checkpoint.every=0", "--train.schedule=wsd")
DEEPSPEED = (str(BIN / "deepspeed"), "--quiet", "--num_gpus=2", "--master_port={port}")
TORCHRUN = (str(BIN / "torchrun"), "--nproc-per-node=2", "--master-port={port}")


class Job:
    """A run in processes of its own, `folder` on the disk; `ranks` are its trainers, once it has made steps."""

    def __init__(self, tiny: Path, folder: Path, *launcher: str, arguments: tuple[str, ...], **environment: str):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        launcher = tuple(part.format(port=free_port()) for part in launcher)
        command = [*launcher, "launch/train.py", f"--config={tiny}", f"--run.folder={folder}", *arguments]
        self.folder = folder
        self.screen = folder.with_name(f"{folder.name}-{environment.get('RANK', 'all')}.txt")
        with self.screen.open("w") as screen:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=screen, stderr=screen, stdin=subprocess.DEVNULL
            )
        self.ranks: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return self.screen.read_text()

    def wait_for_steps(self, steps: int) -> None:
        metrics = self.folder / "metrics.jsonl"
        wait(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= steps, 90)
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "launch/train.py" in process.cmdline()[:3]:
                self.ranks[int(process.environ()["RANK"])] = process

    def wait_for_end(self, seconds: float = 55) -> int:
        """Wait until all its processes have ended; the exit code of the first one."""
        end = time.monotonic() + seconds
        code = self.process.wait(seconds)
        wait(lambda: all(map(has_ended, self.ranks.values())), end - time.monotonic())
        return code

    def kill(self) -> None:
        for process in [*self.ranks.values(), psutil.Process(self.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def start(tiny: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a long run; at the end of the test none is left."""
    jobs: list[Job] = []

    def begin(*launcher: str, arguments: tuple[str, ...] = LONG, **environment: str) -> Job:
        jobs.append(Job(tiny, tmp_path / "run", *launcher, arguments=arguments, **environment))
        return jobs[-1]

    yield begin
    for job in jobs:
        with contextlib.suppress(psutil.NoSuchProcess):
            job.kill()


def start_two(start: Callable[..., Job], arguments: tuple[str, ...] = LONG) -> list[Job]:
    """Two ranks that no launcher looks after."""
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(sys.executable, arguments=arguments, **where, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)
    ]


@pytest.mark.slow
def test_a_rank_killed_under_a_launcher_is_named_in_one_line(start: Callable[..., Job]) -> None:
    job = start(*DEEPSPEED)
    job.wait_for_steps(3)
    job.ranks[1].kill()
    assert job.wait_for_end() != 0
    (line,) = (line for line in job.output.splitlines() if "error: " in line)
    assert f"process {job.ranks[1].pid}) died without an error message (killed, or crashed) after step " in line
    assert "error: rank 1 (" in line
    assert "Traceback" not in job.output


@pytest.mark.slow
def test_where_rank_0_is_killed_another_names_it(start: Callable[..., Job]) -> None:
    jobs = start_two(start)
    jobs[0].wait_for_steps(3)
    jobs[0].process.kill()
    assert jobs[1].wait_for_end() == 1
    assert jobs[1].output.startswith("error: rank 0 (")
    assert "died without an error message (killed, or crashed) after step " in jobs[1].output
    assert jobs[1].output.count("\n") == 1


@pytest.mark.slow
def test_a_collective_that_hangs_is_caught_with_the_place(start: Callable[..., Job]) -> None:
    jobs = start_two(start, (*LONG, "--parallel.timeout=15"))
    jobs[0].wait_for_steps(3)
    jobs[1].process.send_signal(signal.SIGSTOP)
    assert jobs[0].wait_for_end() == 1
    assert "error: no progress for 15 s (parallel.timeout): rank 0 at step " in jobs[0].output
    assert "in moe_mamba/" in jobs[0].output
    assert "; no answer from rank 1\n" in jobs[0].output, jobs[0].output
    jobs[1].process.send_signal(signal.SIGCONT)
    assert jobs[1].wait_for_end() == 1


LAUNCHERS = [
    # It leaves its trainers running.
    pytest.param(DEEPSPEED, signal.SIGTERM, "the end of its launcher", marks=pytest.mark.slow),
    pytest.param(DEEPSPEED, signal.SIGKILL, "the end of its launcher", marks=pytest.mark.long),
    pytest.param(TORCHRUN, signal.SIGTERM, "SIGTERM", marks=pytest.mark.long),
    pytest.param(TORCHRUN, signal.SIGKILL, "the end of its launcher", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("launcher", "number", "reason"), LAUNCHERS)
def test_a_launcher_that_ends_leaves_a_checkpoint_and_no_process(
    start: Callable[..., Job], launcher: tuple[str, ...], number: signal.Signals, reason: str
) -> None:
    job = start(*launcher)
    job.wait_for_steps(3)
    job.process.send_signal(number)
    job.wait_for_end(30)
    (step,) = (int(path.name.removeprefix("step-")) for path in (job.folder / "checkpoints").glob("step-*"))
    assert len(curve(read_metrics(job.folder))) == step
    assert f"stopped by {reason} at step {step:,}: saved; the same command resumes the run" in job.output
    assert "result " not in job.output


def train_and_break(place: str, rank: int, step: int, action: Callable[[], None], **arguments: Any) -> None:
    """Train, where a rank does something at a place of the loop, once `step` steps are done."""

    def act(trainer: Any) -> None:
        if trainer.step == step and trainer.world.rank == rank:
            action()

    with stepping_in(place, act):
        train(**arguments)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("place", "step", "saved", "action"),
    [
        ("step", 2, 3, terminate),
        ("validation", 3, 3, interrupt),
        ("validation", STEPS, STEPS, terminate),
        ("save", 2, 2, terminate),
    ],
)
def test_a_signal_to_one_rank_stops_all_at_one_step_and_no_bit_changes(
    world: World, tiny: Path, tmp_path: Path, two: Path, place: str, step: int, saved: int, action: Callable[[], None]
) -> None:
    folder = tmp_path / "run"
    every = 2 if place == "validation" else 1  # a step that is validated need have no line of its own
    keys = {"run.folder": str(folder), "logging.every": every}
    world.run(train_and_break, place, 1, step, action, ranks=2, config=str(tiny), **keys)
    reason, log = "SIGTERM" if action is terminate else "SIGINT", (folder / "log.txt").read_text()
    assert f"stopped by {reason} at step {saved}: saved; the same command resumes the run" in log
    assert "result " not in log
    assert (folder / "checkpoints" / f"step-{saved:08d}").exists()
    found, expected = run(world, tiny, folder, ranks=2, **{"logging.every": every}), read_metrics(two)
    assert curve(found) == curve([line for line in expected if line["step"] % every == 0])
    assert validations(found) == validations(expected)
    assert "result " in (folder / "log.txt").read_text()
    same_weights(folder, two)


def test_a_signal_during_preparation_ends_at_once(world: World, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="RunStopped: stopped by SIGTERM before the run began: nothing is lost"):
        world.run(prepare_and_break, ranks=1, config=str(tiny), **{"run.folder": str(tmp_path / "run")})


def prepare_and_break(**arguments: Any) -> None:
    from moe_mamba.train import run as training

    whole = training.prepare_run

    def broken(*rest: Any) -> Any:
        terminate()
        return whole(*rest)

    training.prepare_run = broken  # type: ignore[assignment]
    try:
        train(**arguments)
    except RunStopped as error:
        assert error.code == 143
        raise
    finally:
        training.prepare_run = whole


def terminate_and_dawdle() -> None:
    terminate()
    time.sleep(60)


def test_what_cannot_be_saved_in_the_grace_time_ends_without(world: World, tiny: Path, tmp_path: Path) -> None:
    keys = {"run.folder": str(tmp_path / "run"), "checkpoint.grace": 1}
    with pytest.raises(WorkerError, match="exit code 1"):
        world.run(train_and_break, "save", 0, 4, terminate_and_dawdle, ranks=1, config=str(tiny), **keys)
    assert "not saved within checkpoint.grace=1 s" in (tmp_path / "run" / "log.txt").read_text()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000002"]


def train_among_strangers(rank: int, step: int, **arguments: Any) -> None:
    """Train, where strangers come before each rank joins the hub, stay, and go on knocking; one rank is killed."""
    from moe_mamba.faults import watchdog

    def join(address: str, port: int, *rest: Any) -> Any:
        words = ['{"token": "é"}\n'.encode(), b"[" * 3000 + b"\n", b"GET / HTTP/1.0\r\n\r\n", b"", b"x" * 100_000]
        for number in range(500):
            with contextlib.suppress(OSError):
                held.append(socket.create_connection((address, port), timeout=5))
                held[-1].sendall(words[number % len(words)])
        return whole(address, port, *rest)

    held: list[socket.socket] = []
    whole, watchdog.join_hub = watchdog.join_hub, join
    try:
        train_and_break("step", rank, step, kill, **arguments)
    finally:
        watchdog.join_hub = whole
        for stranger in held:
            stranger.close()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_death_is_reported_though_strangers_came(world: World, tiny: Path, tmp_path: Path) -> None:
    keys = {"run.folder": str(tmp_path / "run")}
    with pytest.raises(WorkerError) as stop:
        world.run(train_among_strangers, 1, 2, ranks=2, config=str(tiny), **keys)
    (line,) = (line for line in str(stop.value).splitlines() if "RunStopped: " in line)
    assert "RunStopped: rank 1 (" in line
    assert line.endswith(") died without an error message (killed, or crashed) after step 2")
    assert (tmp_path / "run" / "log.txt").read_text().count("error: rank 1 (") == 1


def fail() -> None:
    raise ValueError("a fault of ours")


def test_an_exception_on_one_rank_is_the_line_of_all(world: World, tiny: Path, tmp_path: Path) -> None:
    keys = {"run.folder": str(tmp_path / "run")}
    with pytest.raises(WorkerError) as stop:
        world.run(train_and_break, "step", 1, 2, fail, ranks=2, config=str(tiny), **keys)
    (line, *_) = (line for line in str(stop.value).splitlines() if "RunStopped: " in line)
    assert "RunStopped: rank 1 (" in line
    assert "stopped after step 2: ValueError: a fault of ours" in line
    assert (tmp_path / "run" / "log.txt").read_text().count("error: rank 1 (") == 1
    assert len(curve(run(world, tiny, tmp_path / "run", ranks=2))) == STEPS


def test_more_processes_go_on_and_say_what_changes(world: World, tiny: Path, tmp_path: Path) -> None:
    constant = {"train__schedule": "wsd", "train__warmup": 0.0, "train__decay": 0.0, "train__micro_batch": 4}
    log = tmp_path / "run" / "log.txt"
    run(world, tiny, tmp_path / "run", train__steps=2, **constant)
    run(world, tiny, tmp_path / "run", ranks=2, train__steps=4, **constant)
    assert log.read_text().count(" micro-steps of ") == 2  # each rank writes it into the log
    assert (
        "2 micro-steps of 4 sequences per device became 1 of 4: the balance loss, computed for each," in log.read_text()
    )
    run(world, tiny, tmp_path / "run", ranks=2, train__steps=6, **constant)
    assert log.read_text().count(" micro-steps of ") == 2  # each rank writes it into the log


@pytest.fixture(scope="session")
def two(world: World, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("two") / "run"
    run(world, tiny, folder, ranks=2)
    return folder


def test_a_hang_says_who_stands_where() -> None:
    places = {0: "a", 1: None, 2: "a", 3: "b", 4: "a", 5: "a", 6: None}
    assert hang_line(places, 4).endswith(": ranks 0, 2, 4-5 at a; rank 3 at b; no answer from ranks 1, 6")


def test_a_second_interrupt_is_urgent_and_an_echo_of_the_first_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    stop = Stop()
    stop.begun = True
    stop.start()
    try:
        for seconds in (0.0, 0.1):
            now = time.monotonic() + seconds
            monkeypatch.setattr(time, "monotonic", lambda now=now: now)
            interrupt()
            stop.check()
        assert stop.reason == "SIGINT"
        assert stop.asked == [int(reason == "SIGINT") for reason in REASONS]
        assert not stop.is_urgent
        monkeypatch.setattr(time, "monotonic", lambda: now + 2)
        interrupt()
        stop.check()
        assert stop.is_urgent
    finally:
        stop.finish()
    interrupt()  # is ignored: it would fill the screen with tracebacks of a process that ends anyway
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_sites_warning_is_heard_where_the_launcher_was_protected_from_it() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as slurm.sbatch starts its agents, and they their ranks
    stop = Stop()
    stop.begun = True
    stop.start()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.check()
        assert stop.reason == "SIGUSR1"
        assert stop.asked == [int(reason == "SIGUSR1") for reason in REASONS]
    finally:
        stop.finish()
        signal.signal(signal.SIGUSR1, before)


def test_a_shell_is_no_launcher() -> None:
    assert launchers() == []
