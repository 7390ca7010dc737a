"""Joining and leaving the world of processes, and what all of them tell each other."""

import ctypes
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from moe_mamba.errors import UserError
from moe_mamba.parallel.agent_store import agent_store
from moe_mamba.parallel.topology import Topology, World

T = TypeVar("T")

# Of collectives until `limit_collectives`; rank 0 prepares the corpus before, inside a ``meeting.Meeting``.
JOIN_TIMEOUT = timedelta(minutes=30)
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def start_world(world: World) -> None:
    """Choose this process's device and join the process group (NCCL on GPUs, gloo on CPUs)."""
    # Where a variable is missing DeepSpeed would look for MPI: say what a world of one is.
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in single.items():
        os.environ.setdefault(name, value)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // world.local_size))

    import deepspeed
    import deepspeed.ops

    # Its shared-memory op is compiled at first start (20 s) and dies without a C++ compiler; gloo does the work. To
    # learn which ops could be compiled, as whoever reads this table does, it would run a compiler on each.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        # Not by DeepSpeed, which would bind the GPU to the group: NCCL would then make each later group, of whatever
        # ranks, by splitting the world's communicator, in which all of the world take part.
        # A world of one talks to nobody: torchrun's agent keeps a store for it all the same.
        store = dist.HashStore() if world.size == 1 else agent_store(world, JOIN_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=JOIN_TIMEOUT)
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        timeout=JOIN_TIMEOUT,
        verbose=False,
    )


def keep_freed_memory() -> None:
    """On a CPU with glibc: keep what large tensors leave, for the next ones.

    It would give their memory back at once, and the system hands it out again zeroed page by page, which costs a layer
    of stacked experts up to a fifth of its time.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def limit_collectives(seconds: float) -> None:
    """Let a collective of any group that this rank is in, default or made since, fail after `seconds`."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def finish_world() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_first(value: T) -> T:
    """What rank 0 has, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all(value: T) -> list[T]:
    """What every rank has, in the order of ranks."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_all(function: Callable[[], T]) -> T:
    """Call `function` on every rank; without a process group, only here.

    Raises:
        UserError: of the first rank that has one, on all ranks alike, so that none waits for another.
    """
    if not dist.is_initialized():
        return function()
    result: list[T] = []
    refusal = None
    try:
        result.append(function())
    except UserError as error:
        refusal = str(error)
    if first := next(filter(None, from_all(refusal)), None):
        raise UserError(first)
    return result[0]


def on_first(function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, on every rank, which all call this; without a process group, here.

    Raises:
        UserError: of rank 0, on all ranks.
    """
    if not dist.is_initialized():
        return function()
    result = on_all(lambda: function() if dist.get_rank() == 0 else None)
    return from_first(result)  # type: ignore[return-value]


def first_then_all(function: Callable[[], T]) -> T:
    """Call `function` on rank 0, and then on the others, which find done what it left in files.

    Raises:
        UserError: of any rank, on all ranks.
    """
    if not dist.is_initialized():
        return function()
    is_first = dist.get_rank() == 0
    first = on_all(lambda: function() if is_first else None)
    other = on_all(lambda: None if is_first else function())
    return first if is_first else other  # type: ignore[return-value]


def has_lost_a_rank(error: BaseException | None) -> bool:
    """Whether an error says no more than that another rank is gone."""
    while error is not None:
        words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
        if isinstance(error, dist.DistError) or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def reduce_over_data(values: Tensor, topology: Topology) -> Tensor:
    """Sum over data-parallel ranks what tensor-parallel ranks have alike; the same on every rank.

    One collective over the world, whose sum is divided by the number of tensor-parallel ranks.

    Args:
        values: float64 of any shape, so that counts stay whole numbers; overwritten.
        topology: the layout.
    """
    if topology.world.size > 1:
        dist.all_reduce(values)
    return values / topology.tensor
