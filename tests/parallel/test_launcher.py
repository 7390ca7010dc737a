"""How a process was started, read off its environment, and worlds that are started by these variables alone."""

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.train import train
from moe_mamba.commands.evaluate import main as evaluate
from moe_mamba.commands.generate import main as generate
from moe_mamba.errors import LocalError, UserError
from moe_mamba.parallel.launcher import first_host, is_first_process, read_launch, tasks_per_node
from moe_mamba.run.metrics import read_metrics
from tests import ROOT
from tests.train.runs import STEPS, curve
from tests.world import free_port

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1", "MASTER_PORT": "4711", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
ONE_MACHINE = {"RANK": "1", "WORLD_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1"}
SRUN = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "node[01-03],gpu2",
}  # fmt: skip
LAST = {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
TWO_MACHINES = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
ALONE = ("plain", 0, 1, 0, 1, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "", "WORLD_SIZE": ""}, ALONE),
        (TORCHRUN, ("torchrun", 3, 4, 1, 2, "node1", 4711)),
        (DEEPSPEED, ("deepspeed", 3, 4, 1, 2, "10.0.0.1", 29500)),
        (SRUN, ("srun", 5, 7, 1, 2, "node01", 20000 + (1234567 + 2 * 997) % 10000)),
        (SRUN | LAST, ("srun", 6, 7, 0, 1, "node01", 26561)),
        (SRUN | {"WORLD_SIZE": "7", "MASTER_ADDR": "a", "MASTER_PORT": "9"}, ("srun", 5, 7, 1, 2, "a", 9)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "7", "SLURM_NTASKS": "99"}, ("srun", 5, 7, 1, 2, "node01", 26561)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "7"} | {"SLURM_NODEID": "0"}, ("srun", 5, 7, 1, 7, "127.0.0.1", 26561)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "", "SLURM_NTASKS_PER_NODE": "2"}, ("srun", 5, 7, 1, 2, "node01", 26561)),
        # srun starts one torchrun a machine, and speaks PMI as well
        (SRUN | TORCHRUN, ("torchrun", 3, 4, 1, 2, "node1", 4711)),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "7"}, ("srun", 5, 7, 1, 2, "node01", 26561)),
        # a batch script, the shells of salloc and of srun --pty
        (BATCH, ALONE),
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFB)}, ALONE),
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NODELIST": "node1"}, ALONE),
        (BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),
        (DEEPSPEED | {"LOCAL_WORLD_SIZE": "1"}, ("deepspeed", 3, 4, 1, 2, "10.0.0.1", 29500)),  # an outer shell's
        # one machine and deepspeed's own default: a port of this launcher's
        (DEEPSPEED | ONE_MACHINE, ("deepspeed", 1, 2, 1, 2, "10.0.0.1", 20000 + os.getppid() % 10000)),
        (DEEPSPEED | ONE_MACHINE | {"MASTER_PORT": "4711"}, ("deepspeed", 1, 2, 1, 2, "10.0.0.1", 4711)),
        (BATCH | DEEPSPEED, ("deepspeed", 3, 4, 1, 2, "10.0.0.1", 29500)),
        (OPEN_MPI, ("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500)),
        (OPEN_MPI | {"PMIX_NAMESPACE": "354549761"}, ("mpirun", 1, 2, 1, 2, "127.0.0.1", 21608)),
        (HYDRA, ("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500)),
        (BATCH | HYDRA, ("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500)),
        (SRUN | OPEN_MPI, ("mpirun", 1, 2, 1, 2, "127.0.0.1", 29500)),  # its daemons are srun's tasks
        (OPEN_MPI | TWO_MACHINES | {"MASTER_ADDR": "b"}, ("mpirun", 1, 2, 0, 1, "b", 29500)),
        (BY_HAND, ("plain", 1, 2, 0, 1, "node1", 29500)),
    ],
)  # fmt: skip
def test_any_launcher_is_understood(environment: dict[str, str], expected: tuple[object, ...]) -> None:
    launch = read_launch(environment)
    assert tuple(vars(launch).values()) == expected
    again = read_launch(environment | launch.variables())
    assert tuple(vars(again).values()) == expected
    assert is_first_process(environment) == (launch.rank == 0)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1, but WORLD_SIZE=1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        (BY_HAND | {"MASTER_ADDR": "node1 node2"}, "MASTER_ADDR=node1 node2"),
        (BY_HAND | {"MASTER_ADDR": " "}, "2 processes without MASTER_ADDR"),
        (BY_HAND | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
        (BY_HAND | {"MASTER_PORT": "0"}, "MASTER_PORT=0"),
        (BY_HAND | {"LOCAL_RANK": "1"}, "LOCAL_RANK=1 without LOCAL_WORLD_SIZE"),
        (BY_HAND | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3, but WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3, but there is 1 process"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2, but LOCAL_WORLD_SIZE=2"),
        (TORCHRUN | {"LOCAL_RANK": ""}, "LOCAL_WORLD_SIZE=2 without LOCAL_RANK"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 contradicts SLURM_PROCID=5 of srun"),
        (SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 contradicts SLURM_NTASKS=7 of srun"),
        (SRUN | {"SLURM_NODEID": "4"}, "SLURM_NODEID=4"),
        (SRUN | {"SLURM_NTASKS": ""}, "SLURM_NTASKS"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE=2(x"),
        (SRUN | {"SLURM_STEP_NODELIST": "node[01-"}, "SLURM_STEP_NODELIST=node[01-"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "MASTER_ADDR"),
        (OPEN_MPI | TWO_MACHINES, "mpirun -x MASTER_ADDR=HOST"),
        (OPEN_MPI | {"RANK": "1", "WORLD_SIZE": "4"}, "WORLD_SIZE=4 contradicts OMPI_COMM_WORLD_SIZE=2 of mpirun"),
        (OPEN_MPI | HYDRA | {"PMI_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=2 contradicts PMI_SIZE=4"),
    ],
)  # fmt: skip
def test_an_impossible_or_contradictory_environment_is_refused(environment: dict[str, str], named: str) -> None:
    with pytest.raises(LocalError) as refused:
        read_launch(environment)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_flag_of_the_launcher_stands_for_the_variable_and_must_not_contradict_it() -> None:
    assert read_launch(DEEPSPEED | {"LOCAL_RANK": ""}, local_rank=1).local_rank == 1
    assert read_launch(DEEPSPEED, local_rank=1).local_rank == 1
    for flag in (0, -1):
        with pytest.raises(LocalError, match=f"--local_rank={flag} contradicts LOCAL_RANK=1"):
            read_launch(DEEPSPEED, local_rank=flag)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[01-03,7],gpu2", "node01"),
        ("gpu2,node[01-03]", "gpu2"),
        ("rack[2,5]n[003-9]-ib,x", "rack2n003-ib"),
        ("a.example.org,b", "a.example.org"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",a", "a[", "a[]", "a]", "a[1-2", "a b", "a[x]"])
def test_what_is_no_list_of_hosts_is_refused(nodes: str) -> None:
    with pytest.raises(UserError, match="is no list of host names"):
        first_host(nodes)


def test_tasks_of_each_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]


def clean_environment() -> dict[str, str]:
    """This process's, without what a launcher set, or a run of another test."""
    starts = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_", "SLURM_", "OMPI_", "PMI", "MPI_", "TORCHELASTIC_")
    return {name: value for name, value in os.environ.items() if not name.startswith(starts)}


@pytest.mark.parametrize(
    ("environment", "flags", "named"),
    [
        ({"RANK": "1", "WORLD_SIZE": "1"}, [], "RANK=1, but WORLD_SIZE=1"),
        (SRUN | {"WORLD_SIZE": "2"}, [], "WORLD_SIZE=2 contradicts SLURM_NTASKS=7"),  # rank 5 says it itself
        ({"LOCAL_RANK": "0"}, ["--local_rank=1"], "--local_rank=1 contradicts LOCAL_RANK=0"),
        ({}, ["--local_rank=x"], "--local_rank=x"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("command", "arguments"),
    [(train, []), (generate, ["--checkpoint=x", "--prompt=x"]), (evaluate, ["--checkpoint=x", "--input=x"])],
)
def test_the_commands_refuse_in_one_line(
    refusal: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., None],
    arguments: list[str],
    environment: dict[str, str],
    flags: list[str],
    named: str,
) -> None:
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert named in refusal(command, *arguments, *flags)


def job_with_a_free_port() -> int:
    """A SLURM job whose first step's port is free."""
    for job in itertools.count(os.getpid()):
        with socket.socket() as asked:
            try:
                asked.bind(("", 20000 + job % 10000))
            except OSError:
                continue
            return job
    raise AssertionError


def slurm(rank: int, job: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2",
        "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "nowhere",
    }  # fmt: skip


def open_mpi(rank: int, port: int) -> dict[str, str]:
    return OPEN_MPI | {
        "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), "MASTER_PORT": str(port),
    }  # fmt: skip


def start(tiny: Path, folder: Path, environment: dict[str, str], *flags: str) -> subprocess.Popen[str]:
    """One rank of a run."""
    return subprocess.Popen(
        [sys.executable, "launch/train.py", f"--config={tiny}", f"--run.folder={folder}", *flags],
        cwd=ROOT,
        env=clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize(
    ("variables", "number"),
    [(slurm, job_with_a_free_port), pytest.param(open_mpi, free_port, marks=pytest.mark.slow)],
    ids=["srun", "mpirun"],
)
def test_two_processes_train_by_their_launchers_variables_alone(
    tiny: Path, tmp_path: Path, variables: Callable[[int, int], dict[str, str]], number: Callable[[], int]
) -> None:
    shared = number()
    ranks = [start(tiny, tmp_path / "run", variables(rank, shared)) for rank in range(2)]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "2 x cpu" in said[0][0]
    assert said[1] == ("", "")
    assert len(curve(read_metrics(tmp_path / "run"))) == STEPS


@pytest.mark.slow
def test_what_refuses_rank_0_ends_the_others_where_no_launcher_does(tiny: Path, tmp_path: Path) -> None:
    shared = job_with_a_free_port()
    ranks = [start(tiny, tmp_path / "run", slurm(rank, shared), "--train.warm_start=nowhere") for rank in range(2)]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert "nowhere" in said[0][1]
    assert said[0][1].count("\n") == 1
    assert said[1] == ("", "")
