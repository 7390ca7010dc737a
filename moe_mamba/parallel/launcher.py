"""Which launcher started this process, and as which rank of which world: read off the environment, and nothing else.

deepspeed and torchrun say it in the variables of torch.distributed (RANK, WORLD_SIZE, ...). ``srun`` and ``mpirun``
have variables of their own, and leave out where rank 0 is. A variable of torch.distributed that a user exports must
agree with them. Sources: torch.distributed.run, "Environment Variables"; srun(1), "OUTPUT ENVIRONMENT VARIABLES";
mpirun(1) of Open MPI, "Exported Environment Variables"; MPICH and Intel MPI, the Hydra process manager.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe_mamba.errors import LocalError, UserError

Key = Literal["rank", "size", "local_rank", "local_size"]

TORCH: dict[Key, str] = {
    "rank": "RANK",
    "size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_size": "LOCAL_WORLD_SIZE",
}
OPEN_MPI: dict[Key, str] = {
    "rank": "OMPI_COMM_WORLD_RANK",
    "size": "OMPI_COMM_WORLD_SIZE",
    "local_rank": "OMPI_COMM_WORLD_LOCAL_RANK",
    "local_size": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
HYDRA: dict[Key, str] = {
    "rank": "PMI_RANK",
    "size": "PMI_SIZE",
    "local_rank": "MPI_LOCALRANKID",
    "local_size": "MPI_LOCALNRANKS",
}
# Set by a launcher of torch.distributed's kind, whose variables are then right whatever stands around it.
MARKS = {"torchrun": "TORCHELASTIC_RUN_ID", "deepspeed": "CROSS_SIZE"}
# SLURM numbers a batch script's own step, an interactive shell and its other helpers from here on (slurm.h).
FIRST_SPECIAL_STEP = 0xFFFFFFF0
DEFAULT_PORT = 29500
# Ports of jobs lie below those that Linux gives to connections (32768 and up).
FIRST_JOB_PORT, JOB_PORTS = 20000, 10000


@dataclass(frozen=True)
class Setting:
    """A whole number, and the variable that says it; as text, `NAME=value`."""

    name: str
    value: int

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


Settings = dict[Key, Setting]


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        launcher: its name for people: deepspeed, torchrun, srun, mpirun, or plain.
        rank: among all processes.
        size: processes on all machines.
        local_rank: among the processes of this machine.
        local_size: processes on this machine.
        master_address: host name or address of rank 0's machine.
        master_port: on which the world meets; 0 where a world of one needs none.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    master_address: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """What torch.distributed and DeepSpeed want to find in the environment."""
        numbers = {name: str(getattr(self, key)) for key, name in TORCH.items()}
        return numbers | {"MASTER_ADDR": self.master_address, "MASTER_PORT": str(self.master_port)}


def read_launch(environment: Mapping[str, str], local_rank: int | None = None) -> Launch:
    """Read how this process was started.

    Args:
        environment: such as ``os.environ``.
        local_rank: what a launcher's flag `--local_rank` says, if there is one.

    Raises:
        LocalError: values that are impossible, contradict one another, or lack one that cannot be worked out.
    """
    try:
        return _read(environment, local_rank)
    except UserError as error:  # of this process perhaps alone
        raise LocalError(str(error)) from None


def fill_environment(local_rank: int | None = None) -> Launch:
    """Read how this process was started, and set the variables of torch.distributed that the launcher left out.

    Args and errors are those of ``read_launch``.
    """
    launch = read_launch(os.environ, local_rank)
    os.environ |= launch.variables()
    return launch


def is_first_process(environment: Mapping[str, str]) -> bool:
    """Whether this process is rank 0, or none that any launcher numbered: a guess that never fails, for refusals."""
    try:
        _, outer = _outer_launcher(environment)
        rank = _number(environment, "RANK") or outer.get("rank")
    except UserError:
        return True
    return rank is None or rank.value == 0


def first_host(nodes: str) -> str:
    """The first host name of a list as SLURM writes it, such as ``node[01-03,7],gpu2``.

    Raises:
        UserError: it is none.
    """
    found = re.match(r"(?:[^\[\],\s]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+(?=,|$)", nodes)
    if not found:
        raise UserError(f"SLURM_STEP_NODELIST={nodes} is no list of host names: set MASTER_ADDR to rank 0's host name")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0])


def tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's ``2(x3),1`` to 2, 2, 2, 1.

    Raises:
        UserError: it is none.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d{1,7})\))?", part.strip(), re.ASCII)
        if not found:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text} is no list such as 2(x3),1: set LOCAL_WORLD_SIZE")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _read(environment: Mapping[str, str], flag: int | None) -> Launch:
    own = _torch_settings(environment, flag)
    launcher = next((name for name, mark in MARKS.items() if environment.get(mark)), None)
    outer: Settings = {}
    if launcher is None:
        launcher, outer = _outer_launcher(environment)
    for key, theirs in outer.items():
        if own.setdefault(key, theirs).value != theirs.value:
            raise UserError(f"{own[key]} contradicts {theirs} of {launcher}: unset {own[key].name}")
    rank, size = _check_world(own)
    local_rank, local_size = _check_machine(own, rank, size)
    port = _number(environment, "MASTER_PORT")
    if port is not None and port.value not in range(0 if size == 1 else 1, 2**16):
        raise UserError(f"{port}: a port is a number from 1 to 65535")
    if size == 1:
        return Launch(launcher, rank, size, local_rank, local_size, "127.0.0.1", 0)
    address = environment.get("MASTER_ADDR", "").strip() or _master_address(environment, launcher, size, local_size)
    if not re.fullmatch(r"\S+", address):
        raise UserError(f"MASTER_ADDR={address} is no host name: set it to that of rank 0's machine")
    if launcher == "deepspeed" and local_size == size and port is not None and port.value == DEFAULT_PORT:
        # The launcher's own default, which it gives to every job: the jobs of a machine are told apart by its process.
        return Launch(launcher, rank, size, local_rank, local_size, address, FIRST_JOB_PORT + os.getppid() % JOB_PORTS)
    number = port.value if port is not None else _master_port(environment, launcher)
    return Launch(launcher, rank, size, local_rank, local_size, address, number)


def _number(environment: Mapping[str, str], name: str) -> Setting | None:
    """A variable's value; None where it is not set, or empty."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise UserError(f"{name}={text} is not a whole number, 0 or more")
    return Setting(name, int(text))


