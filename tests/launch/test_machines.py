"""Several machines, which namespaces stand for: launchers, lost links, and what is refused at the start."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest

from moe_mamba.errors import UserError
from moe_mamba.run.metrics import read_metrics
from tests import ROOT
from tests.launch import slurm_on_machines
from tests.machines import Machine, skip_where_impossible, wait
from tests.train.runs import curve, run
from tests.world import World

BIN = Path(sys.executable).parent
TRAIN = ROOT / "launch" / "train.py"
STEPS = 150
# Dropless, and with a rate that does not depend on the number of steps: any beginning of the curve can be compared.
KEYS = {
    "moe.capacity_factor": "null", "train.global_batch": 12, "train.learning_rate": 3e-3, "train.steps": STEPS,
    "train.schedule": "wsd", "train.warmup": 0, "train.decay": 0, "train.validate_every": 0, "train.sample_tokens": 0,
    "checkpoint.every": 10,
}  # fmt: skip
# The line of docs/clusters.md.
KEEP_ALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"
SECONDS_TO_START = 120
EMPTY: Mapping[str, tuple[str, ...]] = MappingProxyType({})
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(world: World, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process, step by step."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return curve(run(world, tiny, folder, **{key.replace(".", "__"): value for key, value in KEYS.items()}))


class Job:
    """Processes on machines that train one run in `folder`, with their screens."""

    def __init__(self, tiny: Path, folder: Path, **keys: object) -> None:
        self.folder = folder
        keys = {"run.folder": folder, **KEYS, **keys}
        self.line = (TRAIN, f"--config={tiny}", *(f"--{key}={value}" for key, value in keys.items()))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, machine: Machine, *launcher: object, line: tuple[object, ...] = (), **environment: str) -> None:
        """Start `launcher` with the training line, or `line`, on a machine."""
        words = *launcher, *(line or self.line)
        folder = self.folder.parent
        self.processes[machine.name] = machine.start(
            *words, screen=folder / f"{machine.name}.txt", folder=folder, **environment
        )

    def start_ranks(
        self, machines: list[Machine], line: tuple[object, ...] = (), prefixes: Mapping[str, tuple[str, ...]] = EMPTY
    ) -> None:
        """Start one rank on each machine, as a launcher does; `prefixes` stand before a machine's command."""
        for rank, machine in enumerate(machines):
            where = {"MASTER_ADDR": machines[0].name, "MASTER_PORT": "29500", "WORLD_SIZE": str(len(machines))}
            where |= {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            self.start(machine, *prefixes.get(machine.name, ()), sys.executable, line=line, **where)

    def screen(self, name: str) -> str:
        """What a machine's process wrote."""
        return (self.folder.parent / f"{name}.txt").read_text()

    @property
    def screens(self) -> str:
        """What all wrote."""
        return "".join(map(self.screen, self.processes))

    @property
    def losses(self) -> list[float]:
        """The curve so far."""
        with contextlib.suppress(UserError):  # there is none yet
            return curve(read_metrics(self.folder))
        return []

    def wait_for_steps(self, steps: int) -> None:
        """Wait until so many steps are made."""
        try:
            wait(lambda: len(self.losses) >= steps or self.has_ended, SECONDS_TO_START, f"step {steps}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.screens}") from None
        assert len(self.losses) >= steps, self.screens

    @property
    def has_ended(self) -> bool:
        """Whether a process has ended."""
        return any(process.poll() is not None for process in self.processes.values())

    def wait_for_end(self, name: str, seconds: float) -> int:
        """The exit code of a machine's process."""
        try:
            return self.processes[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} runs on after {seconds} s\n{self.screens}") from None

    def refusal(self) -> str:
        """The one line on rank 0's screen with which all end, before anything began; no other has more than one."""
        for name in self.processes:
            assert self.wait_for_end(name, SECONDS_TO_START) == 2, self.screens
            assert self.screen(name).count("error: ") <= 1, self.screens
        assert "Traceback" not in self.screens
        (line,) = [line for line in self.screen("node1").splitlines() if "error: " in line]
        return line


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> Job:
    return Job(tiny, tmp_path / "run")


def same_beginning(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected[: len(found)], rel=1e-5)


def test_deepspeed_over_ssh_trains_as_one_process_and_ends_when_a_machine_is_lost(
    machines: list[Machine], job: Job, undisturbed: list[float]
) -> None:
    folder = job.folder.parent
    (folder / "hosts").write_text("".join(f"{machine.name} slots=1\n" for machine in machines))
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")  # deepspeed hands on what is in it
    launcher = BIN / "deepspeed", f"--hostfile={folder / 'hosts'}"
    job.line += ("--train.steps=100000",)
    job.start(machines[0], *launcher, PDSH_SSH_ARGS_APPEND=KEEP_ALIVE)
    job.wait_for_steps(20)
    machines[2].cut()
    assert job.wait_for_end("node1", 60) != 0
    (line,) = [line for line in job.screens.splitlines() if "error: " in line]
    assert re.search(r"error: rank 2 \(node3, process \d+\) died without an error message", line)
    assert "Traceback" not in job.screens
    same_beginning(job.losses[:100], undisturbed)


def test_torchrun_goes_on_with_the_machines_that_are_left(
    machines: list[Machine], job: Job, undisturbed: list[float]
) -> None:
    elastic = "--nnodes=2:3", "--max-restarts=3", "--rdzv-conf=last_call_timeout=5"
    meeting = "--rdzv-backend=c10d", f"--rdzv-endpoint={machines[0].name}:29400", "--rdzv-id=run"
    for machine in machines:
        job.start(machine, BIN / "torchrun", "--nproc-per-node=1", *elastic, *meeting)
    job.wait_for_steps(12)
    machines[2].cut()
    for machine in machines[:2]:
        assert job.wait_for_end(machine.name, 120) == 0, job.screens
    assert "3 x cpu" in job.screens
    assert "2 x cpu" in job.screens
    assert "rank 2 (node3, process " in job.screens
    assert len(job.losses) == STEPS
    same_beginning(job.losses, undisturbed)
    # Its own torchrun hears of nothing, and waits for minutes; the rank has ended.
    assert "error: rank 0 (node1, process " in job.screen("node3")


def test_a_run_folder_that_is_not_shared_is_refused(machines: list[Machine], job: Job) -> None:
    job.folder.mkdir()
    machines[1].own(job.folder)
    job.start_ranks(machines[:2])
    line = job.refusal()
    assert "run.folder is not shared" in line
    assert "node2" in line


def test_a_host_name_bound_to_the_machine_itself_is_refused(machines: list[Machine], job: Job) -> None:
    machines[1].hosts.write_text("127.0.0.1 localhost node2\n10.77.0.1 node1\n")
    job.start_ranks(machines[:2])
    line = job.refusal()
    assert "node2" in line
    assert "127.0.0.1" in line


def test_a_port_that_is_taken_is_refused(machines: list[Machine], job: Job, tmp_path: Path) -> None:
    machines[0].start(sys.executable, "-m", "http.server", "29500", screen=tmp_path / "server.txt")
    wait(lambda: machines[0].listens(29500), 30, "the server")
    job.start_ranks(machines[:2])
    assert "29500" in job.refusal()


def test_a_clock_an_hour_off_is_a_warning_with_machine_and_offset(machines: list[Machine], job: Job) -> None:
    # Machines of one kernel have one clock, and under faketime, which makes another, time.sleep fails with EINVAL.
    # Python imports this module before it runs anything.
    (job.folder.parent / "sitecustomize.py").write_text(
        "import time\n\nnow = time.time\ntime.time = lambda: now() - 3600\n"
    )
    line = (ROOT / "launch" / "preflight.py", *job.line[1:])
    path = os.pathsep.join([str(job.folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    job.start_ranks(machines[:2], line, {"node2": ("env", f"PYTHONPATH={path}")})
    for name in job.processes:
        assert job.wait_for_end(name, SECONDS_TO_START) == 0, job.screens
    (warning,) = [line for line in job.screens.splitlines() if "the clock of " in line]
    assert re.search(r"node2 is 3,(599|600)\.\d s behind", warning)


def test_slurm_trains_saves_when_warned_and_goes_on(
    machines: list[Machine], job: Job, undisturbed: list[float]
) -> None:
    folder = job.folder.parent
    slurm_on_machines.install(folder / "bin")
    (folder / "launch").symlink_to(ROOT / "launch")  # so that what the script leaves in the checkout lies here
    names = ",".join(machine.name for machine in machines)
    slurm = {
        "MACHINES": ",".join(f"{machine.name}:{machine.inner}" for machine in machines),
        "REQUEUED": str(folder / "requeued.txt"), "PATH": f"{folder / 'bin'}:{BIN}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": names, "SLURM_CPUS_ON_NODE": "1",
    }  # fmt: skip
    batch = ("launch/slurm.sbatch", *job.line[1:])
    job.start(machines[0], "bash", line=batch, **slurm)
    job.wait_for_steps(12)
    (script,) = psutil.Process(job.processes["node1"].pid).children()
    script.send_signal(signal.SIGUSR1)  # the batch script alone
    job.wait_for_end("node1", 60)
    saved = len(job.losses)
    assert 12 <= saved < STEPS, job.screens
    assert (job.folder / "checkpoints" / f"step-{saved:08d}").is_dir()
    assert (folder / "requeued.txt").read_text() == "7\n"
    job.start(machines[0], "bash", line=batch, **slurm | {"SLURM_RESTART_COUNT": "1"})
    assert job.wait_for_end("node1", SECONDS_TO_START) == 0, job.screens
    assert (folder / "requeued.txt").read_text() == "7\n"
    assert len(job.losses) == STEPS
    same_beginning(job.losses, undisturbed)


def test_the_machines_end_with_the_process_that_made_them(tmp_path: Path) -> None:
    skip_where_impossible()
    words = "import pathlib, time; from tests.machines import Site; Site(pathlib.Path('.').resolve()); print('made')"
    words = [sys.executable, "-uc", f"{words}; time.sleep(600)"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "made\n"
        processes = psutil.Process(owner.pid).children(recursive=True)
        assert len(processes) > 8
        owner.kill()
    wait(lambda: not any(process.is_running() for process in processes), 20, "the end of all")
