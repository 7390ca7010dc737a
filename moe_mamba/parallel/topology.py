"""Which processes there are, and which device each of them drives."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from moe_mamba.errors import UserError

T = TypeVar("T")

# Rank 0 prepares the corpus before it joins, so the others may wait long at the door.
JOIN_TIMEOUT = timedelta(hours=3)


@dataclass(frozen=True)
class World:
    """The processes of a run; `rank` and `size` count over all machines, `local_rank` over this one."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> "World":
        """Read what deepspeed's launcher or torchrun set; without a launcher, a world of one process."""
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))),
        )

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def check_devices(self) -> None:
        """Refuse more processes than GPUs.

        Raises:
            UserError: this process has no device.
        """
        if torch.cuda.is_available() and self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{self.local_size} processes for the {torch.cuda.device_count()} GPUs of this machine: "
                f"start one for each, with --num_gpus={torch.cuda.device_count()}"
            )

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.rank == 0

    def sequences_per_rank(self, global_batch: int, micro_batch: int | None) -> int:
        """Sequences of a global batch that fall to each process.

        Raises:
            UserError: the global batch cannot be shared evenly, or a share not cut into micro-batches.
        """
        if global_batch % self.size:
            fitting = max(n for n in range(1, self.size + 1) if global_batch % n == 0)
            raise UserError(
                f"train.global_batch={global_batch} is not divisible by the {self.size} processes: "
                f"start {fitting}, or change train.global_batch"
            )
        share = global_batch // self.size
        if micro_batch and share % micro_batch:
            raise UserError(
                f"train.micro_batch={micro_batch} does not divide the {share} sequences of each of the {self.size} "
                f"processes (train.global_batch={global_batch}): set train.micro_batch={math.gcd(share, micro_batch)}"
            )
        return share


def start_world(world: World) -> None:
    """Choose this process's device and join the process group (NCCL on GPUs, gloo on CPUs)."""
    # Without a launcher DeepSpeed would look for MPI: say what a world of one is.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // world.local_size))

    import deepspeed
    import deepspeed.ops

    # Its shared-memory op is compiled at first start (20 s) and dies without a C++ compiler; gloo does the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=JOIN_TIMEOUT,
        verbose=False,
    )


def finish_world() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def from_first(value: T) -> T:
    """What rank 0 has, on every rank."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]