def _numbers(environment: Mapping[str, str], names: Mapping[Key, str]) -> Settings:
    found = {key: _number(environment, name) for key, name in names.items()}
    return {key: setting for key, setting in found.items() if setting is not None}


def _torch_settings(environment: Mapping[str, str], flag: int | None) -> Settings:
    """What the variables of torch.distributed say, or the flag of a launcher."""
    own = _numbers(environment, TORCH)
    size = _number(environment, "LOCAL_SIZE")  # deepspeed's name, beside which an older shell's may stand
    if size is not None and (environment.get(MARKS["deepspeed"]) or "local_size" not in own):
        own["local_size"] = size
    if flag is not None:
        given = Setting("--local_rank", flag)
        if own.setdefault("local_rank", given).value != flag:
            raise UserError(f"{given} contradicts {own['local_rank']}: give only one of them")
        if flag < 0:
            raise UserError(f"{given} is not a whole number, 0 or more")
    return own


def _outer_launcher(environment: Mapping[str, str]) -> tuple[str, Settings]:
    """The launcher that set none of torch.distributed's variables, and what it says; a world of one says nothing."""
    open_mpi, hydra = _numbers(environment, OPEN_MPI), _numbers(environment, HYDRA)
    for key in ("rank", "size"):
        if key in open_mpi and key in hydra and open_mpi[key].value != hydra[key].value:
            raise UserError(f"{open_mpi[key]} contradicts {hydra[key]}: two launchers; start the processes with one")
    if "SLURM_PROCID" in environment and "local_rank" not in hydra:
        hydra = {}  # srun itself speaks PMI
    launcher, settings = "mpirun", open_mpi or hydra
    if "rank" not in settings:
        launcher, settings = "srun", _srun(environment)
    if not settings or (settings["rank"].value, settings.get("size", settings["rank"]).value) == (0, 1):
        return "plain", {}
    return launcher, settings


