"""Process groups: joining and leaving the world, and the groups of tensor, expert and data peers in it."""

import ctypes
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from moe_mamba.parallel.placement import Shard
from moe_mamba.parallel.topology import Topology, World

T = TypeVar("T")

# Rank 0 prepares the corpus before it joins, so the others may wait long at the door.
JOIN_TIMEOUT = timedelta(hours=3)
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def start_world(world: World) -> None:
    """Choose this process's device and join the process group (NCCL on GPUs, gloo on CPUs)."""
    # Without a launcher DeepSpeed would look for MPI: say what a world of one is.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
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


@dataclass(frozen=True)
class Groups:
    """The process groups that a rank of a layout belongs to.

    Attributes:
        topology: the layout.
        tensor: the tensor peers, by megatron-core; None where layers are not cut.
        data: the ranks that hold the same part of every layer; None where that is the whole world.
        replicas: number of neighbours that hold the same part of a parameter -> their group.
        mpu: what DeepSpeed asks about tensor parallelism; None where layers are not cut.
    """

    topology: Topology
    tensor: ProcessGroup | None
    data: ProcessGroup | None
    replicas: dict[int, ProcessGroup]
    mpu: "ModelParallelUnit | None"


def start_groups(topology: Topology, held: dict[str, Shard]) -> Groups:
    """Make the groups of a layout; every rank calls it, after ``start_world``.

    Args:
        topology: the layout.
        held: what this rank holds of each parameter, which says how many neighbours hold the same.
    """
    if topology.tensor == 1:
        groups = Groups(topology, None, None, {}, None)
    else:
        from megatron.core import parallel_state

        if not torch.cuda.is_available():
            # Megatron-core allocates on the current GPU, and on a CPU a device by this name is all that it needs.
            torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
        parallel_state.initialize_model_parallel(topology.tensor, create_gloo_process_groups=False)
        tensor, data = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
        counts = {shard.replicas for shard in held.values()} - {1, topology.tensor}
        replicas = {count: _neighbours(count, topology) for count in sorted(counts)}
        replicas[topology.tensor] = tensor
        groups = Groups(topology, tensor, data, replicas, ModelParallelUnit(topology, tensor, data))
    if topology.is_cut:
        _start_expert_groups(topology, groups.mpu)
    return groups


def _neighbours(count: int, topology: Topology) -> ProcessGroup:
    """The group of ``count`` neighbours that this rank is in."""
    mine = None
    for first in range(0, topology.world.size, count):
        ranks = range(first, first + count)
        group = dist.new_group(list(ranks))
        if topology.world.rank in ranks:
            mine = group
    assert mine is not None
    return mine


def _start_expert_groups(topology: Topology, mpu: "ModelParallelUnit | None") -> None:
    """DeepSpeed's groups of expert peers and of ranks with the same experts, under the name ``ep_size_<n>``."""
    from deepspeed.utils import groups

    groups.mpu = mpu
    if topology.expert_tensor:
        groups._create_expert_data_and_model_parallel(topology.expert, mpu=mpu)
    else:
        groups._create_expert_and_data_parallel(topology.expert)


class ModelParallelUnit:
    """Answers DeepSpeed's questions about tensor parallelism, under its old names and its new ones."""

    def __init__(self, topology: Topology, tensor: ProcessGroup, data: ProcessGroup) -> None:
        self._topology = topology
        self._tensor = tensor
        self._data = data

    def get_model_parallel_group(self) -> ProcessGroup:
        """Tensor peers of this rank."""
        return self._tensor

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._topology.tensor

    def get_model_parallel_rank(self) -> int:
        """This rank among them."""
        return self._topology.tensor_rank

    def get_data_parallel_group(self) -> ProcessGroup:
        """Ranks with the same part of every layer."""
        return self._data

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._topology.data

    def get_data_parallel_rank(self) -> int:
        """This rank among them."""
        return self._topology.data_rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
