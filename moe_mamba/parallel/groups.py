"""The process groups of a layout: tensor-, data- and expert-parallel ranks; DeepSpeed makes those of experts.

A rank makes only the groups that it is in. megatron-core's ``parallel_state`` would make 17 for each rank, of which two
are used, and have each list those of all others: 94,000 calls and 10 s at 16,384 ranks.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_mamba.lean_import import lean_import
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology


@dataclass(frozen=True)
class Groups:
    """The process groups that a rank of a layout belongs to.

    Attributes:
        topology: the layout.
        tensor: the tensor-parallel ranks; None where layers are not sharded.
        data: the ranks that hold the same part of every layer; None where that is the whole world.
        replicas: number of neighbours that hold the same part of a parameter -> their group.
        mpu: what DeepSpeed asks about tensor parallelism; None where layers are not sharded.
    """

    topology: Topology
    tensor: ProcessGroup | None
    data: ProcessGroup | None
    replicas: dict[int, ProcessGroup]
    mpu: "ModelParallelUnit | None"


def start_groups(plan: RunPlan) -> Groups:
    """Make the groups of a layout; every rank calls it, after ``start_world``."""
    topology = plan.topology
    if topology.is_sharded and topology.world.device.type != "cuda":
        _allocate_on(topology.world.device)
    if topology.tensor == 1:
        groups = Groups(topology, None, None, {}, None)
    else:
        rank, size = topology.world.rank, topology.world.size
        tensor = _neighbours(topology.tensor, rank)
        data = _own_group(range(topology.tensor_rank, size, topology.tensor))
        # Neighbours that hold the same shard of a parameter sum its gradient.
        counts = {shard.replicas for shard in plan.shards.values()} - {1, topology.tensor}
        replicas = {count: _neighbours(count, rank) for count in sorted(counts)}
        replicas[topology.tensor] = tensor
        groups = Groups(topology, tensor, data, replicas, ModelParallelUnit(topology, tensor, data))
    if topology.is_sharded:
        _start_expert_groups(topology, groups.mpu)
    if any(shard.experts == "inner_expert" for shard in plan.shards.values()):
        _start_inner_expert_groups(topology)
    return groups


def expert_group_name(topology: Topology, experts: Literal["expert", "inner_expert"]) -> str:
    """What DeepSpeed calls the group of ranks that share experts; from its third part it reads their number."""
    return f"ep_size_{topology.expert}" if experts == "expert" else f"ep_size_{topology.inner_expert}_inner"


def _allocate_on(device: torch.device) -> None:
    """Let megatron-core's mappings, which allocate on the current GPU, do it on a device that is none.

    Only that module sees another ``torch``: nothing is changed for whoever else asks for the current GPU.
    """
    with lean_import():
        from megatron.core.tensor_parallel import mappings

    on_device = ModuleType("torch")
    vars(on_device).update(vars(torch), cuda=SimpleNamespace(current_device=lambda: device))
    mappings.torch = on_device


def _own_group(ranks: Iterable[int]) -> ProcessGroup:
    """A group that this rank is in; those that are not need not call it.

    Its members find one another by a name, of their ranks and the number of groups that each is in: so every rank makes
    as many, in the same order.
    """
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, ProcessGroup)
    return group


def _neighbours(count: int, rank: int) -> ProcessGroup:
    """The group of ``count`` neighbours that this rank is in."""
    first = rank // count * count
    return _own_group(range(first, first + count))


def _start_expert_groups(topology: Topology, mpu: "ModelParallelUnit | None") -> None:
    """DeepSpeed's groups of expert-parallel ranks and of those with the same experts, named ``ep_size_<n>``."""
    from deepspeed.utils import groups

    groups.mpu = mpu
    if topology.expert_tensor:
        groups._create_expert_data_and_model_parallel(topology.expert, mpu=mpu)
    else:
        groups._create_expert_and_data_parallel(topology.expert)


def _start_inner_expert_groups(topology: Topology) -> None:
    """The ranks that share the experts inside mixers, neighbours of one tensor_rank, and those with the same ones."""
    from deepspeed.utils import groups

    name, size = expert_group_name(topology, "inner_expert"), topology.inner_expert
    first = topology.data_rank // size * size
    data_ranks = {
        "_EXPERT_PARALLEL_GROUP": range(first, first + size),
        "_EXPERT_DATA_PARALLEL_GROUP": range(topology.inner_expert_rank, topology.data, size),
    }
    for kind, several in data_ranks.items():
        ranks = [data_rank * topology.tensor + topology.tensor_rank for data_rank in several]
        getattr(groups, kind)[name] = _own_group(ranks)
        getattr(groups, f"{kind}_RANKS")[name] = ranks


class ModelParallelUnit:
    """Answers DeepSpeed's questions about tensor parallelism, under its old names and its new ones."""

    def __init__(self, topology: Topology, tensor: ProcessGroup, data: ProcessGroup) -> None:
        self._topology = topology
        self._tensor = tensor
        self._data = data

    def get_model_parallel_group(self) -> ProcessGroup:
        """Tensor-parallel ranks of this rank."""
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


def forget_groups() -> None:
    """Empty what DeepSpeed keeps of process groups in its modules, so that this process may join another world."""
    if groups := sys.modules.get("deepspeed.utils.groups"):
        for name, value in vars(groups).items():
            is_kept = name.startswith("_") and name.isupper() and not isinstance(value, str)
            if is_kept and isinstance(value, dict):
                value.clear()
            elif is_kept or name in ("mpu", "mesh_device"):
                setattr(groups, name, None)
    if comm := sys.modules.get("deepspeed.comm.comm"):
        comm.cdb = None  # type: ignore[attr-defined]
    if stage3 := sys.modules.get("deepspeed.runtime.zero.parameter_offload"):
        # Modules and parameters are numbered by process, and ranks compare the numbers.
        stage3.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        stage3.Init.param_id = 0
        stage3.FWD_MODULE_STACK.clear()