def _srun(environment: Mapping[str, str]) -> Settings:
    """What srun says; nothing in a batch script or an interactive shell, which is one process of a job of many."""
    rank = _number(environment, "SLURM_PROCID")
    step = _number(environment, "SLURM_STEP_ID") or _number(environment, "SLURM_STEPID")
    is_step = step is not None or any(name.startswith("SLURM_STEP_") for name in environment)
    if rank is None or not is_step or (step is not None and step.value >= FIRST_SPECIAL_STEP):
        return {}
    size = _number(environment, "SLURM_STEP_NUM_TASKS") or _number(environment, "SLURM_NTASKS")
    if size is None:
        raise UserError(f"{rank} without SLURM_NTASKS: start the processes with srun")
    found: Settings = {"rank": rank, "size": size}
    if local_rank := _number(environment, "SLURM_LOCALID"):
        found["local_rank"] = local_rank
    if local_size := _srun_local_size(environment):
        found["local_size"] = local_size
    return found


def _srun_local_size(environment: Mapping[str, str]) -> Setting | None:
    """How many of the step's tasks run on this machine."""
    if text := environment.get("SLURM_STEP_TASKS_PER_NODE"):
        counts, node = tasks_per_node(text), _number(environment, "SLURM_NODEID")
        if node is not None and node.value >= len(counts):
            raise UserError(f"{node}, but SLURM_STEP_TASKS_PER_NODE={text} names {len(counts)} machines")
        if node is not None or len(set(counts)) == 1:
            return Setting("SLURM_STEP_TASKS_PER_NODE", counts[node.value if node is not None else 0])
    return _number(environment, "SLURM_NTASKS_PER_NODE")


def _check_world(own: Settings) -> tuple[int, int]:
    """Rank and size, which must both be there and fit."""
    rank, size = own.get("rank"), own.get("size")
    if rank is None and size is None:
        return 0, 1
    if size is None:
        raise UserError(f"{rank} without WORLD_SIZE: set it to the number of processes, or unset RANK")
    if rank is None:
        raise UserError(f"{size} without RANK: set it in each process, from 0 on, or unset WORLD_SIZE")
    if size.value == 0:
        raise UserError(f"{size}: a world has at least one process")
    if rank.value >= size.value:
        raise UserError(f"{rank}, but {size}: the ranks are 0 to {size.value - 1}")
    return rank.value, size.value


def _check_machine(own: Settings, rank: int, size: int) -> tuple[int, int]:
    """Rank and size on this machine; where nothing says them, the process is alone there."""
    local_rank, local_size = own.get("local_rank"), own.get("local_size")
    if local_size is None:
        if local_rank is not None and local_rank.value > 0:
            raise UserError(f"{local_rank} without LOCAL_WORLD_SIZE: set it to the number of processes on this machine")
        local_size = Setting("LOCAL_WORLD_SIZE", 1)
    if not 1 <= local_size.value <= size:
        raise UserError(f"{local_size}, but {own.get('size') or 'there is 1 process'}: unset {local_size.name}")
    if local_rank is None:
        if local_size.value not in (1, size):
            raise UserError(f"{local_size} without LOCAL_RANK: set it in each process, from 0 on")
        local_rank = Setting("LOCAL_RANK", rank if local_size.value == size else 0)
    if local_rank.value >= local_size.value:
        raise UserError(f"{local_rank}, but {local_size}: a machine's ranks are 0 to {local_size.value - 1}")
    return local_rank.value, local_size.value


def _master_address(environment: Mapping[str, str], launcher: str, size: int, local_size: int) -> str:
    """Where rank 0 is, as far as the launcher lets one know."""
    if launcher in ("srun", "mpirun") and local_size == size:
        return "127.0.0.1"
    if launcher == "srun" and (nodes := environment.get("SLURM_STEP_NODELIST")):
        return first_host(nodes)
    way = (
        "mpirun -x MASTER_ADDR=HOST (-genv MASTER_ADDR HOST with MPICH and Intel)" if launcher == "mpirun" else "set it"
    )
    raise UserError(f"{size} processes without MASTER_ADDR, the host name of rank 0's machine: {way}")


def _master_port(environment: Mapping[str, str], launcher: str) -> int:
    """A port that all ranks work out alike, and other jobs on the same machine differently where there is a number."""
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    if launcher == "srun" and job is not None:
        return FIRST_JOB_PORT + (job.value + 997 * (step.value if step is not None else 0)) % JOB_PORTS
    if launcher == "mpirun" and (job_name := environment.get("PMIX_NAMESPACE")):
        return FIRST_JOB_PORT + zlib.crc32(job_name.encode()) % JOB_PORTS
    return DEFAULT_PORT
